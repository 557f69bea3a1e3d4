"""Ctrl-C without losing anything."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info


class InterruptCheckpoint(Checkpoint):
    """On Ctrl-C, finishes the step that is under way, writes a checkpoint, and stops.

    A checkpoint taken in the middle of a step would hold half an update, and a loader that is one minibatch ahead. A
    second Ctrl-C stops at once, without a checkpoint. A ``Checkpoint``, so that Lightning calls it after all other
    callbacks.

    Args:
        dirpath: folder for ``interrupted.ckpt``; ``checkpoints`` in the run's folder by default.
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
        """Save and stop, if asked to."""
        if self._interrupted:
            folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
            path = folder / "interrupted.ckpt"
            trainer.save_checkpoint(path)
            self.path = path
            raise KeyboardInterrupt

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
