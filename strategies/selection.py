"""Gates that keep a share of each rollout's positions: those with the highest score.

Shapes: B rollouts, T response tokens. Entropies and divergences are in nats.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


class TopShareGate(RuleGate):
    """Base of gates with weight 1 at the positions of a rollout with the highest score, 0 elsewhere.

    Override :meth:`score`. A rollout of n valid positions keeps ``max(1, floor(share * n))`` of them; of equal scores
    the earlier position is kept.

    Args:
        share: of the positions that are kept, above 0 and at most 1.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: ``share`` is out of range.

    Example:
        >>> class LikelyGate(TopShareGate):
        ...     def score(self, inputs):
        ...         return inputs.current_logprobs
        >>> zeros, current = torch.zeros(1, 4), torch.tensor([[-1.0, -3.0, -2.0, -4.0]])
        >>> LikelyGate(share=0.5)(GateInputs(zeros.long(), torch.ones(1, 4), zeros, current)).weights
        tensor([[2., 0., 2., 0.]])
    """

    own_normalization = "mean"

    def __init__(self, share: float, **options: Any) -> None:
        super().__init__(**options)
        require(0 < share <= 1, f"share is {share}, but must be above 0 and at most 1")
        self.share = share

    @abstractmethod
    def score(self, inputs: GateInputs) -> Tensor:
        """Return the score of each position, [B, T]; masked positions are ignored."""

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return 1 at the kept positions, 0 elsewhere."""
        mask = inputs.mask
        # 0.29 * 100 is 28.999…: without the small addition, 28 positions would be kept.
        kept = (self.share * mask.sum(1, dtype=torch.float64) + 1e-9).floor().clamp(min=1)
        score = self.score(inputs).masked_fill(~mask, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(mask.shape[1], device=mask.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        return ((rank < kept[:, None]) & mask).to(inputs.drift.dtype)


@register_gate("entropy_top")
class EntropyTopGate(TopShareGate):
    """Gate that keeps the positions of each rollout at which the student's entropy is highest.

    Args:
        share: of the positions that are kept, above 0 and at most 1; 0.2 in the authors' example.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: ``share`` is out of range.

    Example:
        >>> zeros, doubt = torch.zeros(1, 4), torch.tensor([[0.1, 2.0, 0.3, 0.2]])
        >>> EntropyTopGate(share=0.25)(GateInputs(zeros.long(), torch.ones(1, 4), zeros, zeros, entropy=doubt)).weights
        tensor([[0., 4., 0., 0.]])

    Reference:
        ``entropy_top_ratio`` in ``verl/trainer/ppo/ray_trainer_multitask.py`` of hhh675597/revisiting_opd, the code of
        Fu et al., arXiv 2603.25562. There the entropy is that of the policy that sampled, and all positions that tie
        with the last one are kept.
    """

    needs = ("entropy",)

    def __init__(self, share: float = 0.2, **options: Any) -> None:
        super().__init__(share, **options)

    def score(self, inputs: GateInputs) -> Tensor:
        """Return the student's entropy."""
        assert inputs.entropy is not None
        return inputs.entropy


@register_gate("tip")
class TokenImportanceGate(TopShareGate):
    """TIP: keeps the positions where the student is uncertain, or far from the teacher.

    The score is ``h + d - h * d`` with the student's entropy h and its divergence d from the teacher
    (:attr:`opdlab.gating.GateInputs.divergence`), each scaled to [0, 1] by its smallest and largest value in the batch.

    Args:
        share: of the positions that are kept, above 0 and at most 1; 0.5 in the paper.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: ``share`` is out of range.

    Example:
        >>> zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
        >>> doubt, gap = torch.tensor([[1.0, 0.0, 0.0, 0.2]]), torch.tensor([[0.0, 0.1, 2.0, 0.2]])
        >>> inputs = GateInputs(zeros.long(), ones, zeros, zeros, entropy=doubt, divergence=gap)
        >>> TokenImportanceGate()(inputs).weights
        tensor([[2., 0., 2., 0.]])

    Reference:
        Xu et al., "TIP: Token Importance in On-Policy Distillation", arXiv 2604.14084. Its divergence is the full
        reverse KL. Its full text could not be had: the score and the scaling are those of a summary of the paper and
        of ``tip_score`` in the code of TA-OPD. That the share is taken of each rollout is opdlab's choice.
    """

    needs = ("entropy", "divergence")

    def __init__(self, share: float = 0.5, **options: Any) -> None:
        super().__init__(share, **options)

    def score(self, inputs: GateInputs) -> Tensor:
        """Return the probabilistic OR of entropy and divergence, 0 to 1."""
        assert inputs.entropy is not None
        assert inputs.divergence is not None
        h, d = (_scaled(values, inputs.mask, 0.0, 1.0) for values in (inputs.entropy, inputs.divergence))
        return h + d - h * d


@register_gate("ta_opd")
class TeachabilityGate(TopShareGate):
    """TA-OPD: keeps the positions where the student is far from the teacher, but could follow it.

    The score is ``d * c`` with the student's divergence d from the teacher, and c the teacher's probability of the
    tokens that the student finds most likely (:attr:`opdlab.gating.GateInputs.compatible_mass`): where c is small, the
    teacher asks for tokens that the student does not consider. Each is scaled to [0, 1] by its quantiles 0.05 and 0.95
    in the batch, and clipped.

    It needs an objective on the student's support (``support_divergence`` with ``support`` ``student`` or ``union``),
    whose ``k`` is the number of these tokens, 16 in the paper.

    Args:
        share: of the positions that are kept, above 0 and at most 1; 0.05 in the paper.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: ``share`` is out of range.

    Example:
        >>> zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
        >>> gap, mass = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.9, 0.8, 0.0]])
        >>> inputs = GateInputs(zeros.long(), ones, zeros, zeros, divergence=gap, compatible_mass=mass)
        >>> TeachabilityGate(share=0.25)(inputs).weights
        tensor([[0., 0., 4., 0.]])

    Reference:
        Wang et al., "Not All Disagreement Is Learnable: Token Teachability in On-Policy Distillation", arXiv
        2605.26844, and the method ``teachability`` of its code, wyy-code/TA-OPD: there d is the forward KL on the union
        of both supports, the student's tokens are those of the current student, and the share is taken of the batch
        with at least one position of each rollout. Here the tokens are those of the snapshot that sampled.
    """

    needs = ("divergence", "compatible_mass")

    def __init__(self, share: float = 0.05, **options: Any) -> None:
        super().__init__(share, **options)

    def score(self, inputs: GateInputs) -> Tensor:
        """Return the product of divergence and compatible mass, 0 to 1."""
        assert inputs.divergence is not None
        assert inputs.compatible_mass is not None
        mask = inputs.mask
        return _scaled(inputs.divergence, mask, 0.05, 0.95) * _scaled(inputs.compatible_mass, mask, 0.05, 0.95)


def _scaled(values: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """Return values scaled to [0, 1] between two quantiles of the valid positions, and clipped; 0 if these are equal.

    Quantiles are interpolated linearly. Nothing waits for the device, and unlike torch.quantile this has no limit of
    2^24 values.
    """
    if not values.numel():
        return values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    ordered = values.masked_fill(~mask, torch.inf).flatten().sort().values
    last = (mask.sum() - 1).clamp(min=0)

    def quantile(q: float) -> Tensor:
        place = q * last.double()
        below = place.floor().long()
        above = (below + 1).clamp(max=last)
        return torch.lerp(ordered.take(below), ordered.take(above), (place - below).to(ordered.dtype))

    bottom, top = quantile(low), quantile(high)
    spread = top - bottom
    return torch.where(spread > 1e-12, ((values - bottom) / spread.clamp(min=1e-12)).clamp(0, 1), 0.0)
