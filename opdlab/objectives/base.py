"""What every objective shares: the interface, its registry, and the reduction of position losses to one number.

Shapes: B rollouts, T response tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from opdlab.policies.language_model import Scored
from opdlab.policies.teacher import TeacherRequest
from opdlab.registry import Registry
from opdlab.rollouts.batch import Rollouts, Targets

Reduction = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True)
class PositionLosses:
    """An objective's account of a micro-batch.

    Args:
        losses: [B, T], differentiable; 0 where the mask is 0.
        logprobs: [B, T], nats: of the sampled tokens under the student, detached.
        entropy: [B, T], nats: of the student, detached.
        metrics: further figures per valid position, each [B, T], detached, averaged for the log under these names.
    """

    losses: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Turns a scored micro-batch into position losses. Says what it needs of the teacher."""

    @property
    def request(self) -> TeacherRequest:
        """What the teacher must deliver; by default only the sampled tokens' log-probabilities."""
        return TeacherRequest()

    @abstractmethod
    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; everything on the student's device."""


def reduce_losses(
    losses: Tensor, weights: Tensor, mask: Tensor, *, reduction: Reduction, num_tokens: float, num_rollouts: float
) -> Tensor:
    """Reduce gated position losses to the micro-batch's share of the optimizer batch's loss.

    ``token_mean``: ``sum(m * w * l) / num_tokens``. ``sequence_mean``: the mean over rollouts of
    ``sum(m * w * l) / sum(m)``; the paper's code base, run with micro-batches of one rollout, does in effect this.

    Args:
        losses: [B, T].
        weights: [B, T], the gate's.
        mask: [B, T] bool.
        reduction: see above.
        num_tokens: valid positions in the whole optimizer batch.
        num_rollouts: rollouts with a valid position in the whole optimizer batch.

    Returns:
        A scalar; summed over the micro-batches it is the optimizer batch's loss.

    Example:
        >>> import torch
        >>> losses, mask = torch.tensor([[1.0, 1.0], [4.0, 9.0]]), torch.tensor([[True, True], [True, False]])
        >>> ones = torch.ones(2, 2)
        >>> reduce_losses(losses, ones, mask, reduction="token_mean", num_tokens=3, num_rollouts=2)
        tensor(2.)
        >>> reduce_losses(losses, ones, mask, reduction="sequence_mean", num_tokens=3, num_rollouts=2)
        tensor(2.5000)
    """
    weighted = (weights * losses).masked_fill(~mask, 0.0)
    if reduction == "token_mean":
        return weighted.sum() / max(num_tokens, 1)
    return (weighted.sum(1) / mask.sum(1).clamp(min=1)).sum() / max(num_rollouts, 1)


_REGISTRY: Registry[Objective] = Registry("objective", Objective, "opdlab.objectives", "opdlab.objectives")  # type: ignore[type-abstract]


def objective_registry() -> Registry[Objective]:
    """The registry itself, for the command line."""
    return _REGISTRY


register_objective = _REGISTRY.register
