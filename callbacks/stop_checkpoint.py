"""Stopping, by Ctrl-C or at the end, without losing anything."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class StopCheckpoint(Checkpoint):
    """Writes a checkpoint when training stops: after its last step, or on Ctrl-C, which finishes the step under way.

    A checkpoint taken in the middle of a step would hold half an update, and a loader that is one minibatch ahead. A
    second Ctrl-C stops at once, without a checkpoint. A ``Checkpoint``, so that Lightning calls it after all other
    callbacks; put it behind other checkpoints, so that it sees what they have saved.

    Args:
        dirpath: folder for ``interrupted.ckpt`` and ``final.ckpt``; ``checkpoints`` in the run's folder by default.
            ``final.ckpt`` is not written where a ``ModelCheckpoint`` has just saved the last step.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        """The checkpoint that was written, once one was."""
        self._interrupted = False
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for Ctrl-C, from the main thread, where Python delivers it."""
        self._previous = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not the main thread: nobody will press Ctrl-C here
            self._previous = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("\nCtrl-C: finishing this step, then saving a checkpoint (again to stop at once)")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the last step, or if asked to, and then stop."""
        if self._interrupted:
            self._save(trainer, "interrupted.ckpt")
            raise KeyboardInterrupt
        # Not in on_train_end: by then Lightning has closed the epoch, and a longer run would not go on in the middle.
        if _is_last_step(trainer) and not _just_saved(trainer):
            self._save(trainer, "final.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        trainer.save_checkpoint(folder / name)
        self.path = folder / name

    def _stop_listening(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._stop_listening()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._stop_listening()


def _is_last_step(trainer: pl.Trainer) -> bool:
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _just_saved(trainer: pl.Trainer) -> bool:
    return any(
        isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved == trainer.global_step
        for callback in trainer.checkpoint_callbacks
    )
