"""Teacher-TopK / LSM: reverse KL on the teacher's most likely tokens."""

from opdlab.errors import require
from opdlab.objectives.base import register_objective
from opdlab.objectives.functional import Divergence, Tail
from opdlab.objectives.support_divergence import Support, SupportDivergence


@register_objective("teacher_topk")
class TeacherTopK(SupportDivergence):
    """Reverse KL on the teacher's top K tokens, with both distributions renormalised there (LSM).

    The formula is that of :func:`teacher_topk_loss`. This is :class:`SupportDivergence` with ``reverse_kl``,
    ``teacher`` and ``renormalize``. The log-probability of the sampled token is only used for the drift.

    Args:
        k: size of the support, 2 to the vocabulary's size; 32 in the paper.

    Raises:
        UsageError: k is below 2.
    """

    # Not set by the constructor: they are no options of this objective.
    divergence: Divergence = "reverse_kl"
    support: Support = "teacher"
    tail: Tail = "renormalize"
    beta, alpha = 0.5, 0.1  # not used by this divergence

    def __init__(self, k: int = 32) -> None:
        require(k >= 2, f"k is {k}, but must be at least 2: renormalised over a single token the loss is always zero")
        self.k = k
