"""Stopping, by a signal or at the end, without losing anything."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from opdlab.errors import Stopped
from opdlab.processes import STOP_SIGNALS, catching_signals

_SAME_SECONDS = 1.0  # a scheduler and the process that it watches may both tell of one stop


class StopCheckpoint(Checkpoint):
    """Writes a checkpoint when training stops: after its last step, or on a signal, which finishes the step.

    A checkpoint taken in the middle of a step would hold half an update, and a loader that is one minibatch ahead.
    Signals are Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2; a second one, at least a second later, stops at once,
    without a checkpoint. All but Ctrl-C are left to Lightning where there are several processes, which it tells each
    other, and under SLURM, where it queues the job again. A ``Checkpoint``, so that Lightning calls it after all other
    callbacks; put it behind other checkpoints, so that it sees what they have saved.

    Args:
        dirpath: folder for ``interrupted.ckpt`` and ``final.ckpt``; ``checkpoints`` in the run's folder by default.
            ``final.ckpt`` is not written where a ``ModelCheckpoint`` has just saved the last step.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        """The checkpoint that was written, once one was."""
        self._signum: int | None = None
        self._since = 0.0
        self._listening = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals."""
        alone = trainer.world_size == 1 and not SLURMEnvironment.detect()
        self._listening.enter_context(catching_signals(self._handle, STOP_SIGNALS if alone else (signal.SIGINT,)))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            if time.monotonic() - self._since < _SAME_SECONDS:
                return
            raise Stopped(signum)
        self._since = time.monotonic()
        self._signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        rank_zero_info(f"\n{name}: finishing this step, then saving a checkpoint (again to stop at once)")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the last step, or if asked to, and then stop."""
        if self._signum is not None:
            self._save(trainer, "interrupted.ckpt")
            # Lightning would log the step after this hook, which it now never does.
            trainer._logger_connector.update_train_step_metrics()
            raise Stopped(self._signum)
        # Not in on_train_end: by then Lightning has closed the epoch, and a longer run would not go on in the middle.
        if _is_last_step(trainer) and not _just_saved(trainer):
            self._save(trainer, "final.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        trainer.save_checkpoint(folder / name)
        self.path = folder / name

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._listening.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._listening.close()


def _is_last_step(trainer: pl.Trainer) -> bool:
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _just_saved(trainer: pl.Trainer) -> bool:
    return any(
        isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved == trainer.global_step
        for callback in trainer.checkpoint_callbacks
    )
