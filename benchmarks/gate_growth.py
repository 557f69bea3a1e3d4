"""Time of a gate and its metrics alone, up to 64 responses of 16,384 tokens, doubling the length.

- Each gate's forward, :class:`opdlab.gating.GateStrategy` called on synthetic inputs: random drift, lengths between
  half and the whole width, a newline every fifty tokens.
- Parts of ``GateMonitor`` at a logged step with Block64: ``metrics`` (histograms, loss, gradient, correlations),
  ``positions`` (curves along the response), ``read`` (the copy to the host and plain numbers), ``written`` (the curves'
  scalars to TensorBoard and ``metrics.csv``); and ``ages``, the sums by age at every step.

Two references are measured in the same run: one elementwise pass, ``exp`` over [B, T] float32, and an update (forward
and backward, LSM with the drift) of the shipped toy student, 281k parameters, as time per token. A real model's update
costs hundreds of times that, so the gate's share of it is far smaller.

``OMP_NUM_THREADS=1 python benchmarks/gate_growth.py --json gate_growth.json`` takes a minute.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY, machine, median, versions
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

from opdlab.diagnostics import StepTrace
from opdlab.diagnostics.gate_metrics import gate_tensors, read_gates
from opdlab.diagnostics.positions import position_tensors, read_positions
from opdlab.diagnostics.run_history import add_to_age_table, new_age_table
from opdlab.diagnostics.trace import to_host
from opdlab.gating import GateInputs, build_gate
from opdlab.objectives import TeacherTopK
from opdlab.policies import LanguageModel
from opdlab.rollouts import Rollouts, Targets
from opdlab.training.run_trainer import MetricsFile

GATES = ("none", "token", "sequence", "block32", "block64", "block128", "span")
METRICS = ("ages", "metrics", "positions", "read", "written")
REFERENCE = "exp"
NEWLINE = 7
TOY = "package://opdlab.toy/models/student"
UPDATE_SHAPE = 4, 512
SUPPORT = 32
MAX_BLOCKS = 64  # GateMonitor's default


# -- synthetic data ----------------------------------------------------------------------------------------------------


def synthetic(rows: int, length: int, device: torch.device, vocabulary: int = 50) -> tuple[Rollouts, GateInputs]:
    """Return rollouts of ``length / 2`` to ``length`` tokens, and the gate's inputs for them."""
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    behavior, drift, gap = (torch.randn(rows, length, generator=generator) * mask for _ in range(3))
    zeros = torch.zeros(rows, dtype=torch.long)
    rollouts = Rollouts(
        prompt_tokens=zeros[:, None] + 2,
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        tokens=tokens,
        mask=mask,
        behavior_logprobs=behavior,
        stop_reasons=zeros,
        rollout_ids=torch.arange(rows),
        prompt_ids=zeros,
        sampled_at_step=zeros,
        snapshot_step=zeros,
    ).to(device)
    current = rollouts.behavior_logprobs + 0.01 * drift.to(device)
    inputs = GateInputs(
        rollouts.tokens,
        rollouts.mask,
        rollouts.behavior_logprobs,
        current,
        current + gap.to(device),
        gap.to(device).abs(),
        entropy=gap.to(device).abs(),
        divergence=gap.to(device).abs(),
    )
    return rollouts, inputs


def gate_of(name: str) -> Any:
    """Return the gate; span takes a newline id of its own, since there is no tokenizer."""
    return build_gate(name, newline_token_ids=[NEWLINE]) if name == "span" else build_gate(name)


