"""The table at the end of a run: before, after, teacher."""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import lightning.pytorch as pl
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX, MEAN

TEACHER = "teacher"
"""Prefix of the teacher's metrics, and with ``-NAME`` of each teacher's, if there are several."""
Figures = dict[str, float]
# The most important metrics. avg@n is pass@1, and the others are in the log and in results.json.
_SHOWN = ("pass@*", "maj@*", "truncated", "length", "reverse_kl")


class EvaluationTable(pl.Callback):
    """Table of the first and the last evaluation of the student, and of each teacher's; it survives resumes.

    Args:
        shown: patterns, as for file names, of the metrics that get a row for each benchmark.
    """

    def __init__(self, shown: tuple[str, ...] = _SHOWN) -> None:
        self.shown = shown
        self.before: Figures = {}
        self.after: Figures = {}
        self.after_step: int | None = None
        self.teachers: dict[str, Figures] = {}
        """Metrics of each teacher by its prefix in the log, ``teacher`` or ``teacher-NAME``."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the metrics of the evaluation that has just ended."""
        if trainer.sanity_checking:
            return
        prefixes = {key.partition("/")[0] for key in trainer.callback_metrics}
        if teacher := next((each for each in prefixes if each == TEACHER or each.startswith(f"{TEACHER}-")), None):
            self.teachers[teacher] = _figures(trainer, f"{teacher}/")
        elif student := _figures(trainer, "val/"):
            self.before = self.before or student
            self.after, self.after_step = student, trainer.global_step

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the metrics of a test like those of a validation."""
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored metrics, so that a resumed run still has its first evaluation."""
        return {"before": self.before, "teachers": self.teachers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the metrics that :meth:`state_dict` returned."""
        self.before = state_dict["before"]
        older = {TEACHER: figures} if (figures := state_dict.get(TEACHER)) else {}  # checkpoints of one teacher
        self.teachers = state_dict.get("teachers", older)

    def cells(self, trained: bool = True) -> dict[str, dict[str, str]]:
        """Return the cells of the table, by column and metric: each value ± its standard error.

        Args:
            trained: True if the run has trained; otherwise there is one column for the student.
        """
        students = {"before": self.before, "after": self.after} if trained else {"student": self.after}
        columns = {**students, **self.teachers}
        keys = [
            key
            for key in self.after
            if any(fnmatch(key.partition("/")[2], pattern) for pattern in self.shown) and not _is_error(key)
        ]
        return {name: {key: _cell(figures, key) for key in keys} for name, figures in columns.items() if figures}

    def tables(self, width: int, trained: bool = True) -> list[Table]:
        """Return the table, one row per metric; see :meth:`cells`.

        Columns that do not fit beside each other are in a further table, so that no cell is cut.

        Args:
            width: of the console, characters.
            trained: see :meth:`cells`.
        """
        groups: list[list[str]] = []
        free = 0  # characters left in the last table
        columns = self.cells(trained)
        metrics = list(next(iter(columns.values()), {}))
        for name, cells in columns.items():
            wide = _width([name, *cells.values()])
            if not groups or free < wide:
                groups, free = [*groups, []], width - 1 - _width(["metric", *metrics])
            groups[-1].append(name)
            free -= wide
        made = []
        for names in groups:
            made.append(Table("metric", *names))
            for key in metrics:
                made[-1].add_row(key, *(columns[name][key] for name in names))
        return made

    def print(self, trained: bool = True) -> None:
        """Print the table, if there was an evaluation."""
        if self.after:
            console = Console()
            for table in self.tables(console.width, trained):
                console.print(table)


def _width(cells: Iterable[str]) -> int:
    """Return the characters that a column takes, with the space beside it and one line."""
    return max(map(cell_len, cells)) + 3


def _is_error(key: str) -> bool:
    return key.endswith(ERROR_SUFFIX)


def _cell(figures: Figures, key: str) -> str:
    if key not in figures:
        return ""
    decimals = 1 if key.endswith("/length") else 3
    error = figures.get(key + ERROR_SUFFIX)
    return f"{figures[key]:.{decimals}f}" + ("" if error is None else f" ± {error:.{decimals}f}")


def _figures(trainer: pl.Trainer, prefix: str) -> Figures:
    metrics = trainer.callback_metrics
    # With a single benchmark the mean over benchmarks is the same number.
    benchmarks = {key.split("/")[1] for key in metrics if key.startswith(prefix)} - {MEAN}
    return {
        key.removeprefix(prefix): float(value)
        for key, value in metrics.items()
        if key.startswith(prefix) and not (len(benchmarks) == 1 and key.startswith(f"{prefix}{MEAN}/"))
    }
