"""Time of verifying answers; hostile answers must not exceed their time limit.

- real gold answers, each as the answer to its own problem and to the next one's: time per answer, throughput, mistakes;
- plain integers: the overhead of messages between the processes;
- hostile answers one by one: the time of each, and whether the processes judge correctly afterwards.

``python benchmarks/verifier.py --json verifier.json`` ends with 1 if a gold answer does not equal itself, a hostile one
is judged correct or exceeds its time, or the processes judge wrongly afterwards.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import REPOSITORY, machine, versions
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(REPOSITORY))

from opdlab.verifiers import MathVerifier
from opdlab.verifiers.math.judging import judge
from tests.verifiers.hostile_answers import HOSTILE_ANSWERS

SETS = ("aime24", "aime25", "amc23", "math500", "gsm8k_test", "dapo_math_17k")
HONEST = ([r"\boxed{\frac{2}{4}}", r"\boxed{2}", r"\boxed{x^2 - 1}"], ["0.5", "1", "(x+1)(x-1)"], [True, False, True])
# Seconds beyond an answer's time limit: messages, and a new fork on a busy machine.
SLACK = 0.5


def main() -> int:
    """Measure, print, and return 0 if all checks hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data", help="folder of JSONL sets")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--time-limit", type=float, default=1.0, help="seconds for one answer")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    console = Console()
    verifier = MathVerifier(num_workers=arguments.workers, time_limit=arguments.time_limit)
    start = _seconds(lambda: verifier.verify(*HONEST[:2]))
    console.print(f"first verdict, with the start of the processes: {start:.2f} s")
    sets = [row for name in SETS if (row := measure_set(arguments.data / f"{name}.jsonl", verifier)) is not None]
    if not sets:
        console.print(f"no sets in {arguments.data}: give their folder with --data")
    messages = measure_messages(arguments.time_limit)
    hostile = measure_hostile(verifier)
    healthy = is_healthy(verifier)
    _print(console, sets, messages, hostile, healthy, arguments.time_limit)
    result = {
        "machine": machine(),
        "versions": versions("math-verify", "sympy", "latex2sympy2-extended"),
        "options": {"workers": arguments.workers, "time_limit": arguments.time_limit},
        "first_verdict_seconds": start,
        "sets": sets,
        "messages": messages,
        "hostile": hostile,
        "healthy_afterwards": healthy,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    late = any(row["correct"] or row["seconds"] > arguments.time_limit + SLACK for row in hostile)
    return int(late or not healthy or any(row["not_equal_to_themselves"] for row in sets))


def measure_set(path: Path, verifier: MathVerifier) -> dict[str, Any] | None:
    """Measure each gold answer against itself and against the next problem's; return None if the file is missing."""
    if not path.exists():
        return None
    golds = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    responses = [f"Adding up, we find $\\boxed{{{gold}}}$." for gold in golds]
    own, own_seconds = _timed(verifier, responses, golds)
    shifted = golds[1:] + golds[:1]
    other, other_seconds = _timed(verifier, responses, shifted)
    distinct = len(set(golds)) + len(set(zip(golds, shifted, strict=True)))
    seconds = own_seconds + other_seconds
    return {
        "set": path.stem,
        "golds": len(golds),
        "not_equal_to_themselves": [g for g, correct in zip(golds, own, strict=True) if not correct],
        "equal_to_the_next": [
            [a, b] for a, b, correct in zip(golds, shifted, other, strict=True) if correct and a != b
        ],
        "judged": distinct,
        "seconds": seconds,
        "answers_per_second": 2 * len(golds) / seconds,
        "milliseconds_per_judgement": 1000 * seconds * verifier.num_workers / distinct,
    }


def measure_messages(time_limit: float, count: int = 4000) -> dict[str, float]:
    """Return seconds per plain integer in this process, and through one worker."""
    answers = [str(n) for n in range(count)]
    here = _seconds(lambda: [judge([answer], answer, boxed=True) for answer in answers])
    verifier = MathVerifier(num_workers=1, time_limit=time_limit)
    verifier.verify(*HONEST[:2])
    there = _seconds(lambda: verifier.verify([f"\\boxed{{{answer}}}" for answer in answers], answers))
    return {"judging_microseconds": 1e6 * here / count, "through_a_worker_microseconds": 1e6 * there / count}


def measure_hostile(verifier: MathVerifier) -> list[dict[str, Any]]:
    """Return time and verdict of each hostile answer."""
    rows = []
    for name, answer in HOSTILE_ANSWERS.items():
        started = time.perf_counter()
        (verdict,) = verifier.verify([answer], ["1"])
        seconds = time.perf_counter() - started
        rows.append({"name": name, "seconds": seconds, "correct": verdict.correct, "reason": verdict.reason})
    return rows


def is_healthy(verifier: MathVerifier) -> bool:
    """True if every worker judges honest answers correctly."""
    responses, golds, expected = HONEST
    # Distinct answers, because equal ones are judged only once.
    many = [response.replace("}", " " * n + "}", 1) for n in range(8) for response in responses]
    return [v.correct for v in verifier.verify(many, golds * 8)] == expected * 8


def _timed(verifier: MathVerifier, responses: Sequence[str], golds: Sequence[str]) -> tuple[list[bool], float]:
    started = time.perf_counter()
    verdicts = verifier.verify(responses, golds)
    return [verdict.correct for verdict in verdicts], time.perf_counter() - started


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _print(
    console: Console,
    sets: list[dict[str, Any]],
    messages: dict[str, float],
    hostile: list[dict[str, Any]],
    healthy: bool,
    time_limit: float,
) -> None:
    table = Table("set", "golds", "not own equal", "next's equal", "answers/s", "ms per judgement")
    for row in sets:
        wrong, fooled = len(row["not_equal_to_themselves"]), len(row["equal_to_the_next"])
        figures = f"{row['answers_per_second']:.0f}", f"{row['milliseconds_per_judgement']:.2f}"
        table.add_row(row["set"], str(row["golds"]), str(wrong), str(fooled), *figures)
    if sets:
        console.print(table)
    console.print(
        f"a plain integer: {messages['judging_microseconds']:.0f} us in this process, "
        f"{messages['through_a_worker_microseconds']:.0f} us through a worker"
    )
    table = Table("hostile answer", "seconds", "verdict")
    for row in hostile:
        late = " (late)" if row["seconds"] > time_limit + SLACK else ""
        table.add_row(row["name"], f"{row['seconds']:.2f}{late}", "RIGHT" if row["correct"] else row["reason"])
    console.print(table)
    slowest = max(row["seconds"] for row in hostile)
    console.print(f"{len(hostile)} hostile answers, limit {time_limit} s, slowest {slowest:.2f} s")
    console.print("honest answers afterwards: " + ("judged rightly" if healthy else "JUDGED WRONGLY"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
