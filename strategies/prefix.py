"""IW-OPD: a gate whose weights fall along the response, as the student leaves the teacher's path."""

from typing import Any

from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


@register_gate("iw_opd")
class PrefixGate(RuleGate):
    """Gate with more weight on earlier tokens, in proportion to the remaining disagreement with the teacher.

    ``w_t = 1 + gamma * (1 - sum over u < t of |A_u| / sum over u of |A_u|)``, with ``A`` the teacher's log-probability
    of the sampled token minus the student's. It does not depend on drift: it is a control for gates on drift.

    Args:
        gamma: additional weight of the first token over the last, at least 0; 0.5 in the paper.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``none`` unless given, as in the paper.

    Raises:
        UsageError: gamma is below 0.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
        >>> teacher = torch.tensor([[-1.0, 1.0, -2.0, 0.0]])
        >>> PrefixGate()(GateInputs(zeros.long(), ones, zeros, zeros, teacher)).weights
        tensor([[1.5000, 1.3750, 1.2500, 1.0000]])

    Reference:
        Xie et al., "On the Position Bias of On-Policy Distillation", arXiv 2606.22600.
    """

    needs = ("teacher_logprobs",)

    def __init__(self, gamma: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        require(gamma >= 0, f"gamma is {gamma}, but must be at least 0")
        self.gamma = gamma

    @property
    def max_gate(self) -> float:
        """Return the largest weight, that of the first token: ``1 + gamma``."""
        return 1 + self.gamma

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return the weights; ``1 + gamma`` throughout a response on which student and teacher agree."""
        gap = inputs.teacher_gap
        assert gap is not None
        # Divide by the largest first, so that sums of huge gaps stay finite.
        gap = gap.abs()
        gap = gap / gap.amax(1, keepdim=True).clamp(min=1e-30) if gap.shape[1] else gap
        before = gap.cumsum(1) - gap
        return 1 + self.gamma * (1 - (before / gap.sum(1, keepdim=True).clamp(min=1e-30)).clamp(max=1))
