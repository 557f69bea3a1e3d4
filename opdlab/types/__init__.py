"""The data types that the modules of the package exchange: shapes, units, and an example of each.

This package does not compute or load anything. A problem becomes a prompt, the behavior policy samples rollouts for it,
the teacher adds targets, and a training step receives a minibatch of both.
"""

from opdlab.types.minibatch import Minibatch, trimmed
from opdlab.types.problems import EvaluationBatch, Message, Part, Problem, Prompt, Verdicts, prompts_at
from opdlab.types.rollouts import Rollouts, StopReason, left_padded
from opdlab.types.targets import MergedTargets, Targets, TeacherRequest, assign_rows, id_dtype

__all__ = [
    "EvaluationBatch",
    "MergedTargets",
    "Message",
    "Minibatch",
    "Part",
    "Problem",
    "Prompt",
    "Rollouts",
    "StopReason",
    "Targets",
    "TeacherRequest",
    "Verdicts",
    "assign_rows",
    "id_dtype",
    "left_padded",
    "prompts_at",
    "trimmed",
]
