"""A divergence over the whole vocabulary."""

from torch import Tensor

from opdlab.errors import UsageError
from opdlab.objectives.base import Objective, PositionLosses, register_objective
from opdlab.objectives.divergences import Divergence, check_divergence, unused_by
from opdlab.policies.language_model import LanguageModel, Scored
from opdlab.policies.teacher import Teacher
from opdlab.scoring import TokenStatistics
from opdlab.scoring.full_divergence import Rule
from opdlab.types import Rollouts, Targets, TeacherRequest


@register_objective("full_divergence")
class FullDivergence(Objective):
    """Divergence between student and teacher over the whole vocabulary.

    The formulas are those of :func:`opdlab.objectives.functional.full_divergence`.

    The teacher's targets are its last hidden states, in host memory and in the dtype in which it computes: G numbers a
    token. Its head stays on the device, also if the teacher is offloaded. Logits of both heads are computed tile by
    tile, and the student's log-probabilities for the drift in the same pass.

    Each side keeps its own normalizer. Ids that the student lacks are one more outcome, with its probability 0 there.

    Args:
        divergence: ``reverse_kl``, ``forward_kl``, ``jsd``, ``skew_reverse_kl`` or ``skew_forward_kl``.
        beta: the teacher's share in the mixture of ``jsd``, between 0 and 1.
        alpha: the share of the first distribution in the second of the skewed ones, at least 0 and below 1.

    Raises:
        UsageError: an option is unknown or out of range.
    """

    def __init__(self, divergence: Divergence = "reverse_kl", beta: float = 0.5, alpha: float = 0.1) -> None:
        check_divergence(divergence, beta, alpha)
        self.divergence, self.beta, self.alpha = divergence, beta, alpha
        self._teacher: Teacher | None = None

    @property
    def request(self) -> TeacherRequest:
        """Return the required teacher outputs: its last hidden states."""
        return TeacherRequest(hidden=True)

    @property
    def unused_options(self) -> set[str]:
        """Return the options that have no effect; see :attr:`Objective.unused_options`."""
        return unused_by(self.divergence)

    def setup(self, student: LanguageModel, teacher: Teacher) -> None:
        """Keep the teacher, whose head every step reads.

        Raises:
            UsageError: the teacher gives no head, or one that changes within a buffer; or the divergence is infinite
                because the student lacks ids.
        """
        size = teacher.head().num_ids
        try:
            Rule.of(self.divergence, self.beta, self.alpha).check(student.vocab_size, size)
        except UsageError as error:
            raise UsageError(f"objective.{error}") from error
        self._teacher = teacher

    def _pass(self, student: Scored, rollouts: Rollouts, targets: Targets) -> tuple[Tensor, TokenStatistics]:
        assert self._teacher is not None, "setup is called before"
        assert targets.hidden is not None
        head = self._teacher.head(rollouts.temperature)
        return student.divergence_statistics(targets.hidden, head, self.divergence, self.beta, self.alpha)

    def own_logprobs(self, student: Scored, rollouts: Rollouts, targets: Targets) -> Tensor:
        """Return the student's log-probabilities; see :meth:`Objective.own_logprobs`."""
        return student.padded(self._pass(student, rollouts, targets)[1].logprobs)

    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; see :meth:`Objective.position_losses`."""
        losses, statistics = self._pass(student, rollouts, targets)
        padded, logprobs = student.padded(losses), student.padded(statistics.logprobs)
        return PositionLosses(padded, logprobs, student.padded(statistics.entropy), divergence=padded.detach())
