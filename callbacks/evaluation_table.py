"""The table at the end of a run: before, after, teacher."""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import lightning.pytorch as pl
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from opdlab.callbacks.run_checkpoint import RunCheckpoint
from opdlab.checkpoint_choice import best_step
from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX, SHOWN, TEACHER, Figures, figures_of


class EvaluationTable(pl.Callback):
    """Table of the first and the last evaluation of the student, and of each teacher's; it survives resumes.

    With ``checkpoint.monitor`` it has the best evaluation of a checkpoint too.

    Args:
        shown: patterns, as for file names, of the metrics that get a row for each benchmark.
    """

    def __init__(self, shown: tuple[str, ...] = SHOWN) -> None:
        self.shown = shown
        self.before: Figures = {}
        self.after: Figures = {}
        self.after_step: int | None = None
        self.is_new = False
        """True if ``after`` was measured since the run has begun or gone on, and does not come from a checkpoint."""
        self.best: Figures = {}
        self.best_step: int | None = None
        self._best_score = 0.0
        self.teachers: dict[str, Figures] = {}
        """Metrics of each teacher by its prefix in the log, ``teacher`` or ``teacher-NAME``."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the metrics of the evaluation that has just ended."""
        if trainer.sanity_checking:
            return
        prefixes = {key.partition("/")[0] for key in trainer.callback_metrics}
        if teacher := next((each for each in prefixes if each == TEACHER or each.startswith(f"{TEACHER}-")), None):
            self.teachers[teacher] = figures_of(trainer.callback_metrics, f"{teacher}/")
        elif student := figures_of(trainer.callback_metrics, "val/"):
            self.before = self.before or student
            self.after, self.after_step, self.is_new = student, trainer.global_step, True
            self._note_best(trainer)

    def _note_best(self, trainer: pl.Trainer) -> None:
        """Store the last evaluation as the best one if it is; the untrained student has no checkpoint."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        for each in callbacks:
            if not isinstance(each, RunCheckpoint) or each.metric not in trainer.callback_metrics:
                continue
            assert each.metric is not None
            assert each.direction is not None
            step, score = trainer.global_step, float(trainer.callback_metrics[each.metric])
            known = {} if self.best_step is None else {self.best_step: self._best_score}
            if step and best_step({**known, step: score}, each.direction) == step:
                self.best, self.best_step, self._best_score = self.after, step, score

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the metrics of a test like those of a validation."""
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the stored metrics, so that a resumed run has its first evaluation, and its last until the next."""
        best = {"best": self.best, "best_step": self.best_step, "best_score": self._best_score}
        last = {"after": self.after, "after_step": self.after_step}
        return {"before": self.before, "teachers": self.teachers, **last, **best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the metrics that :meth:`state_dict` returned."""
        self.before = state_dict["before"]
        older = {TEACHER: figures} if (figures := state_dict.get(TEACHER)) else {}  # checkpoints of one teacher
        self.teachers = state_dict.get("teachers", older)
        self.after, self.after_step = state_dict.get("after", {}), state_dict.get("after_step")
        self.best, self.best_step = state_dict.get("best", {}), state_dict.get("best_step")
        self._best_score = state_dict.get("best_score", 0.0)

    def cells(self, trained: bool = True, last: bool = True) -> dict[str, dict[str, str]]:
        """Return the cells of the table, by column and metric: each value ± its standard error.

        Args:
            trained: True if the run has trained; otherwise there is one column for the student.
            last: with the last evaluation.
        """
        students = {"student": self.after}
        if trained:
            after = "after" if self.best_step is None else f"last (step {self.after_step})"
            best = {} if self.best_step is None else {f"best (step {self.best_step})": self.best}
            students = {"before": self.before, **best, **({after: self.after} if last else {})}
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
