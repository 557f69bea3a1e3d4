"""How a study was made: what it took, on what, and what is missing."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdlab.studies.report.load import FINISHED, Results, Run
from opdlab.studies.report.tables import Table


def facts(results: Results) -> dict[str, str]:
    """Size, time, machine and versions, by name."""
    finished = [run for run in results.runs.values() if run.state == FINISHED]
    seconds = sum(float(run.record.get("seconds") or 0) for run in finished)
    sizes = [f"{name}: {len(b.problems)} problems x {b.num_samples}" for name, b in results.benchmarks.items()]
    found = {
        "base": ", ".join(results.base) or "-",
        "baseline": ", ".join(map(results.label, results.baselines)),
        "seeds": _numbers(results.seeds),
        "budgets, optimizer steps": _numbers(results.budgets),
        "evaluated on": ", ".join(sizes),
        "runs": f"{len(finished)} of {len(results.runs)} finished{_taken_over(finished)}",
        "time": f"{seconds / 3600:.2f} hours in all runs together",
        "machine": _several(finished, "machine"),
        "versions": _several(finished, "versions"),
    }
    if command := _command(results):
        found["command of a run"] = command
    return found


def _taken_over(runs: Sequence[Run]) -> str:
    """Which runs another study has made: what both report, they report of the same samples."""
    folders = [Path(str(run.record["taken_from"])) for run in runs if "taken_from" in run.record]
    studies = Counter(folder.parent.parent.parent.name for folder in folders)  # STUDY/runs/VARIANT/seed-N
    return "".join(f", {number} of them taken over from {study}" for study, number in studies.items())


def _numbers(values: Sequence[int]) -> str:
    """Numbers, written as ranges where three or more follow each other.

    Example:
        >>> _numbers([0, 1, 2, 3, 7, 9])
        '0-3, 7, 9'
    """
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][-1] + 1:
            ranges[-1].append(value)
        else:
            ranges.append([value])
    parts = [[f"{each[0]}-{each[-1]}"] if len(each) > 2 else map(str, each) for each in ranges]
    return ", ".join(text for part in parts for text in part)


def _several(runs: Sequence[Run], key: str) -> str:
    """All the values that runs have, each once."""
    return "; ".join(dict.fromkeys(_text(run.record[key]) for run in runs if run.record.get(key))) or "-"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _command(results: Results) -> str:
    """How the study's baseline's first run was started; the others differ by overrides, seed and folder."""
    command = results.runs[results.baseline, results.finished(results.baseline)[0]].record.get("command")
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command or "")


def variants_table(results: Results) -> Table:
    """Names, labels, what each is compared with, and overrides."""
    rows = [
        (v.label, v.name, results.label(v.baseline) if v.baseline != v.name else "-", " ".join(v.overrides) or "-")
        for v in results.variants
    ]
    return Table(("variant", "folder", "compared with", "overrides"), rows, num_names=4)


def missing_table(results: Results) -> Table | None:
    """Runs that do not count, and why; None where all have finished."""
    lacking = [run for run in results.runs.values() if run.state != FINISHED]
    if not lacking:
        return None
    rows = [(results.label(run.variant), str(run.seed), run.state) for run in lacking]
    return Table(("variant", "seed", "state"), rows, num_names=3)
