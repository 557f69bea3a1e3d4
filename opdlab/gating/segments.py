"""Segments: groups of a response's positions, and reductions over them.

Shapes: B rollouts, T response tokens.
"""

from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["signed_mean", "abs_mean", "rms", "max"]


def dense_ids(labels: Tensor, mask: Tensor) -> Tensor:
    """Return each row's labels renumbered 0, 1, … in their own order, counting valid positions only.

    Args:
        labels: [B, T] integers.
        mask: [B, T] bool.

    Returns:
        [B, T] long, -1 at masked positions.

    Example:
        >>> dense_ids(torch.tensor([[7, 7, 900, 3]]), torch.tensor([[True, True, True, False]]))
        tensor([[ 0,  0,  1, -1]])
    """
    labels = labels.long()
    # Masked positions sort last, so they do not shift the numbers of valid positions.
    ordered, order = labels.masked_fill(~mask, torch.iinfo(torch.long).max).sort(dim=1)
    steps = torch.zeros_like(ordered)
    steps[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(labels).scatter_(1, order, steps.cumsum(1)).masked_fill(~mask, -1)


def segment_reduce(values: Tensor, ids: Tensor, mask: Tensor, how: Literal["mean", "amax"]) -> Tensor:
    """Return the mean, or the maximum with 0, of each position's segment, [B, T]; 0 at masked positions.

    The arguments are those of :func:`segment_statistic`; ``values`` is [B, T] and may hold any values.
    """
    # [B, T + 1]: one bucket per possible segment, and the last one for masked positions.
    index = torch.where(mask, ids, values.shape[1])
    buckets = values.new_zeros(values.shape[0], values.shape[1] + 1)
    if how == "amax":
        return buckets.scatter_reduce(1, index, values, "amax").gather(1, index).masked_fill(~mask, 0.0)
    total = buckets.scatter_reduce(1, index, values, "sum").gather(1, index)
    count = buckets.scatter_reduce(1, index, mask.to(values.dtype), "sum").gather(1, index)
    return (total / count.clamp(min=1)).masked_fill(~mask, 0.0)


def segment_statistic(drift: Tensor, ids: Tensor, mask: Tensor, statistic: Statistic) -> Tensor:
    """Return the reduction of the drift over each position's segment.

    Args:
        drift: [B, T], nats.
        ids: [B, T] long, numbers from 0 per row; see :func:`dense_ids`.
        mask: [B, T] bool.
        statistic: see :class:`opdlab.gating.DriftGate`.

    Returns:
        [B, T], nats, at least 0; 0 at masked positions.

    Example:
        >>> drift = torch.tensor([[1.0, -1.0, 3.0]])
        >>> ids, mask = torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool)
        >>> segment_statistic(drift, ids, mask, "signed_mean"), segment_statistic(drift, ids, mask, "rms")
        (tensor([[0., 0., 3.]]), tensor([[1., 1., 3.]]))
    """
    if statistic == "signed_mean":
        return segment_reduce(drift, ids, mask, "mean").abs()
    if statistic == "abs_mean":
        return segment_reduce(drift.abs(), ids, mask, "mean")
    peak = segment_reduce(drift.abs(), ids, mask, "amax")
    if statistic == "max":
        return peak
    # Scale by the segment's largest drift, so that squares neither overflow nor underflow.
    scale = torch.where(peak > 0, peak, torch.ones_like(peak))
    return segment_reduce((drift / scale).square(), ids, mask, "mean").sqrt() * peak
