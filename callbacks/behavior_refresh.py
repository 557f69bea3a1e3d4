"""Refreshes of the behavior snapshot."""

from typing import Any

import lightning.pytorch as pl

from opdlab.errors import require
from opdlab.module import OPDModule
from opdlab.training.refresh import RefreshSchedule


class BehaviorRefresh(RefreshSchedule):
    """Copies the student to the behavior snapshot after optimizer steps K, 2K, ….

    The loader fetches the next minibatch only after this hook, so a buffer that begins at step K is sampled from the
    refreshed snapshot. With accumulation there is one refresh, after the optimizer has stepped. Where this callback is
    present, nothing else refreshes the snapshot; without it, the module does so before each buffer is sampled.

    Args:
        every_n_steps: K, optimizer steps between refreshes, at least 1.

    Raises:
        UsageError: K is below 1.

    Example:
        >>> BehaviorRefresh(every_n_steps=4).every_n_steps
        4
    """

    def __init__(self, every_n_steps: int = 4) -> None:
        require(every_n_steps >= 1, f"every_n_steps is {every_n_steps}, but must be at least 1")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    @property
    def schedule(self) -> str:
        """Return the line's words, see :class:`opdlab.training.refresh.RefreshSchedule`."""
        return f"after every {self.every_n_steps} optimizer steps"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refresh the snapshot, in case the student was changed after it was built."""
        assert isinstance(pl_module, OPDModule)
        self._last_step = trainer.global_step
        if trainer.global_step == 0:
            pl_module.behavior.refresh(pl_module.student, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the snapshot if the optimizer has just taken a K-th step."""
        assert isinstance(pl_module, OPDModule)
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if stepped and trainer.global_step % self.every_n_steps == 0:
            pl_module.behavior.refresh(pl_module.student, trainer.global_step)
