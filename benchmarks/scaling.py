"""Growth of time and memory of an update with the response's length, the batch, the vocabulary and the support.

One update is a training step's work on a micro-batch: the student's forward pass, objective, gate, loss, backward
pass. The student has the toy model's architecture (hidden size 96, two layers) and random weights. One size is doubled
while the others stay; the exponent is the slope of the logarithm from one doubling to the next: 1 is linear growth.
Every measurement has a process of its own; memory is the peak of the resident set minus its size before.

``python benchmarks/scaling.py --json scaling.json``
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import REPOSITORY, TOY_MODELS, PeakMemory, machine, run_child, versions
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))


@dataclass(frozen=True)
class Size:
    """Size of an update: rollouts, response tokens, rows of the head, tokens in the support."""

    batch: int = 1
    length: int = 2048
    vocabulary: int = 32_768
    k: int = 32


SWEEPS: dict[str, list[Size]] = {
    "length": [Size(length=256 << n) for n in range(7)],
    "batch": [Size(batch=1 << n, length=512) for n in range(5)],
    "vocabulary": [Size(vocabulary=8192 << n) for n in range(5)],
    "k": [Size(k=8 << n) for n in range(7)],
}


class Updates:
    """Student with random weights, and its updates.

    Args:
        size: of the largest update.
    """

    def __init__(self, size: Size) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

        from opdlab.gating import build_gate
        from opdlab.objectives import TeacherTopK
        from opdlab.policies import LanguageModel

        torch.manual_seed(0)
        config = Qwen3Config.from_pretrained(TOY_MODELS / "student")
        config.vocab_size, config.max_position_embeddings = size.vocabulary, 2 * size.length
        with tempfile.TemporaryDirectory() as folder:
            Qwen3ForCausalLM(config).save_pretrained(folder)
            AutoTokenizer.from_pretrained(TOY_MODELS / "student").save_pretrained(folder)
            self.student = LanguageModel(folder)
        self.student.accumulate_head_grad = True
        self._size, self._objective, self._gate = size, TeacherTopK(size.k), build_gate("block64", tau=1.0)

    def run(self, batch: int, length: int, lengths: Any = None) -> dict[str, float]:
        """Return seconds and bytes of one update.

        Args:
            batch: rollouts.
            length: response tokens of the longest.
            lengths: of each rollout, [batch]; all equal by default.
        """
        import torch

        from opdlab.objectives import loss_shares, reduce_losses
        from opdlab.rollouts import Rollouts, Targets
        from opdlab.training import gate_inputs

        vocabulary, k = self._size.vocabulary, self._size.k
        mask, ids = torch.ones(batch, length, dtype=torch.bool), torch.zeros(batch, dtype=torch.long)
        if lengths is not None:
            mask = torch.arange(length) < lengths[:, None]
        prompt = torch.zeros(batch, 32, dtype=torch.long)
        tokens = torch.randint(0, vocabulary, (batch, length))
        logprobs = torch.full((batch, length), -math.log(vocabulary))
        rollouts = Rollouts(prompt, prompt == 0, tokens, mask, logprobs, *5 * (ids,))
        support = torch.randint(0, vocabulary, (batch, length, k), dtype=torch.int32)
        targets = Targets(logprobs, support, torch.randn(batch, length, k), torch.ones(batch, length))
        peak = PeakMemory()
        started = time.perf_counter()
        positions = self._objective.position_losses(self.student.score(rollouts), rollouts, targets)
        weights = self._gate(gate_inputs(rollouts, targets, positions)).weights
        counts = {"num_tokens": float(mask.sum()), "num_rollouts": float(batch)}
        shares = loss_shares(mask, reduction="token_mean", **counts)
        reduce_losses(positions.losses, weights, shares).backward()
        return {"seconds": time.perf_counter() - started, "bytes": peak.extra_bytes()}


def measure(size: Size) -> dict[str, float]:
    """Measure seconds and bytes of one update; this is the child."""
    updates = Updates(size)
    updates.run(1, 16)  # warm up threads and gradient buffers
    return updates.run(size.batch, size.length)


def main() -> int:
    """Measure every sweep and print it with its exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--max-length", type=int, default=16_384, help="leave out longer responses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Size(**json.loads(arguments.child)))))
        return 0
    result: dict[str, Any] = {"machine": machine(), "versions": versions("torch", "transformers"), "sweeps": {}}
    for name in arguments.sweeps:
        rows = []
        for size in SWEEPS[name]:
            if size.length <= arguments.max_length:
                child = ["--child", json.dumps(asdict(replace(size)))]
                rows.append({**asdict(size), **run_child(Path(__file__), child, threads=arguments.threads)})
        result["sweeps"][name] = rows
        _print(name, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    fixed = ", ".join(f"{key} {value}" for key, value in rows[0].items() if key in asdict(Size()) and key != name)
    table = Table(name, "seconds", "exponent", "MB", "exponent", title=f"{name}; {fixed}")
    for before, row in zip([None, *rows], rows, strict=False):
        slopes = ["" if before is None else f"{math.log2(row[key] / before[key]):.2f}" for key in ("seconds", "bytes")]
        table.add_row(f"{row[name]:,}", f"{row['seconds']:.2f}", slopes[0], f"{row['bytes'] / 1e6:.0f}", slopes[1])
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
