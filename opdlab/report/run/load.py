"""What a report reads of a run's folder. Nothing that a configuration names is imported."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opdlab.checkpoint_choice import best_step
from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX, SHOWN, TEACHER, Figures, figures_of
from opdlab.records import flat
from opdlab.run_folder import HISTOGRAMS, RunFolder, read_config, read_histograms, read_metrics, read_results

_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
_STUDENT = "val/"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run.

    Args:
        name: ``before``, ``best``, ``last``, ``teacher`` or ``teacher-NAME``.
        step: optimizer steps taken.
        figures: by benchmark and metric, with standard errors.
    """

    name: str
    step: int
    figures: Figures

    @property
    def shown(self) -> list[str]:
        """Return the names of the most important metrics."""
        return [
            name
            for name in self.figures
            if not name.endswith(ERROR_SUFFIX) and any(fnmatch(name.partition("/")[2], each) for each in SHOWN)
        ]

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Return the ends of the 95% interval of a metric over problems; None if its error is not known.

        Those of rates are cut at 0 and 1.
        """
        error = self.figures.get(name + ERROR_SUFFIX)
        if error is None:
            return None
        low, high = self.figures[name] - 1.96 * error, self.figures[name] + 1.96 * error
        is_rate = name.partition("/")[2].startswith(("pass@", "maj@", "truncated"))
        return (max(low, 0.0), min(high, 1.0)) if is_rate else (low, high)


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        name: differs between the runs of a report.
        folder: of the run.
        config: the configuration by dotted key.
        text: ``config.yaml``.
        results: ``results.json``; empty for a run that a kill has ended.
        metrics: of each logged step by name.
        histograms: of each monitored step by tag.
        rollouts: step of the last page of rollouts, and what it shows.
    """

    name: str
    folder: RunFolder
    config: Mapping[str, Any]
    text: str
    results: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, float]]
    histograms: Mapping[int, Mapping[str, Any]]
    rollouts: tuple[int, Sequence[Mapping[str, Any]]] | None

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations before training, the best and the last one, and those of teachers."""
        students = {step: figures for step, row in self.metrics.items() if (figures := figures_of(row, _STUDENT))}
        found = []
        if 0 in students:
            found.append(Evaluation("before", 0, students[0]))
        monitor, mode = self.config.get("checkpoint.monitor"), self.config.get("checkpoint.mode")
        if monitor is not None and mode in ("max", "min"):
            scores = {step: self.metrics[step][monitor] for step in students if step and monitor in self.metrics[step]}
            if (step := best_step(scores, mode)) is not None:
                found.append(Evaluation("best", step, students[step]))
        if students and (last := max(students)):
            found.append(Evaluation("last", last, students[last]))
        teachers = {}
        for step, row in self.metrics.items():
            for prefix in {name.partition("/")[0] for name in row if name.startswith(TEACHER)}:
                teachers[prefix] = Evaluation(prefix, step, figures_of(row, f"{prefix}/"))
        return [*found, *(teachers[name] for name in sorted(teachers))]


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of folders.

    Raises:
        UsageError: a folder is not a run's, or a file in it is damaged.
    """
    paths = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]  # each run once
    resolved = [path.resolve() for path in paths]
    root = Path(os.path.commonpath(resolved)) if len(resolved) > 1 else resolved[0].parent.parent
    return [
        _load_run(RunFolder.open(path), str(full.relative_to(root))) for path, full in zip(paths, resolved, strict=True)
    ]


def _load_run(folder: RunFolder, name: str) -> Run:
    config = read_config(folder.config)
    return Run(
        name if name != "." else folder.path.resolve().name,
        folder,
        flat(config),
        folder.config.read_text(encoding="utf-8"),
        read_results(folder.results),
        read_metrics(folder.metrics),
        read_histograms(folder.path / HISTOGRAMS),
        _last_rollouts(folder.path / "rollouts"),
    )


def _last_rollouts(folder: Path) -> tuple[int, Sequence[Mapping[str, Any]]] | None:
    """Return step and rollouts of the last page of rollouts; None without a page that can be read."""
    pages = sorted(
        (int(match[1]), path)
        for path in folder.glob("*.html")
        if (match := re.fullmatch(r"step-(\d+)\.html", path.name))
    )
    for step, path in reversed(pages):
        found = _DATA.search(path.read_text(encoding="utf-8", errors="replace"))
        try:
            rollouts = [each for each in json.loads(found[1])["rollouts"] if isinstance(each, dict)] if found else []
        except (ValueError, KeyError, TypeError):
            continue
        if rollouts:
            return step, rollouts
    return None