def trace_of(rollouts: Rollouts, inputs: GateInputs) -> StepTrace:
    """Return the trace of a training step with Block64."""
    shares = inputs.mask / inputs.mask.sum()
    norms = inputs.mask * 0.1
    return StepTrace(rollouts, 1, 3, inputs, build_gate("block64")(inputs), shares, {}, norms)


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median time of a call, repeated for ``budget`` seconds and at least three times, after a warm-up."""

    def timed() -> float:
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        return time.perf_counter() - began

    first = timed()
    return median([timed() for _ in range(max(3, min(200, int(budget / first))))])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(rows: int, length: int, device: torch.device, budget: float) -> dict[str, float]:
    """Return the seconds of every gate, of the metrics, and of the reference."""
    rollouts, inputs = synthetic(rows, length, device)
    work: dict[str, Callable[[], object]] = {REFERENCE: inputs.current_logprobs.exp}
    for name in GATES:
        gate = gate_of(name)
        work[name] = lambda gate=gate: gate(inputs)
    trace = trace_of(rollouts, inputs)
    tensors = {**gate_tensors([trace], MAX_BLOCKS), **position_tensors([trace])}
    ages = new_age_table(device)
    work |= {
        "ages": lambda: add_to_age_table(ages, trace),
        "metrics": lambda: gate_tensors([trace], MAX_BLOCKS),
        "positions": lambda: position_tensors([trace]),
        "read": lambda: (read_gates(host := to_host(tensors)), read_positions(host)),
    }
    scalars = read_positions(to_host(tensors))
    with tempfile.TemporaryDirectory() as folder:
        loggers = (TensorBoardLogger(folder), MetricsFile(Path(folder) / "metrics.csv"))
        steps = itertools.count(1)
        work["written"] = lambda: [logger.log_metrics(scalars, step=next(steps)) for logger in loggers]
        seconds = {name: seconds_of(function, device, budget) for name, function in work.items()}
        loggers[0].experiment.close()  # its thread must not write into a folder that is gone
        return seconds


def update_nanoseconds(device: torch.device, budget: float) -> float:
    """Return nanoseconds per token of an update of the toy student: scoring, LSM, backward; no optimizer."""
    model = LanguageModel(TOY).to(device)
    rollouts, inputs = synthetic(*UPDATE_SHAPE, device, vocabulary=model.vocab_size)
    support = torch.rand(*UPDATE_SHAPE, model.vocab_size, device=device).topk(SUPPORT, dim=-1)
    assert inputs.teacher_logprobs is not None
    targets = Targets(
        inputs.teacher_logprobs, support.indices.int(), support.values, torch.ones_like(inputs.teacher_logprobs)
    )
    objective = TeacherTopK(SUPPORT)

    def update() -> None:
        objective.position_losses(model.score(rollouts), rollouts, targets).losses.sum().backward()

    return 1e9 * seconds_of(update, device, budget) / int(rollouts.mask.sum())


def growth(seconds: list[float]) -> float:
    """Return the exponent of the growth with the length, over the last two doublings: 1 is linear."""
    last = seconds[-3:]
    return math.log2(last[-1] / last[0]) / (len(last) - 1) if len(last) > 1 else math.nan


def report(result: dict[str, Any]) -> None:
    """Print a table."""
    lengths, rows = result["options"]["lengths"], result["options"]["rows"]
    table = Table(
        *("", *(f"{length:,}" for length in lengths), "ns per token", "exponent", "times exp", "of a toy update"),
        title=f"ms at {rows} x T, and at the longest T: per token, growth over two doublings, ratios",
    )
    reference = result["seconds"][REFERENCE][-1]
    for name, seconds in result["seconds"].items():
        nanoseconds = 1e9 * seconds[-1] / (rows * lengths[-1])
        table.add_row(
            *(name, *(f"{1000 * value:.2f}" for value in seconds), f"{nanoseconds:.1f}", f"{growth(seconds):.2f}"),
            *(f"{seconds[-1] / reference:.1f}", f"{nanoseconds / result['update_nanoseconds_per_token']:.2%}"),
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"an update of the toy student: {result['update_nanoseconds_per_token']:,.0f} ns per token")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="responses (default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, default=16384, help="tokens; halved down to 1,024 (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each figure (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    given = parser.parse_args()
    if given.longest < 1024 or given.rows < 1:
        parser.error("--longest must be at least 1024, and --rows at least 1")
    device = torch.device(given.device)
    lengths = [given.longest >> power for power in range(int(math.log2(given.longest // 1024)), -1, -1)]
    before = machine()
    measured = [measure(given.rows, length, device, given.budget) for length in lengths]
    result = {
        "machine": before,
        "versions": versions("torch"),
        "options": {"rows": given.rows, "lengths": lengths, "device": given.device, "threads": torch.get_num_threads()},
        "seconds": {name: [row[name] for row in measured] for name in measured[0]},
        "update_nanoseconds_per_token": update_nanoseconds(device, given.budget),
    }
    report(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
