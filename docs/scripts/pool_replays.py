"""Change of the cosine with the fresh gradient under each gate, over the replays of several runs.

``python docs/scripts/pool_replays.py RUN...`` reads ``RUN/replay/replay.csv`` of each, as ``opdlab replay RUN`` writes
it, and prints a Markdown table: mean over runs of a run's mean over its stale steps, ± standard error over runs. Steps
of one run share a student, so that runs are what is counted.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

GATE = ("gate", "statistic", "normalization", "tau")
FIGURES = {
    "effective_sample_size": "effective sample size",
    "ungated_norm_ratio": "norm / ungated",
    "fresh_change": "change",
}
Means = dict[tuple[str, ...], dict[str, float]]


def run_means(lines: Iterable[dict[str, str]]) -> Means:
    """Mean over the steps of a run whose rollouts are stale, for each gate.

    Example:
        >>> line = {"gate": "span", "statistic": "max", "normalization": "mean", "tau": "1.0", "fresh_cosine": "0.5"}
        >>> line |= {"effective_sample_size": "0.9", "ungated_norm_ratio": "1.5", "fresh_ceiling": "0.8", "age": "7.0"}
        >>> found = run_means([line | {"fresh_change": "0.1"}, line | {"fresh_change": "0.3"}])
        >>> [round(value, 3) for value in found["span", "max", "mean", "1"].values()]
        [0.9, 1.5, 0.2, 0.5, 0.8]
    """
    rows: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    names = [*FIGURES, "fresh_cosine", "fresh_ceiling"]
    for line in (line for line in lines if float(line["age"]) > 0):
        tau = f"{float(line['tau']):g}" if line["tau"] else ""
        rows[line["gate"], line["statistic"], line["normalization"], tau].append([float(line[name]) for name in names])
    return {gate: dict(zip(names, np.mean(found, axis=0).tolist(), strict=True)) for gate, found in rows.items()}


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error.

    Example:
        >>> spread([0.1, 0.3]), spread([0.1])
        ('+0.200 ± 0.100', '+0.100')
    """
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):+.3f}{error}"


def table(runs: Sequence[Means]) -> str:
    """A row for each gate that all runs have."""
    ungated = [run["none", "", "", ""] for run in runs]
    cosine, ceiling = (np.mean([run[name] for run in ungated]) for name in ("fresh_cosine", "fresh_ceiling"))
    lines = [f"{len(runs)} runs; cosine with the fresh gradient without a gate {cosine:.3f}, ceiling {ceiling:.3f}", ""]
    lines += [f"| {' | '.join((*GATE, *FIGURES.values()))} |", f"|{'---|' * 4}{'--:|' * len(FIGURES)}"]
    for gate in (gate for gate in runs[0] if gate[0] != "none" and all(gate in run for run in runs)):
        size, norm = (f"{np.mean([run[gate][name] for run in runs]):.2f}" for name in list(FIGURES)[:2])
        change = spread([run[gate]["fresh_change"] for run in runs])
        lines.append(f"| {' | '.join([*(part or '-' for part in gate), size, norm, change])} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    runs = []
    for run in parser.parse_args().runs:
        with (run / "replay" / "replay.csv").open(newline="") as file:
            runs.append(run_means(csv.DictReader(file)))
    print(table(runs))


if __name__ == "__main__":
    main()
