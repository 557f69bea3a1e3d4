"""Objectives: the loss of each position of a rollout. The formulas are in :mod:`opdlab.objectives.functional`."""

from opdlab.objectives.base import Objective, PositionLosses, Reduction, loss_shares, reduce_losses, register_objective
from opdlab.objectives.sampled_token import SampledTokenOPD
from opdlab.objectives.teacher_topk import TeacherTopK

__all__ = [
    "Objective",
    "PositionLosses",
    "Reduction",
    "SampledTokenOPD",
    "TeacherTopK",
    "loss_shares",
    "reduce_losses",
    "register_objective",
]
