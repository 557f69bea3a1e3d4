"""Divergences between student and teacher on a support of a few tokens."""

from typing import Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.objectives.base import Objective, PositionLosses, register_objective
from opdlab.objectives.divergences import divergence_on_support, require_choice, unused_by
from opdlab.objectives.functional import Divergence, Tail, support_divergence
from opdlab.policies.language_model import Scored
from opdlab.types import Rollouts, Targets, TeacherRequest

Support = Literal["teacher", "student", "union"]


@register_objective("support_divergence")
class SupportDivergence(Objective):
    """Divergence between student and teacher on a support of K tokens, with a rule for the mass outside it.

    The formulas are those of :func:`support_divergence`.

    The gradient flows directly through the student's logits; there is no importance ratio. With ``renormalize`` it
    reaches the support alone, with ``bucket`` and ``drop`` every token, through the log-normalizer.

    Args:
        divergence: ``reverse_kl``, ``forward_kl``, ``jsd``, ``skew_reverse_kl`` or ``skew_forward_kl``.
        support: the tokens that are compared: the ``teacher``'s most likely ones; the ``student``'s, as the snapshot
            that sampled the rollouts ranks them; or the ``union`` of both.
        tail: the probability outside the support: ``bucket`` makes it one more outcome; ``drop`` leaves it out;
            ``renormalize`` divides both distributions by their mass on the support.
        k: number of most likely tokens, of each side for the union; 1 to the vocabulary's size, and at least 2 for
            ``renormalize``.
        beta: the teacher's share in the mixture of ``jsd``, between 0 and 1.
        alpha: share of the first distribution in the second of the skewed divergences, at least 0 and below 1.

    Raises:
        UsageError: an option is unknown or out of range.
    """

    divergence: Divergence
    support: Support
    tail: Tail
    k: int
    beta: float
    alpha: float

    def __init__(
        self,
        divergence: Divergence = "reverse_kl",
        support: Support = "teacher",
        tail: Tail = "bucket",
        k: int = 32,
        beta: float = 0.5,
        alpha: float = 0.1,
    ) -> None:
        require_choice("support", support, get_args(Support))
        require(k >= 1, f"k is {k}, but must be at least 1")
        self.divergence, self.support, self.tail = divergence, support, tail
        self.k, self.beta, self.alpha = k, beta, alpha
        logits = torch.zeros(min(k, 2))
        support_divergence(  # checks the options
            logits,
            logits,
            divergence=divergence,
            tail=tail,
            student_log_normalizer=logits[0],
            teacher_log_normalizer=logits[0],
            beta=beta,
            alpha=alpha,
        )

    @property
    def request(self) -> TeacherRequest:
        """Return the required teacher outputs: the support, and its tail unless both sides are renormalised."""
        return TeacherRequest(
            top_k=0 if self.support == "student" else self.k,
            behavior_top_k=0 if self.support == "teacher" else self.k,
            tail=self.tail != "renormalize",
            logprobs=False,
        )

    @property
    def unused_options(self) -> set[str]:
        """Return the options that have no effect; see :attr:`Objective.unused_options`."""
        return unused_by(self.divergence)

    @property
    def inapplicable_laws(self) -> dict[str, str]:
        """Return the laws that do not apply; see :attr:`Objective.inapplicable_laws`."""
        if self.tail != "drop" or self.divergence == "jsd":
            return {}
        way = "out of" if self.divergence.endswith("reverse_kl") else "into"
        return {"zero_gradient_at_equality": f"the partial sum falls where probability moves {way} the support"}

    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; see :meth:`Objective.position_losses`."""
        of_teacher, valid = targets.support_logits, targets.support_valid
        assert of_teacher is not None
        counted = None if valid is None else student.picked(valid)
        assert targets.support_ids is not None
        if self.tail == "renormalize":
            logits, statistics = student.support_statistics(targets.support_ids)
            sides: list[tuple[Tensor, Tensor | None, Tensor | None]]
            sides = [(logits, None, None), (student.picked(of_teacher), None, None)]
        else:
            assert targets.log_normalizer is not None
            assert targets.log_tail is not None
            *_, logits, log_tail, statistics = student.support_tail(targets.support_ids)
            sides = [(logits, statistics.log_normalizer, log_tail)]
            of_all = (of_teacher, targets.log_normalizer, targets.log_tail)
            sides.append((student.picked(of_all[0]), student.picked(of_all[1]), student.picked(of_all[2])))
        losses = divergence_on_support(
            sides[0],
            sides[1],
            divergence=self.divergence,
            tail=self.tail,
            beta=self.beta,
            alpha=self.alpha,
            valid=counted,
        )
        support = logits.detach()
        inside = support if counted is None else support.masked_fill(~counted, -torch.inf)
        mass = (inside.logsumexp(-1) - statistics.log_normalizer.detach()).exp()  # [N, K] -> [N]
        metrics = {"student_support_mass": student.padded(mass)}
        if targets.support_mass is not None:
            metrics = {"teacher_support_mass": targets.support_mass, **metrics}
        if self.support != "student":  # the teacher's most likely token is first
            metrics["top1_agreement"] = student.padded((support[:, 0] >= statistics.max_logit).float())
        if valid is not None:  # ids that stand in the union twice are in both supports
            metrics["support_overlap"] = (~valid & student.mask[..., None]).sum(-1) / self.k
        logprobs, entropy = student.padded(statistics.logprobs.detach()), student.padded(statistics.entropy)
        padded = student.padded(losses)
        return PositionLosses(padded, logprobs, entropy, metrics, divergence=padded.detach())

    def own_logprobs(self, student: Scored, rollouts: Rollouts, targets: Targets) -> Tensor:
        """Return the student's log-probabilities; see :meth:`Objective.own_logprobs`."""
        assert targets.support_ids is not None
        if self.tail == "renormalize":
            _, statistics = student.support_statistics(targets.support_ids)
        else:
            statistics = student.support_tail(targets.support_ids).statistics
        return student.padded(statistics.logprobs.detach())
