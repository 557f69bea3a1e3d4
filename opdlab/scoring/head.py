"""How hidden states become logits.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, r rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Logits held at any one time: 8 Mi floats, 32 MB in float32. A second tensor of that size holds their exponentials.
MAX_TILE_LOGITS = 1 << 23
_WIDE_PRODUCTS = torch.__version__ >= "2.8"  # torch.mm(…, out_dtype=…)
# Rows of a tile. With as many, a product with the head is bound by arithmetic and not by reading the head's weights.
_MAX_TILE_ROWS = 4096


@dataclass(frozen=True)
class LowRank:
    """LoRA's update of a head's weight (arXiv 2106.09685): ``scaling * up @ down``, which is never multiplied out.

    It would be as large as the weight. Products with its factors are taken in float32 or wider.

    Args:
        down: [r, H], peft's ``lora_A``.
        up: [V, r], peft's ``lora_B``.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` where the update is rank-stabilised.
    """

    down: Tensor
    up: Tensor
    scaling: float

    def reduce(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, r]: what ``up`` is multiplied with, to be added to raw logits."""
        dtype = wide_dtype(hidden)
        return (hidden.to(dtype) @ self.down.to(dtype).T).mul_(self.scaling)

    def expand(self, sums: Tensor) -> Tensor:
        """[N, r] -> [N, H]: of sums of rows of ``up``, the sums of rows of the update."""
        return (sums @ self.down.to(sums.dtype)).mul_(self.scaling)

    def sum_up(self, factors: Tensor, columns: slice) -> Tensor:
        """[N, C] -> [N, r]: rows of ``up``, summed by their factors."""
        return factors @ self.up[columns].to(factors.dtype)


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits, and the temperature at which they are scored.

    Logits are, in this order: ``z = hidden @ (weight + low_rank).T + bias``; ``z *= scale``;
    ``z = softcap * tanh(z / softcap)``; ``z /= temperature``.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: bound of the soft cap (Gemma's ``final_logit_softcapping``), or None.
        temperature: sampling temperature, above 0.
        accumulate_grad: add the weight's gradient to ``weight.grad`` in the backward pass instead of returning it to
            autograd: one buffer of V x H less where a gradient is there already. Only for a weight that is a leaf and
            has no gradient hooks, as without DDP and FSDP; ``torch.autograd.grad`` then sees no gradient of it.
        low_rank: what LoRA adds to the weight, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    accumulate_grad: bool = False
    low_rank: LowRank | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Whatever may take a gradient: weight, bias, and the low-rank update's ``down`` and ``up``."""
        down, up = (None, None) if self.low_rank is None else (self.low_rank.down, self.low_rank.up)
        return self.weight, self.bias, down, up

    @property
    def trained(self) -> bool:
        """Whether any of it takes a gradient."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    @property
    def accumulates(self) -> bool:
        """Whether the backward pass adds to ``weight.grad`` by itself."""
        return self.accumulate_grad and self.weight.is_leaf and self.weight.requires_grad

    def gathered(self) -> "Head":
        """Return the head with whole tensors, where they are sharded over processes (DTensors); differentiable."""
        # The tensors are asked, since not every build of torch has the class.
        if not any(hasattr(tensor, "full_tensor") for tensor in self.tensors):
            return self
        return self._with(lambda tensor: getattr(tensor, "full_tensor", lambda: tensor)())

    def detached(self) -> "Head":
        """The same, none of whose tensors takes a gradient."""
        return self._with(Tensor.detach)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Head":
        bias = None if self.bias is None else change(self.bias)
        low_rank = None
        if self.low_rank is not None:
            low_rank = replace(self.low_rank, down=change(self.low_rank.down), up=change(self.low_rank.up))
        return replace(self, weight=change(self.weight), bias=bias, low_rank=low_rank)

    def tile(self, hidden: Tensor, columns: slice) -> Tensor:
        """[N, H] -> [N, C]: the logits of some columns, float32 or wider, without a graph."""
        return LogitTiles(self, hidden).tile(slice(None), columns)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, the low-rank update included: ids [N] -> [N, H]."""
        chosen = self.weight[ids].to(dtype)
        return chosen if self.low_rank is None else chosen + self.low_rank.expand(self.low_rank.up[ids].to(dtype))

    def sum_rows(self, factors: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """Rows of some columns, summed by their factors [N, C]: [N, H], the low-rank update included.

        Args:
            factors: float32 or wider.
            columns: C of them.
            dtype: of the product with the weight; the update's is as wide as the factors.
        """
        summed = product(factors.to(dtype), self.weight[columns].to(dtype))
        if self.low_rank is not None:
            summed += self.low_rank.expand(self.low_rank.sum_up(factors, columns))
        return summed

    def transform_(self, z: Tensor) -> Tensor:
        """Apply scale, soft cap and temperature to raw logits, in place."""
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return z if factor == 1.0 else z.mul_(factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of logits by raw logits, from the logits; without a cap the same for all."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(factor)


@dataclass(frozen=True)
class LogitTiles:
    """Logits of N positions, of which a tile at a time is made: float32 or wider, without a graph.

    Args:
        head: makes them.
        hidden: [N, H].
    """

    head: Head
    hidden: Tensor

    @cached_property
    def reduced(self) -> Tensor:
        """[N, r]: the hidden states multiplied with the low-rank update's first factor, if the head has one."""
        assert self.head.low_rank is not None
        return self.head.low_rank.reduce(self.hidden)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """[N', C]."""
        head, hidden = self.head, self.hidden[rows]
        z = product(hidden, head.weight[columns].to(hidden.dtype).T)
        if head.low_rank is not None:
            z.addmm_(self.reduced[rows], head.low_rank.up[columns].to(z.dtype).T)
        if head.bias is not None:
            z += head.bias[columns]
        return head.transform_(z)

    def chosen(self, rows: slice, ids: Tensor) -> Tensor:
        """[N', K]: logits of some ids [N', K] alone."""
        head, hidden, dtype = self.head, self.hidden[rows, :, None], wide_dtype(self.hidden)
        z = torch.bmm(head.weight[ids].to(dtype), hidden.to(dtype))
        if head.low_rank is not None:
            z.baddbmm_(head.low_rank.up[ids].to(dtype), self.reduced[rows, :, None])
        z = z.squeeze(-1)
        if head.bias is not None:
            z += head.bias[ids]
        return head.transform_(z)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def autocast_inputs(hidden: Tensor) -> Iterator[Tensor]:
    """Cast the hidden states as autocast would, and switch it off inside.

    The backward pass runs without autocast and must repeat the same logits.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        yield hidden
        return
    narrow = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        yield narrow


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32 or wider: sums of products that were rounded to half precision would bias training."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda and _WIDE_PRODUCTS:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def tiles(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut [num_rows, num_columns] into tiles of bounded size: columns by columns, each with all its rows.

    All rows of some columns come one after the other, so that whatever is summed over rows is complete before the next
    columns begin.

    Example:
        >>> list(tiles(2, 3))
        [(slice(0, 2, None), slice(0, 3, None))]
    """
    height = min(max(num_rows, 1), _MAX_TILE_ROWS, MAX_TILE_LOGITS)
    width = min(max(MAX_TILE_LOGITS // height, 1), max(num_columns, 1))
    for left in range(0, num_columns, width):
        columns = slice(left, min(left + width, num_columns))
        for top in range(0, num_rows, height):
            yield slice(top, min(top + height, num_rows)), columns


def places(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether ids [N, K] are among some columns, and where among them (anywhere if they are not)."""
    inside = (ids >= columns.start) & (ids < columns.stop)
    return inside, (ids - columns.start).clamp_(0, columns.stop - columns.start - 1)
