"""Gradients of the head, summed over tiles.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, K support.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.scoring.head import Head, places, product, tiles

# Floats of gathered rows of the head, and of outer products scattered into its gradient: 4 MB, which stay in a cache.
MAX_PIECE = 1 << 20
# Where the vocabulary has at most so many times the support's tokens, products with the whole head are faster than rows
# gathered and scattered; measured on a CPU.
_DENSE = 16


def pieces(num_rows: int, row_size: int) -> Iterator[slice]:
    """Cut rows of some size into pieces that stay in the cache."""
    step = max(1, MAX_PIECE // max(row_size, 1))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


class HeadGradients:
    """Sums the gradients of hidden states, weight and bias in float32: sums of rounded products would bias training.

    Args:
        ctx: of an autograd function whose first three inputs are hidden states, weight and bias.
        head: the head.
        hidden: [N, H].
    """

    def __init__(self, ctx: Any, head: Head, hidden: Tensor) -> None:
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        self._head, self._hidden_states = head, hidden
        self._hidden = hidden.new_zeros(hidden.shape, dtype=wide) if needs_hidden else None
        self._bias = head.bias.new_zeros(head.bias.shape, dtype=wide) if needs_bias and head.bias is not None else None
        self._weight = self._weight_buffer() if needs_weight else None
        self._columns: Tensor | None = None  # float32 sum of the columns that are under way, of a narrower weight

    def _weight_buffer(self) -> Tensor:
        weight = self._head.weight
        if not self._head.accumulates:
            return torch.zeros_like(weight)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad

    def add_tile(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        """Add the gradient of raw logits of a tile, [N', C]; tiles come as :func:`opdlab.scoring.head.tiles` yields."""
        narrow = gradient.to(self._hidden_states.dtype)
        if self._hidden is not None:
            self._hidden[rows] += product(narrow, self._head.weight[columns].to(narrow.dtype))
        if self._weight is not None:
            self._add_columns(rows, columns, product(narrow.T, self._hidden_states[rows]))
        if self._bias is not None:
            self._bias[columns] += gradient.sum(0)

    def _add_columns(self, rows: slice, columns: slice, summed: Tensor) -> None:
        assert self._weight is not None
        if self._weight.dtype == summed.dtype:
            self._weight[columns] += summed
            return
        self._columns = summed if rows.start == 0 or self._columns is None else self._columns + summed
        if rows.stop == len(self._hidden_states):
            self._weight[columns] += self._columns.to(self._weight.dtype)  # rounded once

    def add_support(self, support: Tensor, gradient: Tensor) -> None:
        """Add the gradient of raw logits of a support: ids [N, K], gradient [N, K]."""
        weight, hidden = self._head.weight, self._hidden_states
        if len(weight) <= _DENSE * support.shape[1]:
            self._add_dense(support, gradient)
            return
        if self._hidden is not None:
            bags = nn.functional.embedding_bag(
                support, weight.detach(), per_sample_weights=gradient.to(weight.dtype), mode="sum"
            )
            self._hidden += bags
        if self._weight is not None:
            self._scatter_rows(self._weight, support, gradient, hidden)
        if self._bias is not None:
            self._bias.index_add_(0, support.flatten(), gradient.flatten())

    def _add_dense(self, support: Tensor, gradient: Tensor) -> None:
        for rows, columns in tiles(len(gradient), len(self._head.weight)):
            inside, place = places(support[rows], columns)
            tile = gradient.new_zeros(len(place), columns.stop - columns.start)
            self.add_tile(rows, columns, tile.scatter_add_(1, place, gradient[rows] * inside))

    @staticmethod
    def _scatter_rows(into: Tensor, support: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        if into.dtype == gradient.dtype:
            used, place, rows = None, support, into
        else:
            used, place = torch.unique(support, return_inverse=True)
            rows = gradient.new_zeros(len(used), into.shape[1])
        for piece in pieces(len(hidden), support.shape[1] * hidden.shape[1]):
            outer = gradient[piece, :, None] * hidden[piece, None].to(gradient.dtype)
            rows.index_add_(0, place[piece].flatten(), outer.flatten(0, 1))
        if used is not None:
            into.index_add_(0, used, rows.to(into.dtype))

    def returned(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias for autograd, in their dtypes."""
        head = self._head
        return (
            None if self._hidden is None else self._hidden.to(self._hidden_states.dtype),
            None if head.accumulates else self._weight,
            None if self._bias is None or head.bias is None else self._bias.to(head.bias.dtype),
        )
