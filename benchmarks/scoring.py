"""Time and peak memory of scoring, forward and backward, against plain log-softmax and kernels of other packages.

The other packages are TRL with chunked kernels, Liger, and Apple's cut cross-entropy, if they are installed and run on
the device; otherwise the table says so. ``scoring_peers.py`` has the measured functions.

- ``logprobs``: log-probability of sampled tokens, gradients of hidden states and head;
- ``frozen``: the same with a frozen head, as under an adapter: gradient of the hidden states alone;
- ``bucket``: reverse KL on a support with its tail, and the log-probabilities that the drift needs; the gradient
  reaches the whole head, as that of ``logprobs``, which stands beside it as ``sampled``;
- ``lsm``: LSM's position losses and the log-probabilities that the drift needs, against the reverse KL to a teacher of
  the same size over the whole vocabulary. The teacher's targets are given, as in training, where they are computed
  once per buffer;
- ``reverse_kl``, ``jsd``: these divergences from a teacher of the same size over the whole vocabulary, with the
  student's entropy, and for opdlab its log-probabilities. The teacher's hidden states are given.

Every measurement has a process of its own. The head's gradient exists before; only additional memory is counted.
On a CPU memory is the peak of the resident set, on a GPU that of the allocator. CPU seconds vary less than seconds on
a busy machine.

``python benchmarks/scoring.py --trl-python PYTHON --json scoring.json``; PYTHON is an interpreter that has them:
``pip install trl liger-kernel cut-cross-entropy``.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import ChildError, machine, pairwise_ratios, run_child, spread, versions
from rich.console import Console
from rich.table import Table
from scoring_peers import PEERS, TASKS, Sizes, has_task, measure

OURS = ("plain", "opdlab", "sampled")
MB = 1e6


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
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="all by default")
    parser.add_argument("--trl-python", help="interpreter that has TRL, Liger, cut-cross-entropy; this one by default")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # this is a child
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = Sizes(**{name: getattr(arguments, name) for name in Sizes.__dataclass_fields__})
    if arguments.peer:
        packages = versions("torch", "trl", "liger-kernel", "cut-cross-entropy", "triton")
        print(json.dumps({**measure(arguments.peer, arguments.task, sizes), "versions": packages}))
        return 0
    options = {name: value for name, value in vars(arguments).items() if name not in ("json", "peer", "task")}
    result: dict[str, Any] = {"machine": machine(), "versions": {}, "options": options, "tasks": {}}
    for task in arguments.tasks:
        rows: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers if has_task(peer, task)}
        for number in range(arguments.rounds):
            for peer in rows:
                if number and "skipped" in rows[peer][0]:
                    continue
                rows[peer].append(_child(arguments, sizes, task, peer))
                result["versions"][peer] = rows[peer][-1].pop("versions")
        result["tasks"][task] = rows
        Console(width=160).print(table(task, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, default=str))
    return 0


def _child(arguments: argparse.Namespace, sizes: Sizes, task: str, peer: str) -> dict[str, Any]:
    flags = [part for name, value in vars(sizes).items() for part in (f"--{name}", str(value))]
    python = sys.executable if peer in OURS or not arguments.trl_python else arguments.trl_python
    try:
        return run_child(
            Path(__file__),
            [*flags, "--task", task, "--peer", peer],
            threads=arguments.threads,
            python=python,
            device=sizes.device,
        )
    except ChildError as error:
        raise SystemExit(str(error)) from error


def table(title: str, rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Return seconds and memory of each peer, and ratios round by round."""

    def column(peer: str, key: str) -> list[float]:
        return [row[key] for row in rows.get(peer, []) if key in row]

    def ratio(ours: str, theirs: str, key: str, digits: int = 2) -> str:
        both = column(ours, key), column(theirs, key)
        measured = all(both) and all(both[1])  # a tiny task may need no extra memory
        return spread(pairwise_ratios(*both), digits) if measured else "-"

    titles = ("", "seconds", "CPU s", "extra MB", "time / plain", "memory / plain", "opdlab's time / this", "CPU time")
    made = Table(*titles, title=title)
    for peer, measured in rows.items():
        if "skipped" in measured[0]:
            made.add_row(peer, measured[0]["skipped"])
            continue
        extra = [value / MB for value in column(peer, "bytes")]
        made.add_row(
            *(peer, spread(column(peer, "seconds"), 2), spread(column(peer, "cpu_seconds"), 2), spread(extra, 0)),
            *(ratio(peer, "plain", "seconds"), ratio(peer, "plain", "bytes", 3), ratio("opdlab", peer, "seconds")),
            ratio("opdlab", peer, "cpu_seconds"),
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
