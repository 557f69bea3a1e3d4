"""The sizes of the models, said in one line when training starts."""

from collections.abc import Iterable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch.nn import Parameter


class ModelSizes(pl.Callback):
    """Says how many parameters the student has, how many of them are trained, and how many the behavior snapshot has.

    It takes the place of Lightning's table, whose operations (0 without an example input) and counts of modules in
    train and eval mode say nothing here. A summary of another depth or class stays.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say the line."""
        parts = {name: list(getattr(pl_module, name).parameters()) for name in ("student", "behavior")}
        trained = _count(each for each in parts["student"] if each.requires_grad)
        rank_zero_info(
            f"student: {_count(parts['student'])} parameters, {trained} trained; behavior snapshot: "
            f"{_count(parts['behavior'])}"
        )


def replace_summary(trainer: pl.Trainer) -> None:
    """Put :class:`ModelSizes` in the place of Lightning's default summary of a trainer, if it has that."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
    for place, each in enumerate(callbacks):
        # Lightning has added an attribute, `log`, to all callbacks.
        if type(each) in (ModelSummary, RichModelSummary) and vars(each).items() >= vars(type(each)()).items():
            callbacks[place] = ModelSizes()


def _count(parameters: Iterable[Parameter]) -> str:
    return get_human_readable_count(sum(each.numel() for each in parameters)).strip()
