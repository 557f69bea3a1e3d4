"""The output head: computes logits from hidden states.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, r rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

# Logits held at any one time: 8 Mi floats, 32 MB in float32. A second tensor of that size holds their exponentials.
MAX_TILE_LOGITS = 1 << 23
_WIDE_PRODUCTS = torch.__version__ >= "2.8"  # torch.mm(…, out_dtype=…)
# Rows of a tile. With this many rows, arithmetic limits the product with the head, not reading the head's weights.
_MAX_TILE_ROWS = 4096
# A tile of a small vocabulary may have more rows, up to so many logits, 1 MB in float32: they fit in a CPU's cache.
_SMALL_TILE_LOGITS = 1 << 18


@dataclass(frozen=True)
class LowRank:
    """LoRA update of a head's weight (arXiv 2106.09685), ``scaling * up @ down``, [V, H]; kept as two factors.

    The full product would be as large as the weight. Products with the factors use float32 or wider.

    Args:
        down: [r, H], peft's ``lora_A``.
        up: [V, r], peft's ``lora_B``.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` if the update is rank-stabilised.
    """

    down: Tensor
    up: Tensor
    scaling: float

    def reduce(self, hidden: Tensor) -> Tensor:
        """Return ``scaling * hidden @ down.T``, [N, H] -> [N, r]; its product with ``up.T`` is added to raw logits."""
        dtype = wide_dtype(hidden)
        return (hidden.to(dtype) @ self.down.to(dtype).T).mul_(self.scaling)

    def expand(self, sums: Tensor) -> Tensor:
        """Return ``scaling * sums @ down``, [N, r] -> [N, H]: maps sums of rows of ``up`` to sums of update rows."""
        return (sums @ self.down.to(sums.dtype)).mul_(self.scaling)


@dataclass(frozen=True)
class Head:
    """The output head of a model, and the temperature at which it is scored.

    Logits are computed in this order: ``z = hidden @ (weight + low_rank).T + bias``; ``z *= scale``;
    ``z = softcap * tanh(z / softcap)``; ``z /= temperature``.

    Args:
        weight: [V, H], or with more rows, see ``vocab_size``.
        bias: as long as the weight, or None.
        scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: bound of the soft cap (Gemma's ``final_logit_softcapping``), or None.
        temperature: sampling temperature, above 0.
        accumulate_grad: add the weight's gradient to ``weight.grad`` in the backward pass instead of returning it to
            autograd. This saves one V x H buffer if a gradient already exists. Only for a leaf weight without gradient
            hooks (so not with DDP or FSDP); ``torch.autograd.grad`` then returns no gradient for it.
        low_rank: the LoRA update of the weight, or None.
        vocab_size: V, number of tokens, if the weight has more rows: the first V rows are used, and the distribution
            is over them. Other rows only pad the weight; their gradient is 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    accumulate_grad: bool = False
    low_rank: LowRank | None = None
    vocab_size: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the tensors that may take a gradient: weight, bias, and the low-rank update's ``down`` and ``up``."""
        down, up = (None, None) if self.low_rank is None else (self.low_rank.down, self.low_rank.up)
        return self.weight, self.bias, down, up

    @property
    def num_ids(self) -> int:
        """Return V, the number of ids of the distribution."""
        return len(self.weight) if self.vocab_size is None else self.vocab_size

    @property
    def trained(self) -> bool:
        """True if any of the tensors takes a gradient."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    @property
    def accumulates(self) -> bool:
        """True if the backward pass adds to ``weight.grad`` itself."""
        return self.accumulate_grad and self.weight.is_leaf and self.weight.requires_grad

    def gathered(self) -> "Head":
        """Return the head with tensors that are sharded over processes (DTensors) gathered; all call it together.

        The gradient of each process stays its own. A head that is trained is therefore gathered by its model's pass,
        see :class:`opdlab.policies.sharding.Sharding`, and this is for a frozen teacher's.
        """
        # Check for the method, because not every build of torch has the DTensor class.
        if not any(hasattr(tensor, "full_tensor") for tensor in self.tensors):
            return self
        return self._with(lambda tensor: getattr(tensor, "full_tensor", lambda: tensor)())

    def detached(self) -> "Head":
        """Return the head with detached tensors."""
        return self._with(Tensor.detach)

    def on(self, device: torch.device) -> "Head":
        """Return the head with its tensors on a device; tensors that are there already are shared."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Head":
        bias = None if self.bias is None else change(self.bias)
        low_rank = None
        if self.low_rank is not None:
            low_rank = replace(self.low_rank, down=change(self.low_rank.down), up=change(self.low_rank.up))
        return replace(self, weight=change(self.weight), bias=bias, low_rank=low_rank)

    def tile(self, hidden: Tensor, columns: slice) -> Tensor:
        """Return the logits of some columns, [N, H] -> [N, C], float32 or wider, without a graph."""
        return LogitTiles(self, hidden).tile(slice(None), columns)

    def transform_(self, z: Tensor) -> Tensor:
        """Apply scale, soft cap and temperature to raw logits, in place."""
        if self.softcap is None:
            return z.mul_(self.scale / self.temperature)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of logits with respect to raw logits, given the logits; a scalar without a soft cap."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(factor)


Buffers = dict[str, Tensor]
"""Memory that is used again from tile to tile, by name; see :func:`reused`."""


def reused(buffers: Buffers, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor of any content, in memory that earlier ones of the same name have used.

    On a CPU, new memory costs as much as several passes over it.
    """
    numel, known = math.prod(shape), buffers.get(name)
    if known is None or known.numel() < numel or known.dtype != like.dtype:
        known = buffers[name] = like.new_empty(numel)
    return known[:numel].view(*shape)


@dataclass(frozen=True)
class LogitTiles:
    """Logits of N positions, computed one tile at a time: float32 or wider, without a graph.

    A tile is overwritten by the next one.

    Args:
        head: computes the logits.
        hidden: [N, H].
    """

    head: Head
    hidden: Tensor
    _memory: Buffers = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def reduced(self) -> Tensor:
        """Return ``head.low_rank.reduce(hidden)``, [N, r]; the head must have a low-rank update."""
        assert self.head.low_rank is not None
        return self.head.low_rank.reduce(self.hidden)

    @torch.no_grad()
    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Return the logits of some rows and columns, [N', C]."""
        head, hidden, out = self.head, self.hidden[rows], None
        weight = head.weight[columns].to(hidden.dtype)
        if not hidden.is_cuda:
            like = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
            out = reused(self._memory, "tile", (len(hidden), len(weight)), like)
        z = product(hidden, weight.T, out)  # [N', H] @ [H, C]
        if head.low_rank is not None:
            z.addmm_(self.reduced[rows], head.low_rank.up[columns].to(z.dtype).T)  # [N', r] @ [r, C]
        if head.bias is not None:
            z += head.bias[columns]
        return z if head.softcap is None and head.scale == head.temperature else head.transform_(z)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or the dtype of ``x`` if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def autocast_inputs(hidden: Tensor) -> Iterator[Tensor]:
    """Yield the hidden states cast as autocast would cast them, and disable autocast inside the context.

    The backward pass runs without autocast and must recompute the same logits.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        yield hidden
        return
    narrow = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        yield narrow


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``a @ b`` in float32 or wider: rounding the sums to half precision would bias training.

    Args:
        a: [M, R].
        b: [R, C].
        out: [M, C] of the result's dtype, on a CPU; None for new memory.
    """
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    if narrow and a.is_cuda and _WIDE_PRODUCTS:
        return torch.mm(a, b, out_dtype=torch.float32)
    if narrow:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def tiles(num_rows: int, head: Head, start: int = 0) -> Iterator[tuple[slice, slice]]:
    """Yield the row and column slices of tiles of bounded size that cover the logits, [num_rows, V].

    If ``start`` is given, the columns before it are left out.

    All tiles of the same columns are consecutive, so a sum over rows is complete before the next columns begin.

    Example:
        >>> list(tiles(2, Head(torch.zeros(8, 1), vocab_size=3)))
        [(slice(0, 2, None), slice(0, 3, None))]
    """
    num_columns = len(head.weight) if head.vocab_size is None else head.vocab_size
    tallest = max(_MAX_TILE_ROWS, _SMALL_TILE_LOGITS // max(num_columns, 1))
    height = min(max(num_rows, 1), tallest, MAX_TILE_LOGITS)
    width = min(max(MAX_TILE_LOGITS // height, 1), max(num_columns, 1))
    for left in range(start, num_columns, width):
        columns = slice(left, min(left + width, num_columns))
        for top in range(0, num_rows, height):
            yield slice(top, min(top + height, num_rows)), columns


def places(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return which ids [N, K] are in the columns, [N, K] bool, and their indices in them (arbitrary if outside)."""
    nearest = ids.clamp(columns.start, columns.stop - 1)
    return nearest == ids, nearest - columns.start if columns.start else nearest
