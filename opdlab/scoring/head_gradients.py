"""Gradients of the head, summed over tiles.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, K support, r rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.scoring.head import LogitTiles, LowRank, places, product, tiles, wide_dtype

# Floats of gathered head rows, and of outer products scattered into the gradient: 4 MB, which fit in the CPU cache.
MAX_PIECE = 1 << 20
# If the vocabulary is at most this many times the support, products with the whole head are faster than gathering and
# scattering rows; measured on a CPU.
_DENSE = 16


def pieces(num_rows: int, row_size: int) -> Iterator[slice]:
    """Yield slices of rows, each small enough to fit in the cache."""
    step = max(1, MAX_PIECE // max(row_size, 1))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


class HeadGradients:
    """Float32 sums of the gradients of hidden states and head; sums of rounded products would bias training.

    Args:
        ctx: context of an autograd function whose first inputs are hidden states and
            :attr:`opdlab.scoring.Head.tensors`.
        logits: the logits that the head computes from the hidden states.
    """

    def __init__(self, ctx: Any, logits: LogitTiles) -> None:
        head, hidden = logits.head, logits.hidden
        wide = wide_dtype(hidden)
        needs_hidden, needs_weight, needs_bias, needs_down, needs_up = ctx.needs_input_grad[:5]
        self._head, self._hidden_states = head, hidden
        self._hidden = hidden.new_zeros(hidden.shape, dtype=wide) if needs_hidden else None
        self._bias = head.bias.new_zeros(head.bias.shape, dtype=wide) if needs_bias and head.bias is not None else None
        self._weight: Tensor | None = None
        if needs_weight:
            existing = head.weight.grad if head.accumulates else None
            self._weight = torch.zeros_like(head.weight) if existing is None else existing
            if head.accumulates:
                head.weight.grad = self._weight
        self._columns: Tensor | None = None  # float32 sum of the current columns, for narrower weights
        self._update: _UpdateGradients | None = None
        if head.low_rank is not None:
            needed = (needs_hidden, needs_down, needs_up)
            self._update = _UpdateGradients(head.low_rank, logits.reduced, needed)

    def add_tile(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        """Add the gradient of a tile's raw logits, [N', C]; call in the order of :func:`opdlab.scoring.head.tiles`."""
        if self._update is not None:
            self._update.add_tile(rows, columns, gradient)
        narrow = gradient.to(self._hidden_states.dtype)
        if self._hidden is not None:
            self._hidden[rows] += product(narrow, self._head.weight[columns].to(narrow.dtype))  # [N', C] @ [C, H]
        if self._weight is not None:
            summed = product(narrow.T, self._hidden_states[rows])  # [C, N'] @ [N', H]
            if self._weight.dtype != summed.dtype:
                self._columns = summed if rows.start == 0 or self._columns is None else self._columns + summed
                summed = self._columns
            if self._weight.dtype == summed.dtype or rows.stop == len(self._hidden_states):
                self._weight[columns] += summed.to(self._weight.dtype)  # narrow weights are rounded once
        if self._bias is not None:
            self._bias[columns] += gradient.sum(0)

    def add_support(self, support: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a support's raw logits: ids [N, K], gradient [N, K]."""
        weight, hidden = self._head.weight, self._hidden_states
        if len(weight) <= _DENSE * support.shape[1]:
            for rows, columns in tiles(len(gradient), len(weight)):
                inside, place = places(support[rows], columns)
                tile = gradient.new_zeros(len(place), columns.stop - columns.start)
                self.add_tile(rows, columns, tile.scatter_add_(1, place, gradient[rows] * inside))
            return
        if self._update is not None:
            self._update.add_support(support, gradient)
        if self._hidden is not None:
            self._hidden += _sum_rows(weight, support, gradient)
        if self._weight is not None:
            _scatter_rows(self._weight, support, gradient, hidden)
        if self._bias is not None:
            self._bias.index_add_(0, support.flatten(), gradient.flatten())

    def returned(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight, bias, ``down`` and ``up`` for autograd, in their dtypes."""
        head = self._head
        update: tuple[Tensor | None, ...] = (None, None)
        if self._update is not None:
            update = self._update.returned(self._hidden_states, self._hidden)
        return (
            None if self._hidden is None else self._hidden.to(self._hidden_states.dtype),
            None if head.accumulates else self._weight,
            None if self._bias is None or head.bias is None else self._bias.to(head.bias.dtype),
            *update,
        )


class _UpdateGradients:
    """Float32 sums of the gradients of a low-rank update.

    Args:
        update: the update.
        reduced: [N, r], see :meth:`LowRank.reduce`.
        needed: whether hidden states, ``down`` and ``up`` take a gradient.
    """

    def __init__(self, update: LowRank, reduced: Tensor, needed: tuple[bool, bool, bool]) -> None:
        self._low_rank, self._states = update, reduced
        needs_hidden, self._needs_down, needs_up = needed
        self._reduced = torch.zeros_like(reduced) if needs_hidden or self._needs_down else None
        self._up = reduced.new_zeros(update.up.shape) if needs_up else None

    def add_tile(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        if self._reduced is not None:
            self._reduced[rows] += self._low_rank.sum_up(gradient, columns)
        if self._up is not None:
            self._up[columns] += gradient.T @ self._states[rows]  # [C, N'] @ [N', r]

    def add_support(self, support: Tensor, gradient: Tensor) -> None:
        if self._reduced is not None:
            self._reduced += _sum_rows(self._low_rank.up, support, gradient)
        if self._up is not None:
            _scatter_rows(self._up, support, gradient, self._states)

    def returned(self, hidden: Tensor, hidden_gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of ``down`` and ``up``, and add the update's part to ``hidden_gradient`` [N, H]."""
        update, down = self._low_rank, None
        if self._reduced is not None and hidden_gradient is not None:
            hidden_gradient += update.expand(self._reduced)
        if self._reduced is not None and self._needs_down:
            summed = (self._reduced.T @ hidden.to(self._reduced.dtype)).mul_(update.scaling)  # [r, N] @ [N, H]
            down = summed.to(update.down.dtype)
        return down, None if self._up is None else self._up.to(update.up.dtype)


def _sum_rows(matrix: Tensor, support: Tensor, factors: Tensor) -> Tensor:
    """Return the weighted sum of the chosen rows of a matrix [V, R]: ids and factors [N, K] -> [N, R]."""
    factors = factors.to(matrix.dtype)
    return nn.functional.embedding_bag(support, matrix.detach(), per_sample_weights=factors, mode="sum")


def _scatter_rows(into: Tensor, support: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add ``gradient[n, k] * states[n]``, [R], to row ``support[n, k]`` of ``into`` [V, R], for all n and k."""
    if into.dtype == gradient.dtype:
        used, place, rows = None, support, into
    else:
        used, place = torch.unique(support, return_inverse=True)
        rows = gradient.new_zeros(len(used), into.shape[1])
    for piece in pieces(len(states), support.shape[1] * states.shape[1]):
        outer = gradient[piece, :, None] * states[piece, None].to(gradient.dtype)  # [N', K, R]
        rows.index_add_(0, place[piece].flatten(), outer.flatten(0, 1))
    if used is not None:
        into.index_add_(0, used, rows.to(into.dtype))
