"""Gradients of the head, summed over tiles.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, K support, r rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.scoring.head import LogitTiles, places, product, tiles, wide_dtype

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
    """Sums of the gradients of hidden states and head, over tiles or over a support.

    Args:
        ctx: context of an autograd function whose first inputs are hidden states and
            :attr:`opdlab.scoring.Head.tensors`.
        logits: the logits that the head computes from the hidden states.
    """

    def __init__(self, ctx: Any, logits: LogitTiles) -> None:
        head, hidden = logits.head, logits.hidden
        needs_hidden, needs_weight, needs_bias, self._needs_down, needs_up = ctx.needs_input_grad[:5]
        into: Tensor | None = None
        if needs_weight:
            existing = head.weight.grad if head.accumulates else None
            into = torch.zeros_like(head.weight) if existing is None else existing
            if head.accumulates:
                head.weight.grad = into
        self._head = head
        self._products = [_Product(hidden, head.weight, needs_hidden, into)]
        if head.low_rank is not None:
            up = head.low_rank.up
            into = torch.zeros_like(up) if needs_up else None
            self._products.append(_Product(logits.reduced, up, needs_hidden or self._needs_down, into))
        self._bias: Tensor | None = None
        if needs_bias and head.bias is not None:
            self._bias = head.bias.new_zeros(head.bias.shape, dtype=wide_dtype(hidden))

    def add_tile(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        """Add the gradient of a tile's raw logits, [N', C]; call in the order of :func:`opdlab.scoring.head.tiles`."""
        for each in self._products:
            each.add_tile(rows, columns, gradient)
        if self._bias is not None:
            self._bias[columns] += gradient.sum(0)

    def add_support(self, support: Tensor, gradient: Tensor) -> None:
        """Add the gradient of a support's raw logits: ids [N, K], gradient [N, K]."""
        if len(self._head.weight) <= _DENSE * support.shape[1]:
            for rows, columns in tiles(len(gradient), self._head):
                inside, place = places(support[rows], columns)
                tile = gradient.new_zeros(len(place), columns.stop - columns.start)
                self.add_tile(rows, columns, tile.scatter_add_(1, place, gradient[rows] * inside))
            return
        for each in self._products:
            each.add_support(support, gradient)
        if self._bias is not None:
            self._bias.index_add_(0, support.flatten(), gradient.flatten())

    def add_hidden(self, gradient: Tensor) -> None:
        """Add a gradient of the hidden states, [N, H]; they must take one."""
        states = self._products[0].of_states
        assert states is not None
        states += gradient

    def returned(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight, bias, ``down`` and ``up`` for autograd, in their dtypes."""
        head, plain, update = self._head, self._products[0], self._products[1:]
        hidden, down = plain.of_states, None
        if head.low_rank is not None and (reduced := update[0].of_states) is not None:
            if hidden is not None:
                hidden += head.low_rank.expand(reduced)
            if self._needs_down:
                summed = (reduced.T @ plain.states.to(reduced.dtype)).mul_(head.low_rank.scaling)  # [r, N] @ [N, H]
                down = summed.to(head.low_rank.down.dtype)
        return (
            None if hidden is None else hidden.to(plain.states.dtype),
            None if head.accumulates else plain.of_matrix,
            None if self._bias is None or head.bias is None else self._bias.to(head.bias.dtype),
            down,
            update[0].of_matrix if update else None,
        )


class _Product:
    """Gradients of ``states @ matrix.T``, summed in float32 or wider: sums of rounded products would bias training.

    Args:
        states: [N, R].
        matrix: [V, R].
        needs_states: True if the states take a gradient.
        of_matrix: [V, R], the buffer to which the gradient of the matrix is added; None if it takes none.
    """

    def __init__(self, states: Tensor, matrix: Tensor, needs_states: bool, of_matrix: Tensor | None) -> None:
        self.states, self.matrix, self.of_matrix = states, matrix, of_matrix
        self.of_states = states.new_zeros(states.shape, dtype=wide_dtype(states)) if needs_states else None
        self._columns: Tensor | None = None  # float32 sum of the current columns, for narrower matrices

    def add_tile(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        narrow = gradient.to(self.states.dtype)
        if self.of_states is not None:
            into, matrix = self.of_states[rows], self.matrix[columns].to(narrow.dtype)
            if narrow.dtype == into.dtype:
                into.addmm_(narrow, matrix)  # [N', C] @ [C, R], without memory for the product
            else:
                into += product(narrow, matrix)
        if self.of_matrix is not None:
            if self.of_matrix.dtype == self.states.dtype == wide_dtype(narrow):
                self.of_matrix[columns].addmm_(narrow.T, self.states[rows])  # [C, N'] @ [N', R]
                return
            summed = product(narrow.T, self.states[rows])  # [C, N'] @ [N', R]
            if self.of_matrix.dtype != summed.dtype:
                self._columns = summed if rows.start == 0 or self._columns is None else self._columns + summed
                summed = self._columns
            if self.of_matrix.dtype == summed.dtype or rows.stop == len(self.states):
                self.of_matrix[columns] += summed.to(self.of_matrix.dtype)  # narrow matrices are rounded once

    def add_support(self, support: Tensor, gradient: Tensor) -> None:
        if self.of_states is not None:
            self.of_states += _sum_rows(self.matrix, support, gradient)
        if self.of_matrix is not None:
            _scatter_rows(self.of_matrix, support, gradient, self.states)


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
