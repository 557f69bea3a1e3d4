"""Drift and weights by the age of the rollouts, summed over the steps of a run on the device.

Age is the number of optimizer steps since the last refresh of the snapshot that sampled a rollout; the reuse
epoch is the number of passes over its buffer before this one. Drift is in nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.diagnostics.trace import StepTrace

MAX_AGES = 64
"""Number of rows for ages; the last row holds all older rollouts too."""
MAX_EPOCHS = 16
"""Number of rows for reuse epochs; the last row holds all later ones too."""

_ROWS = MAX_AGES + MAX_EPOCHS
_COLUMNS = 4  # positions, sum of |d|, sum of w - 1, sum of (w - 1)^2


def new_age_table(device: torch.device | str = "cpu") -> Tensor:
    """Return an empty table of sums: [ages and then reuse epochs, 4] float64."""
    return torch.zeros(_ROWS, _COLUMNS, dtype=torch.float64, device=device)


@torch.no_grad()
def add_to_age_table(table: Tensor, trace: StepTrace) -> None:
    """Add a micro-batch's valid positions by a dozen small operations, without waiting for the device.

    Args:
        table: on the trace's device; changed in place.
        trace: of the micro-batch.
    """
    valid = trace.inputs.mask.bool()
    # Sums of (w - 1)^2: weights lie around 1, so sums of w^2 would cancel in the standard deviation.
    excess = (trace.gates.weights.double() - 1).masked_fill(~valid, 0.0)
    columns = torch.stack([valid.double(), trace.inputs.drift.abs().double(), excess, excess.square()])
    rollouts = columns.sum(2).T
    table.index_add_(0, trace.age.clamp(0, MAX_AGES - 1), rollouts)
    table[MAX_AGES + min(trace.reuse_epoch, MAX_EPOCHS - 1)].add_(rollouts.sum(0))


@dataclass(frozen=True)
class AgeMetrics:
    """Means over the valid positions of each age that occurred, oldest last.

    Args:
        ages: optimizer steps, or reuse epochs.
        num_positions: number of positions in the means.
        drift: mean of ``|d|``, nats.
        weight_mean: mean of the weights.
        weight_std: standard deviation of the weights.
    """

    ages: list[int]
    num_positions: list[int]
    drift: list[float]
    weight_mean: list[float]
    weight_std: list[float]


def read_ages(table: Tensor) -> tuple[AgeMetrics, AgeMetrics]:
    """Return metrics by age, and by reuse epoch, of a table on the host."""
    by_age, by_epoch = table[:MAX_AGES], table[MAX_AGES:]
    return _metrics(by_age), _metrics(by_epoch)


def _metrics(sums: Tensor) -> AgeMetrics:
    ages = sums[:, 0].nonzero().flatten()
    num, drift, excess, squares = sums[ages].unbind(1)
    mean = excess / num
    std = (squares / num - mean.square()).clamp(min=0).sqrt()
    columns = (ages, num.long(), drift / num, 1 + mean, std)
    return AgeMetrics(*(column.tolist() for column in columns))


def age_scalars(table: Tensor) -> dict[str, float]:
    """Return the metrics of a table on the host, by their name in the log.

    Example:
        >>> table = new_age_table()
        >>> table[3] = torch.tensor([4.0, 0.8, 0.4, 0.12])
        >>> {tag: round(value, 3) for tag, value in age_scalars(table).items()}
        {'age/drift/003': 0.2, 'age/weight_mean/003': 1.1, 'age/weight_std/003': 0.141}
    """
    scalars = {}
    for family, digits, metrics in zip(("age", "reuse_epoch"), (3, 1), read_ages(table), strict=True):
        for name in ("drift", "weight_mean", "weight_std"):
            for age, value in zip(metrics.ages, getattr(metrics, name), strict=True):
                scalars[f"{family}/{name}/{age:0{digits}d}"] = value
    return scalars
