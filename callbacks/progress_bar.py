"""Bars with rates for sampling, scoring and training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from opdlab.module import OPDModule


class LabProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with further bars for sampling and scoring a pool.

    Args:
        refresh_rate: batches between updates; 0 shows nothing.
        leave: leave a finished bar standing.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the module report here."""
        super().setup(trainer, pl_module, stage)
        if isinstance(pl_module, OPDModule):
            pl_module.progress = self

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Leave out the run's number, of which Lightning shows the last four characters."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"  # a pass over the prompts is no unit of interest, and the number of them has no bound

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`."""
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
