"""Effect of a bound on the tokens of a pass: peak memory and time of an update, against no bound.

The update is that of ``scaling.py`` on 32 rollouts of 32 to 4096 tokens, most of them short: forward
pass, objective, gate, loss, backward pass. ``one padded pass`` is a batch without groups of similar length.
Every measurement has a process of its own; memory is the peak of the resident set minus its size before. Ratios
are taken within a round, to the groups without a bound.

``python benchmarks/padding.py --json padding.json``
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import machine, median, pairwise_ratios, run_child, spread, versions
from rich.console import Console
from rich.table import Table

NO_GROUPS, NO_BOUND = "one padded pass", "no bound"
BUDGETS = [16_384, 8192, 4096]
LONGEST, SHORTEST, ROLLOUTS = 4096, 32, 32


def lengths() -> list[int]:
    """Return lengths evenly spaced on a logarithmic scale."""
    steps = ROLLOUTS - 1
    return [round(SHORTEST * (LONGEST / SHORTEST) ** (row / steps)) for row in range(ROLLOUTS)]


def measure(case: str) -> dict[str, float]:
    """Measure seconds and bytes of one update; this is the child."""
    import torch
    from scaling import Size, Updates

    updates = Updates(Size(batch=ROLLOUTS, length=LONGEST, vocabulary=4096))
    updates.student.group_lengths = case != NO_GROUPS
    updates.student.max_tokens = int(case) if case.isdigit() else None
    updates.run(1, 16)  # warm up threads and gradient buffers
    return updates.run(ROLLOUTS, LONGEST, torch.tensor(lengths()))


def main() -> int:
    """Measure every budget round by round and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="tokens")
    parser.add_argument("--rounds", type=int, default=3, help="each takes about two minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-one-pass", action="store_true", help="leave out the one that takes the most memory")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return 0
    cases = [NO_BOUND, *map(str, arguments.budgets)] + ([] if arguments.without_one_pass else [NO_GROUPS])
    measured: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for case in cases:
            measured[case].append(run_child(Path(__file__), ["--child", case], threads=arguments.threads))
    _print(measured)
    if arguments.json:
        result = {"machine": machine(), "versions": versions("torch", "transformers"), "lengths": lengths()}
        arguments.json.write_text(json.dumps({**result, "measured": measured}, indent=1))
    return 0


def _print(measured: dict[str, list[dict[str, Any]]]) -> None:
    table = Table("tokens at most", "seconds", "time / no bound", "MB", "memory / no bound")
    for case in measured:
        columns = []
        for key, unit in (("seconds", 1), ("bytes", 1e6)):
            ours, theirs = ([r[key] for r in measured[name]] for name in (case, NO_BOUND))
            columns += [f"{median(ours) / unit:.1f}", spread(pairwise_ratios(ours, theirs))]
        table.add_row(case, *columns)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
