"""RG-OPD's gate: the verdict on a response decides whether the teacher is followed."""

from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


@register_gate("rg_opd")
class RewardGate(RuleGate):
    """Gate with weight 1 where the teacher judges a response as the verifier does, 0 elsewhere.

    With L the sum over the response of the teacher's log-probability less the student's, a correct response is kept
    if ``L > margin``, a wrong one if ``L < -margin``. Responses without a verdict are left out. If nothing of an
    optimizer batch is kept, all of it has weight 1, unless ``normalization`` is ``none``.

    Args:
        margin: by which the teacher has to agree, nats, at least 0; 0 in the paper.
        block_size: tokens over which L is summed, counted as in :class:`opdlab.strategies.BlockGate`, each with its own
            weight; null for the whole response, as in the paper. The authors' code has 1 by default: L of a response is
            nearly always negative, because few tokens that the teacher finds very unlikely outweigh all others.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> zeros, teacher = torch.zeros(2, 2), torch.tensor([[1.0, -0.5], [1.0, -0.5]])
        >>> verdicts = torch.tensor([[1, 1], [0, 0]], dtype=torch.int8)
        >>> inputs = GateInputs(zeros.long(), torch.ones(2, 2), zeros, zeros, teacher, correct=verdicts)
        >>> RewardGate(normalization="none")(inputs).weights
        tensor([[1., 1.],
                [0., 0.]])
        >>> RewardGate(block_size=1, normalization="none")(inputs).weights
        tensor([[1., 0.],
                [0., 1.]])

    Reference:
        Akhondzadeh et al., "Reward-Gated On-Policy Distillation", arXiv 2607.04037, equations 1 to 3, as quoted in
        ``recipe/rgopd`` of its code: there the sign of the GRPO advantage stands for the verdict.
    """

    needs = ("teacher_logprobs", "correct")
    own_normalization = "mean"

    def __init__(self, margin: float = 0.0, block_size: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        require(margin >= 0, f"margin is {margin}, but must be at least 0")
        require(
            block_size is None or block_size >= 1,
            f"block_size is {block_size}, but must be at least 1 token, or null for the whole response",
        )
        self.margin, self.block_size = margin, block_size

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return the number of each column's block; 0 everywhere for whole responses."""
        if self.block_size is None:
            return torch.zeros_like(inputs.tokens)
        columns = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
        return (columns // self.block_size).expand_as(inputs.tokens)

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return 1 in the blocks in which teacher and verdict agree, 0 elsewhere."""
        gap, labels = inputs.teacher_gap, self.segment_ids(inputs)
        assert gap is not None
        assert inputs.correct is not None
        preference = torch.zeros_like(gap).scatter_add(1, labels, gap).gather(1, labels)
        trusted = (inputs.correct == 1) & (preference > self.margin)
        trusted |= (inputs.correct == 0) & (preference < -self.margin)
        return trusted.to(gap.dtype)
