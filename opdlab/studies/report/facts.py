"""Facts of a study: size, time, machine, versions, and missing runs."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlab.studies.report.load import Results
from opdlab.studies.report.tables import Table
from opdlab.studies.schema import FINISHED, Record


def facts(results: Results) -> dict[str, str]:
    """Return size, time, machine and versions, by name."""
    finished = [run for run in results.runs.values() if run.state == FINISHED]
    seconds = sum(run.seconds for run in finished)
    sizes = [f"{name}: {len(b.problems)} problems x {b.num_samples}" for name, b in results.benchmarks.items()]
    found = {
        "base": ", ".join(results.study.base),
        "baseline": ", ".join(map(results.label, results.baselines)),
        "seeds": _numbers(results.study.seeds),
        "budgets, optimizer steps": _numbers(results.budgets),
        "evaluated on": ", ".join(sizes),
        "runs": f"{len(finished)} of {len(results.runs)} finished{_taken_over(finished)}",
        "time": f"{seconds / 3600:.2f} hours in all runs together",
        "machine": _several([run.machine for run in finished]),
        "versions": _several([run.versions for run in finished]),
    }
    # The command of the baseline's first run; the others differ by overrides, seed and folder.
    first = results.runs[results.study.baseline, results.finished(results.study.baseline)[0]]
    return found | ({"command of a run": shlex.join(first.command)} if first.command else {})


def _taken_over(runs: Sequence[Record]) -> str:
    """Return the number of runs copied from each other study: reports that share runs share their samples."""
    folders = [Path(run.taken_from) for run in runs if run.taken_from]
    studies = Counter(folder.parent.parent.parent.name for folder in folders)  # STUDY/runs/VARIANT/seed-N
    return "".join(f", {number} of them taken over from {study}" for study, number in studies.items())


def _numbers(values: Sequence[int]) -> str:
    """Return numbers as text, with ranges for three or more consecutive ones.

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


def _several(values: Sequence[Mapping[str, Any]]) -> str:
    """Return the distinct values of all runs."""
    texts = (", ".join(f"{key} {part}" for key, part in value.items()) for value in values)
    return "; ".join(dict.fromkeys(filter(None, texts))) or "-"


def variants_table(results: Results) -> Table:
    """Return the table of variants: names, labels, baselines, and overrides."""
    rows = []
    for each in results.study.variants:
        base = results.baseline_of(each.name)
        other = results.label(base) if base != each.name else "-"
        rows.append((results.label(each.name), each.name, other, " ".join(each.overrides) or "-"))
    return Table(("variant", "folder", "compared with", "overrides"), rows, num_names=4)


def missing_table(results: Results) -> Table | None:
    """Return the table of runs that do not count, with reasons; None if all have finished."""
    rows = [(results.label(run.variant), str(run.seed), run.state) for run in results.lacking]
    return Table(("variant", "seed", "state"), rows, num_names=3) if rows else None
