"""Schedules of tau, the strength of a gate: fixed in time, or fitted to the drift of a batch.

Shapes: B rollouts, T response tokens.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opdlab.errors import require

# Above this value tau * drift overflows float32; every drifted segment has weight 0 long before.
MAX_TAU = 1e30


def check_tau(key: str, tau: float) -> None:
    """Raise :class:`UsageError` if tau is out of range."""
    require(0 <= tau <= MAX_TAU, f"{key} is {tau}, but must lie between 0 and {MAX_TAU:g} (0 switches gating off)")


class TauSchedule(ABC):
    """Computes tau for a batch; a gate accepts it in place of a number for ``tau``."""

    @abstractmethod
    def __call__(self, step: int, statistic: Tensor, mask: Tensor) -> float | Tensor:
        """Return tau, a number or a tensor with one element, at least 0.

        Args:
            step: optimizer steps taken.
            statistic: [B, T], nats: the reduced drift of each position's segment; masked positions are 0.
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
    """Tau that changes linearly from one value to another, and is constant afterwards.

    Args:
        start: tau at the first optimizer step.
        end: tau from step ``num_steps`` on.
        num_steps: optimizer steps from ``start`` to ``end``, at least 1.

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
    """Tau that gives the weights of each batch a target effective sample size.

    The effective sample size ``(sum w)^2 / (n * sum w^2)`` of ``w = exp(-tau * s)`` falls as tau rises: its logarithm
    has the derivative ``2 * (mean of s under w^2 - mean of s under w)``, and ``w^2`` puts more weight on small s. So
    bisection on the device finds tau. If the effective sample size at ``max_tau`` is still above the target, as on
    fresh rollouts without drift, the result is ``max_tau``.

    Args:
        target: effective sample size as a share of the positions, above 0 and below 1.
        max_tau: largest tau, per nat, at most a million.

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
        require(
            max_tau <= self._LARGEST,
            f"max_tau is {max_tau}, but must be at most {self._LARGEST:.0e}: tau is looked for nine decades below it",
        )
        self.target, self.max_tau = target, max_tau

    # 30 halvings of nine decades of tau give its natural logarithm to 2e-8.
    _DECADES, _HALVINGS, _LARGEST = 9, 30, 1e6

    def __call__(self, step: int, statistic: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TauSchedule.__call__`."""
        # Weights of a fixed mean depend only on differences of s; subtract the smallest s to avoid underflow.
        offset = statistic.masked_fill(~mask, torch.inf).amin() if mask.numel() else statistic.sum()
        excess = (statistic - offset).masked_fill(~mask, torch.inf)  # masked positions get weight 0
        low = statistic.new_full((), math.log(self.max_tau) - self._DECADES * math.log(10))
        high = statistic.new_full((), math.log(self.max_tau))
        for _ in range(self._HALVINGS):
            middle = (low + high) / 2
            weights = (-middle.exp() * excess).exp()
            size = weights.sum().square() / (mask.sum() * weights.square().sum())
            low, high = torch.where(size > self.target, middle, low), torch.where(size > self.target, high, middle)
        return high.exp().clamp(max=self.max_tau)
