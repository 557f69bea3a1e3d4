"""How far a run is, for whoever watches the study."""

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from opdlab.records import read_json, write_json
from opdlab.studies.schema import PROGRESS

_SECONDS = 1.0  # between writes: steps may be much shorter


class StepFile(Callback):
    """Writes the optimizer step and the seconds that a run has taken, all its attempts together, to ``progress.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / PROGRESS
        self._began = time.monotonic()
        self._earlier = float(read_json(self.path).get("seconds", 0.0))
        self._written = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Write, if the last time was a while ago or training ends."""
        now = time.monotonic()
        if trainer.is_global_zero and (now - self._written >= _SECONDS or trainer.global_step >= trainer.max_steps):
            self._written = now
            write_json(self.path, {"step": trainer.global_step, "seconds": self._earlier + now - self._began})
