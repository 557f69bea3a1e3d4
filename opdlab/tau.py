"""Schedules of tau, the strength of a gate: fixed in time, or fitted to the drift of a batch.

Shapes: B rollouts, T response tokens.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opdlab.errors import require

# Beyond this tau * drift overflows float32, and long before it every drifted segment has weight 0.
MAX_TAU = 1e30


def check_tau(key: str, tau: float) -> None:
    """Refuse a tau that is out of range."""
    require(0 <= tau <= MAX_TAU, f"{key} is {tau}, but must lie between 0 and {MAX_TAU:g} (0 switches gating off)")


class TauSchedule(ABC):
    """Gives tau for a batch; stands where a gate takes a number for ``tau``."""

    @abstractmethod
    def __call__(self, step: int, statistic: Tensor, mask: Tensor) -> float | Tensor:
        """Return tau, a number or a tensor of one, at least 0.

        Args:
            step: optimizer steps taken.
            statistic: [B, T], nats: the statistic of each position's segment, 0 where the mask is 0.
            mask: [B, T] bool.
        """

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


class LinearTau(TauSchedule):
    """From one value to another in equal steps, and constant after that.

    Args:
        start: tau at the first optimizer step.
        end: tau from step ``num_steps`` on.
        num_steps: optimizer steps in between, at least 1.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> schedule, nothing = LinearTau(0.0, 5.0, num_steps=10), torch.zeros(0)
        >>> [schedule(step, nothing, nothing) for step in (0, 5, 10, 99)]
        [0.0, 2.5, 5.0, 5.0]
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, num_steps: int = 100) -> None:
        check_tau("start", start)
        check_tau("end", end)
        require(num_steps >= 1, f"num_steps is {num_steps}, but must be at least 1")
        self.start, self.end, self.num_steps = start, end, num_steps

    def __call__(self, step: int, statistic: Tensor, mask: Tensor) -> float:
        """See :meth:`TauSchedule.__call__`."""
        return self.start + (self.end - self.start) * min(step / self.num_steps, 1.0)


class EffectiveSampleSizeTau(TauSchedule):
    """The tau at which the weights rest on a given share of the positions, found anew for each batch.

    The effective sample size ``(sum w)^2 / (n * sum w^2)`` of ``w = exp(-tau * s)`` falls as tau rises: its logarithm
    has the derivative ``2 * (mean of s under w^2 - mean of s under w)``, and ``w^2`` leans more to small s. So tau is
    found by bisection, on the device. Where even ``max_tau`` leaves more, as on fresh rollouts without drift,
    ``max_tau`` it is.

    Args:
        target: effective sample size wanted, as a share of the positions, above 0 and below 1.
        max_tau: largest tau, per nat.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> statistic, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> tau = EffectiveSampleSizeTau(target=0.9)(0, statistic, mask)
        >>> weights = torch.exp(-tau * statistic)
        >>> round(float(weights.sum() ** 2 / (2 * (weights**2).sum())), 4)
        0.9
    """

    def __init__(self, target: float = 0.9, max_tau: float = 100.0) -> None:
        require(0 < target < 1, f"target is {target}, but must lie between 0 and 1")
        check_tau("max_tau", max_tau)
        require(max_tau > 0, f"max_tau is {max_tau}, but must be above 0")
        self.target, self.max_tau = target, max_tau

    # Halvings of an interval of nine decades of tau, which leave 2e-8 of its logarithm.
    _DECADES, _HALVINGS = 9, 30

    def __call__(self, step: int, statistic: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TauSchedule.__call__`."""
        # Only differences matter to weights of a fixed mean; the smallest is taken off so that nothing underflows.
        offset = statistic.masked_fill(~mask, torch.inf).amin() if mask.numel() else statistic.sum()
        excess = (statistic - offset).masked_fill(~mask, torch.inf)  # weight 0 where the mask is 0
        low = statistic.new_full((), math.log(self.max_tau) - self._DECADES * math.log(10))
        high = statistic.new_full((), math.log(self.max_tau))
        for _ in range(self._HALVINGS):
            middle = (low + high) / 2
            weights = (-middle.exp() * excess).exp()
            size = weights.sum().square() / (mask.sum() * weights.square().sum())
            low, high = torch.where(size > self.target, middle, low), torch.where(size > self.target, high, middle)
        return high.exp().clamp(max=self.max_tau)


__all__ = ["MAX_TAU", "EffectiveSampleSizeTau", "LinearTau", "TauSchedule", "check_tau"]
