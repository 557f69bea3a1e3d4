"""Controls of reinforcement learning on the ratio of student to behavior policy: masks and truncated weights."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate
from opdlab.gating.normalization import check_choice

Aggregate = Literal["geometric_mean", "product"]


@register_gate("ratio_mask")
class RatioMaskGate(RuleGate):
    """Hard trust region: weight 1 where ``exp(drift)`` lies in [min_ratio, max_ratio], 0 elsewhere.

    IcePop's band is [0.5, 5]; prime-rl's has been [0.125, 8] and [0.2, 5]. Both also multiply by the ratio inside,
    which ``sampled_token`` does itself.

    Args:
        min_ratio: lower end of the band, 0 to 1.
        max_ratio: upper end, at least 1.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``none`` unless given: masked
            tokens shrink the step.

    Raises:
        UsageError: the band does not contain 1.

    Example:
        >>> zeros, current = torch.zeros(1, 3), torch.tensor([[0.0, 2.0, -1.0]])
        >>> RatioMaskGate()(GateInputs(zeros.long(), torch.ones(1, 3), zeros, current)).weights
        tensor([[1., 0., 0.]])

    Reference:
        IcePop: arXiv 2510.18855. prime-rl: PrimeIntellect-ai/prime-rl, pull requests 1030 and 2401.
    """

    def __init__(self, min_ratio: float = 0.5, max_ratio: float = 5.0, **options: Any) -> None:
        super().__init__(**options)
        require(
            0 <= min_ratio <= 1 <= max_ratio,
            f"min_ratio is {min_ratio} and max_ratio is {max_ratio}, but 0 <= min_ratio <= 1 <= max_ratio must hold",
        )
        self.min_ratio, self.max_ratio = min_ratio, max_ratio

    def log_ratio(self, inputs: GateInputs) -> Tensor:
        """Return the logarithm of the ratio that the band is for, [B, T] or [B, 1]."""
        return inputs.drift

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return 1 inside the band, 0 outside; compared as logarithms, which do not overflow."""
        low = math.log(self.min_ratio) if self.min_ratio else -math.inf
        ratio = self.log_ratio(inputs)
        inside = (ratio >= low) & (ratio <= math.log(self.max_ratio))
        return inside.to(ratio.dtype).expand_as(inputs.drift)


@register_gate("truncated_ratio")
class TruncatedRatioGate(RuleGate):
    """Truncated importance weights, ``min(exp(drift), max_ratio)``.

    For objectives without a ratio of their own, such as ``teacher_topk``; ``sampled_token`` has the ratio in its loss
    already.

    Args:
        max_ratio: upper limit of the ratio, at least 1.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``none`` unless given.

    Raises:
        UsageError: ``max_ratio`` is below 1.

    Example:
        >>> zeros, current = torch.zeros(1, 3), torch.tensor([[0.0, 9.0, -0.6931472]])
        >>> TruncatedRatioGate()(GateInputs(zeros.long(), torch.ones(1, 3), zeros, current)).weights
        tensor([[1.0000, 2.0000, 0.5000]])

    Reference:
        Ionides, "Truncated importance sampling", 2008; the cap of 2 is the usual default for rollouts of another
        engine, for example in allenai/open-instruct.
    """

    def __init__(self, max_ratio: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        require(max_ratio >= 1, f"max_ratio is {max_ratio}, but must be at least 1")
        self.max_ratio = max_ratio

    @property
    def max_gate(self) -> float:
        """Return the largest weight, ``max_ratio``."""
        return self.max_ratio

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return the truncated ratio."""
        return inputs.drift.clamp(max=math.log(self.max_ratio)).exp()


@register_gate("sequence_ratio_mask")
class SequenceRatioMaskGate(RatioMaskGate):
    """Hard trust region for whole responses, on the ratio of the response.

    Args:
        min_ratio: lower end of the band, 0 to 1.
        max_ratio: upper end, at least 1.
        aggregate: ``geometric_mean`` of the tokens' ratios, which does not depend on the length, or their ``product``,
            the importance ratio of the response.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``none`` unless given.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> zeros, current = torch.zeros(2, 2), torch.tensor([[0.2, -0.2], [1.0, 0.0]])
        >>> SequenceRatioMaskGate()(GateInputs(zeros.long(), torch.ones(2, 2), zeros, current)).weights
        tensor([[1., 1.],
                [0., 0.]])

    Reference:
        Masked importance sampling at the level of sequences: modelscope/ms-swift, pull request 6678. The default band
        is opdlab's: under harsh reuse the toy's responses drift by about 0.07 nats per token.
    """

    def __init__(
        self,
        min_ratio: float = 0.9,
        max_ratio: float = 1.1,
        aggregate: Aggregate = "geometric_mean",
        **options: Any,
    ) -> None:
        super().__init__(min_ratio, max_ratio, **options)
        check_choice("aggregate", aggregate, get_args(Aggregate))
        self.aggregate = aggregate

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return the same label everywhere: a response is one segment."""
        return torch.zeros_like(inputs.tokens)

    def log_ratio(self, inputs: GateInputs) -> Tensor:
        """Return the logarithm of each response's ratio, [B, 1]."""
        total = inputs.drift.sum(1, keepdim=True)
        if self.aggregate == "geometric_mean":
            total = total / inputs.mask.sum(1, keepdim=True).clamp(min=1)
        return total
