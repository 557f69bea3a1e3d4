"""Progress of a run, for the table of the study."""

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from opdlab.studies.schema import StudyRun

_SECONDS = 1.0  # seconds between writes, because steps may be much shorter


class StepFile(Callback):
    """Writes the optimizer step and the seconds of all attempts of a run to ``progress.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = StudyRun(Path(folder), ())
        self._began = time.monotonic() - self._folder.seconds
        self._written = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Write the progress if the last write was long enough ago, or if training ends."""
        now = time.monotonic()
        if trainer.is_global_zero and (now - self._written >= _SECONDS or trainer.global_step >= trainer.max_steps):
            self._written = now
            self._folder.write_progress(trainer.global_step, now - self._began)
