"""Objectives: the loss of each position of a rollout. The formulas are in :mod:`opdlab.objectives.functional`."""

from opdlab.objectives.base import (
    Objective,
    PositionLosses,
    Reduction,
    build_objective,
    loss_shares,
    objective_names,
    objective_registry,
    reduce_losses,
    register_objective,
)
from opdlab.objectives.full_divergence import FullDivergence
from opdlab.objectives.sampled_token import SampledTokenOPD
from opdlab.objectives.support_divergence import SupportDivergence
from opdlab.objectives.teacher_topk import TeacherTopK

__all__ = [
    "FullDivergence",
    "Objective",
    "PositionLosses",
    "Reduction",
    "SampledTokenOPD",
    "SupportDivergence",
    "TeacherTopK",
    "build_objective",
    "loss_shares",
    "objective_names",
    "objective_registry",
    "reduce_losses",
    "register_objective",
]
