"""FiRe-OPD: a gate that drops rollouts with a low teacher likelihood and weights tokens by both models' entropies."""

from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


@register_gate("fire_opd")
class FilterReweightGate(RuleGate):
    """Filters rollouts by the teacher's likelihood, then weights tokens by both models' entropies.

    A rollout whose mean teacher log-probability per token lies below the ``dropped`` quantile of the batch gets weight
    0. A token of the others gets ``(1 + alpha * (1 - H_T / max H_T)) * (1 + beta * H_S / max H_S)``, with the
    teacher's and the student's entropy, each relative to its largest in the batch. It does not depend on drift: it is
    a control for gates on drift.

    Args:
        dropped: share of the rollouts that are dropped, at least 0 and below 1.
        alpha: strength of the teacher's confidence, at least 0.
        beta: strength of the student's entropy, at least 0.
        options: see :class:`opdlab.gating.RuleGate`.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
        >>> likely, doubt = torch.tensor([[-1.0, -1.0], [-9.0, -1.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> inputs = GateInputs(
        ...     zeros.long(), ones, zeros, zeros, teacher_logprobs=likely, entropy=doubt, teacher_entropy=ones
        ... )
        >>> FilterReweightGate(dropped=0.5, normalization="none")(inputs).weights
        tensor([[1., 2.],
                [0., 0.]])

    Reference:
        Li et al., arXiv 2606.02684; ``verl/workers/actor/dp_actor.py`` of YuYingLi0/FiRe-OPD. There the student's
        entropy is that of the policy before the update, and the batch a micro-batch of one process.
    """

    needs = ("teacher_logprobs", "teacher_entropy", "entropy")
    own_normalization = "mean"

    def __init__(self, dropped: float = 0.2, alpha: float = 1.0, beta: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        require(0 <= dropped < 1, f"dropped is {dropped}, but must be at least 0 and below 1")
        require(alpha >= 0, f"alpha is {alpha}, but must be at least 0")
        require(beta >= 0, f"beta is {beta}, but must be at least 0")
        self.dropped, self.alpha, self.beta = dropped, alpha, beta

    @property
    def max_gate(self) -> float:
        """Return ``(1 + alpha) * (1 + beta)``, for a teacher entropy of 0 and the batch's largest student entropy."""
        return (1 + self.alpha) * (1 + self.beta)

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return the product of both factors, 0 for a dropped rollout."""
        assert inputs.teacher_logprobs is not None
        assert inputs.teacher_entropy is not None
        assert inputs.entropy is not None
        wide = inputs.drift.dtype
        confidence = 1 - _relative(inputs.teacher_entropy.to(wide))
        doubt = _relative(inputs.entropy.to(wide))
        gate = (1 + self.alpha * confidence) * (1 + self.beta * doubt)
        return gate * self._kept(inputs.teacher_logprobs.to(wide), inputs.mask)[:, None]

    def _kept(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return True for kept rollouts, [B] bool."""
        lengths = mask.sum(1)
        likelihood = logprobs.sum(1) / lengths.clamp(min=1)
        some = lengths > 0  # an empty rollout has no likelihood
        threshold = torch.nanquantile(likelihood.masked_fill(~some, torch.nan), self.dropped) if len(some) else 0.0
        return ~(likelihood < threshold)


def _relative(entropy: Tensor) -> Tensor:
    """Return entropy as a share of the largest in the batch; 0 at masked positions."""
    largest = entropy.amax() if entropy.numel() else entropy.sum()
    return (entropy / largest.clamp(min=1e-6)).clamp(0, 1)
