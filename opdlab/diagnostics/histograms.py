"""Histograms of many groups of positions at once, on the device, without waiting for it.

Shapes: M positions, R rows (one histogram each), K bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Binning:
    """Bins that are fine around a centre and coarse far from it, between the smallest and the largest value.

    Edges are equally spaced in ``u = asinh((x - centre) / scale)``: about ``scale`` wide near the centre and a constant
    share of the distance from it further out, so that a drift of 20 nats does not hide those of 0.01.

    Args:
        centre: where bins are finest.
        scale: distance from the centre up to which bins are about equally wide.
        num_bins: K.
    """

    centre: float
    scale: float
    num_bins: int = 64

    def compress(self, values: Tensor) -> Tensor:
        """Return u of the values."""
        return torch.asinh((values - self.centre) / self.scale)

    def edges(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the edges of the bins between two scalars, [K + 1]."""
        ends = self.compress(torch.stack([low, high]))
        steps = torch.linspace(0, 1, self.num_bins + 1, dtype=ends.dtype)
        edges = self.centre + self.scale * torch.sinh(ends[0] + (ends[1] - ends[0]) * steps)
        edges[0], edges[-1] = low, high
        return edges


@dataclass(frozen=True)
class Histogram:
    """A histogram in the form that loggers take. Only its bins are approximate.

    Args:
        min: least value.
        max: greatest value.
        num: number of values.
        sum: of the values.
        sum_squares: of the values.
        limits: upper edge of each bin, ascending.
        counts: values in each bin.
    """

    min: float
    max: float
    num: int
    sum: float
    sum_squares: float
    limits: list[float]
    counts: list[int]


# Columns of a table before its counts.
_MIN, _MAX, _SUM, _SQUARES, _COUNTS = range(5)


def bin_rows(values: Tensor, rows: Tensor, num_rows: int, binning: Binning) -> Tensor:
    """Return one histogram of values per row, all rows with the same edges.

    All operations have results of a known size, so that nothing waits for an accelerator: no ``torch.bincount``, no
    boolean indices.

    Args:
        values: [M] float64.
        rows: [M] long: row of each value, 0 to R - 1; values of row R are left out.
        num_rows: R.
        binning: of the values.

    Returns:
        [R, 4 + K] float64: minimum, maximum, sum, sum of squares, counts; see :func:`read_histograms`.
    """
    num_bins = binning.num_bins
    low = values.new_full((num_rows + 1,), torch.inf).scatter_reduce_(0, rows, values, "amin")
    high = values.new_full((num_rows + 1,), -torch.inf).scatter_reduce_(0, rows, values, "amax")
    ends = binning.compress(torch.stack([low[:-1].amin(), high[:-1].amax()]))
    width = (ends[1] - ends[0]).clamp(min=torch.finfo(values.dtype).tiny)
    place = (binning.compress(values) - ends[0]) / width * num_bins
    bins = place.nan_to_num().clamp(0, num_bins - 1).long()
    counts = values.new_zeros((num_rows + 1) * num_bins).index_add_(0, rows * num_bins + bins, torch.ones_like(values))
    sums = values.new_zeros(num_rows + 1, 2).index_add_(0, rows, torch.stack([values, values.square()], 1))
    return torch.cat([torch.stack([low, high], 1), sums, counts.view(num_rows + 1, num_bins)], 1)[:-1]


def merged_rows(table: Tensor) -> Tensor:
    """Return the histogram of all rows together, [1, 4 + K]."""
    merged = table.sum(0, keepdim=True)
    merged[0, _MIN], merged[0, _MAX] = table[:, _MIN].amin(), table[:, _MAX].amax()
    return merged


def row_totals(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number and the sum of each row's values, [R] each."""
    return table[:, _COUNTS:].sum(1), table[:, _SUM]


def read_histograms(table: Tensor, binning: Binning) -> list[Histogram | None]:
    """Return the histograms of a table on the host; None for a row without values.

    Args:
        table: [R, 4 + K], see :func:`bin_rows`: all of its rows, because they share the edges.
        binning: of the table.

    Example:
        >>> binning = Binning(centre=0.0, scale=1.0, num_bins=2)
        >>> values, rows = torch.tensor([1.0, 2.0, -2.0, 9.0]).double(), torch.tensor([0, 0, 1, 3])
        >>> first, second, third = read_histograms(bin_rows(values, rows, 3, binning), binning)
        >>> first.num, first.sum, first.sum_squares, first.limits, first.counts
        (2, 3.0, 5.0, [2.0], [2])
        >>> second.min, second.limits, third
        (-2.0, [0.0], None)
    """
    limits = binning.edges(table[:, _MIN].amin(), table[:, _MAX].amax())[1:].tolist()
    histograms: list[Histogram | None] = []
    for low, high, total, squares, *floats in table.tolist():
        counts = [int(count) for count in floats]
        used = [index for index, count in enumerate(counts) if count]
        kept = slice(used[0], used[-1] + 1) if used else slice(0)  # drop empty bins at the ends
        found = Histogram(low, high, sum(counts), total, squares, limits[kept], counts[kept])
        histograms.append(found if used else None)
    return histograms
