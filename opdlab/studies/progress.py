"""How far a run is, for whoever watches the study."""

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from opdlab.studies.schema import RunFolder

_SECONDS = 1.0  # between writes: steps may be much shorter


class StepFile(Callback):
    """Writes the optimizer step and the seconds that a run has taken, all its attempts together, to ``progress.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = RunFolder(Path(folder), ())
        self._began = time.monotonic() - self._folder.seconds
        self._written = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Write, if the last time was a while ago or training ends."""
        now = time.monotonic()
        if trainer.is_global_zero and (now - self._written >= _SECONDS or trainer.global_step >= trainer.max_steps):
            self._written = now
            self._folder.write_progress(trainer.global_step, now - self._began)
