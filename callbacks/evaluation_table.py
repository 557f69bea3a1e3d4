"""The table at the end of a run: before, after, teacher."""

from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]


class EvaluationTable(pl.Callback):
    """Remembers the first and the last evaluation of the student, and the teacher's, through resumes too."""

    def __init__(self) -> None:
        self.before: Figures = {}
        self.after: Figures = {}
        self.after_step: int | None = None
        self.teacher: Figures = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the figures of the evaluation that has just ended."""
        if trainer.sanity_checking:
            return
        if teacher := _figures(trainer, "teacher/"):
            self.teacher = teacher
        elif student := _figures(trainer, "val/"):
            self.before = self.before or student
            self.after, self.after_step = student, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints, so that a resumed run still knows where it began."""
        return {"before": self.before, "teacher": self.teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.before, self.teacher = state_dict["before"], state_dict["teacher"]

    def table(self, trained: bool = True) -> Table:
        """The table, one row a figure; without training there is one column for the student."""
        columns = {"before": self.before, "after": self.after, "teacher": self.teacher}
        if not trained:
            columns = {"student": self.after, "teacher": self.teacher}
        shown = {name: figures for name, figures in columns.items() if figures}
        table = Table("figure", *shown)
        for key in self.after:
            table.add_row(key, *(f"{figures[key]:.3f}" if key in figures else "" for figures in shown.values()))
        return table

    def print(self, trained: bool = True) -> None:
        """Print the table, if there was an evaluation."""
        if self.after:
            Console().print(self.table(trained))


def _figures(trainer: pl.Trainer, prefix: str) -> Figures:
    metrics = trainer.callback_metrics
    # With a single benchmark the mean over benchmarks says the same again.
    benchmarks = {key.split("/")[1] for key in metrics if key.startswith(prefix)} - {"mean"}
    return {
        key.removeprefix(prefix): float(value)
        for key, value in metrics.items()
        if key.startswith(prefix) and not (len(benchmarks) == 1 and key.startswith(f"{prefix}mean/"))
    }
