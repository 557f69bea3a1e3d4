"""Teacher-TopK / LSM: reverse KL on the teacher's most likely tokens."""

from opdlab.errors import require
from opdlab.objectives.base import Objective, PositionLosses, register_objective
from opdlab.objectives.functional import teacher_topk_loss
from opdlab.policies.language_model import Scored
from opdlab.types import Rollouts, Targets, TeacherRequest


@register_objective("teacher_topk")
class TeacherTopK(Objective):
    """Reverse KL on the teacher's top K tokens, both distributions renormalised; see :func:`teacher_topk_loss`.

    The gradient flows directly through the student's logits of the support; there is no importance ratio. The
    log-probability of the sampled token is only used for the drift.

    Args:
        k: size of the support, 2 to the vocabulary's size; 32 in the paper.

    Raises:
        UsageError: k is below 2.
    """

    def __init__(self, k: int = 32) -> None:
        require(k >= 2, f"k is {k}, but must be at least 2: renormalised over a single token the loss is always zero")
        self.k = k

    @property
    def request(self) -> TeacherRequest:
        """Return the required teacher outputs: the top K ids and logits."""
        return TeacherRequest(top_k=self.k)

    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; see :meth:`Objective.position_losses`."""
        assert targets.support_ids is not None
        assert targets.support_logits is not None
        assert targets.support_mass is not None
        logits, statistics = student.support_statistics(targets.support_ids)
        losses = student.padded(teacher_topk_loss(logits, targets.support_logits[student.mask]))
        support = logits.detach()
        mass = (support.logsumexp(-1) - statistics.log_normalizer).exp()  # [N, K] -> [N]
        agreement = (support[:, 0] >= statistics.max_logit).float()  # the teacher's most likely token is first
        metrics = {
            "teacher_support_mass": targets.support_mass,
            "student_support_mass": student.padded(mass),
            "top1_agreement": student.padded(agreement),
        }
        logprobs, entropy = student.padded(statistics.logprobs), student.padded(statistics.entropy)
        return PositionLosses(losses, logprobs, entropy, metrics, divergence=losses.detach())
