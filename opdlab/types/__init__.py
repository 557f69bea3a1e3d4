"""The data types that the rooms of the package pass to each other: shapes, units, and an example of each.

Nothing here computes or loads anything. A problem becomes a prompt, the behavior policy answers it with rollouts, the
teacher adds targets, and a minibatch of both is what a training step gets.
"""

from opdlab.types.problems import EvaluationBatch, Problem, Prompt, Verdicts
from opdlab.types.rollouts import Minibatch, Rollouts, StopReason, Targets, TeacherRequest, id_dtype, trimmed

__all__ = [
    "EvaluationBatch",
    "Minibatch",
    "Problem",
    "Prompt",
    "Rollouts",
    "StopReason",
    "Targets",
    "TeacherRequest",
    "Verdicts",
    "id_dtype",
    "trimmed",
]
