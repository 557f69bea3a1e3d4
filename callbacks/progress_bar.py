"""Bars with rates for sampling, scoring and training, and a line with the last step's metrics."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import ProgressColumn, Task
from rich.text import Text

from opdlab.diagnostics.metric_table import progress_items, progress_names
from opdlab.diagnostics.trace import to_host

# Their handlers keep the standard error stream from the import of Lightning.
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


class SummaryLine:
    """One line of items; if the terminal is too narrow, the last ones are left out.

    Example:
        >>> line = SummaryLine()
        >>> line.items = ["loss 0.0123", "ESS 0.98", "age 3"]
        >>> Console(width=30).print(line)
        loss 0.0123 · ESS 0.98 · age 3
        >>> Console(width=29).print(line)
        loss 0.0123 · ESS 0.98
    """

    def __init__(self) -> None:
        self.items: Sequence[str] = ()
        self.note = ""  # before the items; cut if it does not fit

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the line; nothing if it has no item."""
        items = [self.note, *self.items] if self.note else list(self.items)  # another thread renders it
        while len(items) > bool(self.note) and cell_len(" · ".join(items)) > options.max_width:
            items.pop()
        if items:
            yield Text(" · ".join(items), no_wrap=True, overflow="ellipsis")


class RateColumn(ProgressColumn):
    """Units a second, empty as long as the rate is not known, as after the only batch of an evaluation."""

    def render(self, task: Task) -> Text:
        """Return the text of a bar."""
        return Text(f"{task.speed:.2f}it/s" if task.speed else "")


class LabProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with bars for sampling and scoring a buffer, and a line of metrics below.

    The bar of training counts the optimizer steps of the whole run, also after a resume. The line shows the metrics
    that have an item in the table of metrics (:attr:`opdlab.diagnostics.Metric.progress`), as last logged: loss, drift
    (mean and largest, nats), smallest and largest weight, effective sample size, age of the rollouts (optimizer steps),
    and response tokens trained on per second. With ``trainer.log_every_n_steps`` above 1, drift, weights and age stay
    until the next logged step. Messages appear above the bars. Where the output is not a terminal, all this is printed
    once, at the end.

    Args:
        refresh_rate: batches between updates; 0 shows nothing.
        console_kwargs: for the :class:`rich.console.Console`.
    """

    def __init__(self, refresh_rate: int = 1, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate, console_kwargs=console_kwargs)
        self._line = SummaryLine()
        self._values: dict[str, float] = {}
        self._fetched_at = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the display of another run or stage."""
        super().setup(trainer, pl_module, stage)
        self._line.items, self._values, self._fetched_at = (), {}, -1
        if stage == "fit":
            self._line.note = ""

    # -- metrics -------------------------------------------------------------------------------------------------

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Update the line; return the other values logged with ``prog_bar``, which Lightning shows beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)  # Lightning has copied them to the host
        names = progress_names()
        self._values |= {name: float(value) for name, value in metrics.items() if name in names}  # type: ignore[arg-type]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # set by Lightning's logger connector
        if trainer.global_step != self._fetched_at and every > 0 and trainer.global_step % every == 0:
            self._fetched_at = trainer.global_step
            logged = {name: value for name, value in trainer.callback_metrics.items() if name in names}
            fetched = to_host({name: value for name, value in logged.items() if name not in metrics})
            self._values |= {name: float(value.numpy()) for name, value in fetched.items()}
        self._line.items = progress_items(self._values)
        # The run's number is left out too: Lightning shows only its last four characters.
        return {name: value for name, value in metrics.items() if name not in (*names, "v_num")}

    def note(self, text: str) -> None:
        """Show a text at the beginning of the line, until the next one or the end of the run."""
        self._line.note = text

    # -- the bars ------------------------------------------------------------------------------------------------

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return Lightning's columns, with a rate that is left out as long as it is not known."""
        return [*super().configure_columns(trainer)[:-1], RateColumn()]

    def _init_progress(self, trainer: pl.Trainer) -> None:
        before, standard_error = self.progress, sys.stderr
        super()._init_progress(trainer)
        if self.progress is not None and self.progress is not before:
            # rich documents this method for overriding, but Lightning fixes the class.
            bars = self.progress.get_renderables
            self.progress.get_renderables = lambda: [*bars(), self._line]  # type: ignore[method-assign]
            _redirect_messages(standard_error, sys.stderr)  # to rich's stream, which writes above the bars

    def _stop_progress(self) -> None:
        above_the_bars = sys.stderr
        super()._stop_progress()
        _redirect_messages(above_the_bars, sys.stderr)

    @property
    def total_train_batches(self) -> int | float:
        """Return the optimizer steps of the whole run, instead of the batches in a pass over the prompts."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar before the first buffer is sampled, at the step where a resumed run continues."""
        super().on_train_start(trainer, pl_module)
        if self.is_enabled:
            # Invisible until its position is set.
            self.train_progress_bar_id = self._add_task(self.total_train_batches, self.train_description, visible=False)
            self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the bar: it counts optimizer steps, not passes over the prompts, whose number has no bound."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the optimizer step; Lightning's batch number starts again with each pass over the prompts."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar for a task; see :class:`opdlab.progress.Progress`."""
        progress = self.progress
        if progress is None or self.is_disabled:
            yield lambda num_units: None
            return
        task_id = self._add_task(total, name)
        try:
            yield lambda num_units: progress.update(task_id, advance=num_units)
        finally:
            progress.update(task_id, visible=False)
            self.refresh()


def _redirect_messages(before: TextIO, after: TextIO) -> None:
    for handler in (handler for name in _LOGGERS for handler in logging.getLogger(name).handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)
