"""Normalization of a gate's raw weights to loss weights.

Shapes: B rollouts, T response tokens.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.registry import suggestion

NormalizationName = Literal["mean", "residual", "clipped", "none"]

_USED = {"residual": {"rho"}, "clipped": {"low", "high"}}


@dataclass(frozen=True)
class Normalization:
    """Rule that turns the logarithms of raw weights into weights.

    With ``g`` the raw weight and ``w = g / mean(g)``, the mean taken over the valid positions of the batch:
    ``mean`` gives w (the paper), ``residual`` ``(1 - rho) + rho * w``, ``clipped`` clips w to [low, high] and divides
    by the mean again, ``none`` gives g. All but ``none`` have mean 1.

    Args:
        name: name of the rule.
        rho: share of w in ``residual``, 0 to 1.
        low: lower bound of ``clipped``, 0 to 1.
        high: upper bound of ``clipped``, at least 1.

    Raises:
        UsageError: an option is out of range, even if the rule does not use it.

    Example:
        >>> residual = Normalization("residual", rho=0.25)
        >>> residual
        Normalization(name='residual', rho=0.25)
        >>> residual(torch.tensor([[3.0, 1.0]]).log(), torch.ones(1, 2, dtype=torch.bool))
        tensor([[1.1250, 0.8750]])
    """

    name: NormalizationName = "mean"
    rho: float = 0.5
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        check_choice("normalization", self.name, get_args(NormalizationName))
        require(0 <= self.rho <= 1, f"rho is {self.rho}, but must lie between 0 and 1")
        require(
            0 <= self.low <= 1 <= self.high,
            f"low is {self.low} and high is {self.high}, but 0 <= low <= 1 <= high must hold",
        )

    @property
    def options(self) -> dict[str, Any]:
        """Return the options as a gate's constructor takes them: ``normalization``, ``rho``, ``low``, ``high``."""
        return {"normalization": self.name, "rho": self.rho, "low": self.low, "high": self.high}

    @property
    def unused(self) -> set[str]:
        """Return the options that have no effect under this rule."""
        return {"rho", "low", "high"} - _USED.get(self.name, set())

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in asdict(self).items() if name not in self.unused]
        return f"Normalization({', '.join(shown)})"

    def __call__(self, log_weight: Tensor, mask: Tensor) -> Tensor:
        """Return the weights, [B, T]; 0 at masked positions.

        Args:
            log_weight: [B, T], logarithms of the raw weights; ``-inf`` stands for a weight of 0.
            mask: [B, T] bool.
        """
        if self.name == "none":
            return log_weight.exp().masked_fill(~mask, 0.0)
        # Scale the largest weight to 1 before exp, so that the mean is never 0. If all weights are 0, all become 1.
        peak = log_weight.masked_fill(~mask, -torch.inf).amax() if log_weight.numel() else log_weight.sum()
        weights = torch.where(torch.isneginf(peak), torch.ones_like(log_weight), (log_weight - peak).exp())
        for clips in (False, True) if self.name == "clipped" else (False,):
            raw = (weights.clamp(self.low, self.high) if clips else weights).masked_fill(~mask, 0.0)
            # Sum in double: in float32, the error of the mean of a million weights exceeds their own rounding.
            mean = raw.sum(dtype=torch.float64) / mask.sum().clamp(min=1)
            weights = torch.where(mask, raw / mean.to(raw.dtype), torch.zeros_like(raw))
        return (1 - self.rho) * mask + self.rho * weights if self.name == "residual" else weights


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UsageError that names the nearest choice if ``gate.<key>`` is not one of ``choices``."""
    require(
        value in choices,
        f"{key} is '{value}', but must be one of {', '.join(choices)}{suggestion(str(value), choices)}",
    )
