"""Checkpoints when training stops, by a signal or at the end."""

import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from opdlab.checkpoints import CheckpointFiles
from opdlab.errors import Stopped
from opdlab.processes import STOP_SIGNALS, catching_signals

_SAME_SECONDS = 1.0  # seconds; a scheduler and the process that it watches may both signal the same stop


class StopCheckpoint(Checkpoint):
    """Writes a checkpoint when training stops: after the last step, or on a signal, which finishes the step.

    A checkpoint taken in the middle of a step would hold half an update, and a loader that is one minibatch ahead.
    Signals are Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2; a second one, at least a second later, stops at once,
    without a checkpoint. With several processes Lightning handles all signals except Ctrl-C and exchanges them between
    the processes; under SLURM it handles them and queues the job again. The class is a ``Checkpoint``, so that
    Lightning calls it after all other callbacks; list it after other checkpoints, so that their files exist.

    Args:
        dirpath: folder for ``interrupted.ckpt`` and ``final.ckpt``; ``checkpoints`` in the run's folder by default.
            ``final.ckpt`` is not written if a ``ModelCheckpoint`` has just saved the last step.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        """Path of the last written checkpoint."""
        self._signum: int | None = None
        self._since = 0.0
        self._listening = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written by :class:`opdlab.checkpoints.CheckpointFiles`, unless the user chose a plugin."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers."""
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
        """Save at the last step or after a signal, then stop."""
        if self._signum is not None:
            self._save(trainer, "interrupted.ckpt")
            # Lightning logs the step after this hook, and a stop would skip that.
            trainer._logger_connector.update_train_step_metrics()
            raise Stopped(self._signum)
        # Not in on_train_end: by then Lightning has closed the epoch, and a longer run could not continue inside it.
        if _is_last_step(trainer) and not _just_saved(trainer):
            self._save(trainer, "final.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        trainer.save_checkpoint(folder / name)
        self.path = folder / name

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the signal handlers."""
        self._listening.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
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
