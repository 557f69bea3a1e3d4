"""Runs on the toy: on one process, or on two with sharded weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from opdlab.policies import LanguageModel
from opdlab.policies.sharding import local, whole_state
from tests.toy_run import STUDENT, Run

STRATEGY = "model_parallel"
SAVED = "saved.ckpt"


class SaveAt(pl.Callback):
    """Writes a checkpoint after some steps, inside a buffer, which lasts four."""

    def __init__(self, folder: Path, step: int = 2) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / SAVED)


@dataclass(frozen=True)
class Trained:
    """What a process has of a run.

    Args:
        losses: of the steps.
        metrics: the last ones.
        weights: of student and snapshot, whole, in the first process.
        shares: the share of the student's numbers that this process holds.
    """

    losses: list[float]
    metrics: dict[str, float]
    weights: dict[str, Tensor]
    shares: float


def train(rank: int, folder: Path, options: dict[str, Any], steps: int = 6, checkpoint: Path | None = None) -> Trained:
    """Train on the toy: on one process, or with the others of the pair on sharded weights."""
    several = distributed.is_initialized()
    options = dict(options)
    trainer_options = options.pop("trainer", {})
    if "adapter" in options:
        options["student"] = LanguageModel(STUDENT, adapter=options.pop("adapter"))
    made = Run(folder, **options)
    several_options = {"strategy": STRATEGY, "devices": 2} if several else {}
    trainer = made.fit(steps, ckpt_path=checkpoint, **{**several_options, **trainer_options})
    weights = whole_state(made.module, keep=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    whole = sum(weight.numel() for weight in LanguageModel(STUDENT).parameters())
    held = sum(local(weight).numel() for weight in made.module.student.parameters())
    return Trained(made.recorder.losses, metrics, weights, held / whole)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], error: float) -> None:
    """The weights are equal to a part of the norm of each, or exactly for 0."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        if error and weight.is_floating_point():
            assert float((ours[name] - weight).norm()) <= error * float(weight.norm()), name
        else:
            assert torch.equal(ours[name], weight), name
