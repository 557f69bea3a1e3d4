"""f-OPD's gate: less weight on rollouts that are old, or from which the student has drifted."""

from typing import Any

from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate

_MAX_DRIFT = 20.0  # nats; above it the weight is 0 long before exp overflows


@register_gate("f_opd")
class FreshnessGate(RuleGate):
    """Gate with one weight per rollout, ``max(0, exp(-alpha * sqrt(D)) / (age + 1) - threshold)``.

    D is the KL divergence per token of the current student from the snapshot that sampled, estimated from the sampled
    tokens: the mean over the rollout of ``exp(d) * d - exp(d) + 1`` with the drift d, which is 0 at d = 0 and never
    negative. The age is counted in optimizer steps since the snapshot took the student's weights.

    Args:
        alpha: strength of the drift, at least 0.
        threshold: freshness at and below which a rollout has weight 0, at least 0 and below 1.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
        >>> age = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
        >>> FreshnessGate(normalization="none")(GateInputs(zeros.long(), ones, zeros, zeros, age=age)).weights
        tensor([[1.0000, 1.0000],
                [0.2500, 0.2500]])

    Reference:
        Chen et al., "f-OPD: Stabilizing Long-Horizon On-Policy Distillation with Freshness-Aware Control", arXiv
        2605.17862, equations 11 and 13. Its full text could not be had: the formulas are those of a public summary.
        The gate alone, without anchor and refresh. The drift of the teacher's context is 0 here, because the teacher
        always scores the rollout as it was sampled. The paper gives no values of ``alpha`` and ``threshold``, and takes
        D from whole distributions; the defaults and the estimate are opdlab's choice.
    """

    needs = ("age",)
    own_normalization = "mean"

    def __init__(self, alpha: float = 1.0, threshold: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        require(alpha >= 0, f"alpha is {alpha}, but must be at least 0")
        require(0 <= threshold < 1, f"threshold is {threshold}, but must be at least 0 and below 1")
        self.alpha, self.threshold = alpha, threshold

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return the same label everywhere: a response is one segment."""
        return inputs.tokens.new_zeros(inputs.tokens.shape)

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return the freshness of each rollout above the threshold."""
        assert inputs.age is not None
        drift = inputs.drift.double().clamp(max=_MAX_DRIFT)  # 0 at masked positions, where the estimate is 0 too
        rise = drift.expm1()
        # exp(d) * d - exp(d) + 1 without the cancellation of exp(d) and 1.
        total = (drift * rise + (drift - rise)).sum(1, keepdim=True)
        divergence = (total / inputs.mask.sum(1, keepdim=True).clamp(min=1)).clamp(min=0)
        freshness = (-self.alpha * divergence.sqrt()).exp() / (inputs.age.double() + 1)
        return (freshness - self.threshold).clamp(min=0).to(inputs.drift.dtype)
