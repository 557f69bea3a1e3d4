"""Time and peak memory of scoring, forward and backward, against plain log-softmax and against TRL's chunked kernels.

- ``logprobs``: log-probability of sampled tokens, gradients of hidden states and head;
- ``frozen``: the same with a frozen head, as under an adapter: gradient of the hidden states alone;
- ``lsm``: LSM's position losses and the log-probabilities that the drift needs, against the reverse KL to a teacher of
  the same size over the whole vocabulary. The teacher's targets are there already, as they are in training: computed
  once per pool.

Every measurement has a process of its own. The head's gradient exists before; what comes on top is counted as memory.
On a CPU memory is the peak of the resident set, on a GPU that of the allocator.

``python benchmarks/scoring.py --trl-python PYTHON --json scoring.json``; PYTHON is an interpreter that has TRL 1.16.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPOSITORY, ChildError, PeakMemory, machine, pairwise_ratios, run_child, spread, versions
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

TASKS = ("logprobs", "frozen", "lsm")
PEERS = ("plain", "opdlab", "trl")
MB = 1e6


# -- the child: one measurement ----------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and extra bytes of one forward and backward pass."""
    import torch

    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    n, v, h = arguments.positions, arguments.vocabulary, arguments.hidden

    def tensors(positions: int) -> dict[str, Any]:
        """Inputs; states as a model's last norm leaves them, heads such that logits have a spread of about 2."""
        made = {"hidden": torch.randn(positions, h), "teacher": torch.randn(positions, h)}
        made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
        made["targets"] = torch.randint(0, v, (positions,), device=device)
        made["support"] = torch.randint(0, v, (positions, arguments.k), device=device)
        made["support_logits"] = torch.randn(positions, arguments.k, device=device)
        return made

    weight = torch.empty(v, h, device=device, dtype=dtype).normal_(std=2 / math.sqrt(h))
    teacher = (
        torch.empty(v, h, device=device, dtype=dtype).normal_(std=2 / math.sqrt(h)) if arguments.task == "lsm" else None
    )
    if arguments.task != "frozen":
        weight.requires_grad_()
        weight.grad = torch.ones_like(weight)
    loss = getattr(sys.modules[__name__], f"{arguments.peer}_{arguments.task}")

    def step(inputs: dict[str, Any]) -> None:
        inputs["hidden"].requires_grad_()
        loss(weight=weight, teacher_weight=teacher, **inputs).sum().backward()

    step(tensors(8))  # threads, kernels, and what is set up at the first call
    inputs = tensors(n)
    peak = PeakMemory(None if device.type == "cpu" else device)
    _synchronize(device)
    started = time.perf_counter()
    step(inputs)
    _synchronize(device)
    return {"seconds": time.perf_counter() - started, "bytes": peak.extra_bytes()}


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


# -- what is measured --------------------------------------------------------------------------------------------------


def plain_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """All logits at once."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])


def opdlab_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """As the training step does on a single device."""
    from opdlab.scoring import Head, token_statistics

    return token_statistics(hidden, Head(weight, accumulate_grad=weight.requires_grad), targets).logprobs


def trl_logprobs(hidden: Any, weight: Any, targets: Any, **_: Any) -> Any:
    """With the chunk size of its trainers, and the outputs that ours gives too."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy", "is_top1")
    )[0]


plain_frozen, opdlab_frozen, trl_frozen = plain_logprobs, opdlab_logprobs, trl_logprobs


def plain_lsm(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, **_: Any) -> Any:
    """Reverse KL over the whole vocabulary."""
    import torch

    with torch.no_grad():
        log_q = (teacher @ teacher_weight.T).float().log_softmax(-1)
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def opdlab_lsm(hidden: Any, weight: Any, targets: Any, support: Any, support_logits: Any, **_: Any) -> Any:
    """Loss, and log-probabilities for the drift."""
    from opdlab.objectives.functional import teacher_topk_loss
    from opdlab.scoring import Head, support_statistics

    logits, statistics = support_statistics(hidden, Head(weight, accumulate_grad=True), targets, support)
    assert not statistics.logprobs.requires_grad
    return teacher_topk_loss(logits, support_logits)


def trl_lsm(hidden: Any, weight: Any, teacher: Any, teacher_weight: Any, **_: Any) -> Any:
    """Reverse KL over the whole vocabulary."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, teacher_weight, None, 1.0)[0]


# -- the parent --------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure each task with each peer, round by round, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32, help="size of the support")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--trl-python", help="interpreter that has TRL; without it TRL is left out")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # this is a child
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(measure(arguments)))
        return 0
    peers = [peer for peer in PEERS if peer != "trl" or arguments.trl_python]
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("torch", "opdlab", "trl"),
        "options": {name: value for name, value in vars(arguments).items() if name not in ("json", "peer", "task")},
        "tasks": {},
    }
    for task in arguments.tasks:
        rows: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
        for _ in range(arguments.rounds):
            for peer in peers:
                rows[peer].append(_child(arguments, task, peer))
        result["tasks"][task] = rows
        _print(task, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, default=str))
    return 0


def _child(arguments: argparse.Namespace, task: str, peer: str) -> dict[str, float]:
    options = ("positions", "vocabulary", "hidden", "k", "dtype", "device")
    flags = [part for name in options for part in (f"--{name}", str(getattr(arguments, name)))]
    python = arguments.trl_python if peer == "trl" else sys.executable
    try:
        return run_child(
            Path(__file__), [*flags, "--task", task, "--peer", peer], threads=arguments.threads, python=python
        )
    except ChildError as error:
        raise SystemExit(str(error)) from error


def _print(task: str, rows: dict[str, list[dict[str, float]]]) -> None:
    table = Table("", "seconds", "extra MB", "time / plain", "memory / plain", "opdlab's time / this", title=task)
    for peer, measured in rows.items():
        seconds, extra = [m["seconds"] for m in measured], [m["bytes"] / MB for m in measured]

        def ratio(to: str, key: str, over: Callable[..., Any] = rows.__getitem__) -> list[float]:
            return pairwise_ratios([m[key] for m in measured], [m[key] for m in over(to)])  # noqa: B023 - called at once

        ours = pairwise_ratios([m["seconds"] for m in rows["opdlab"]], seconds)
        table.add_row(
            *(peer, spread(seconds, 1), spread(extra, 0), spread(ratio("plain", "seconds"))),
            *(spread(ratio("plain", "bytes"), 3), spread(ours)),
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
