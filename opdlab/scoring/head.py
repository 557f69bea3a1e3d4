"""How hidden states become logits.

Shapes: N positions, H hidden size, V vocabulary, C of its columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Logits held at any one time: 8 Mi floats, 32 MB in float32. A second tensor of that size holds their exponentials.
MAX_TILE_LOGITS = 1 << 23
_WIDE_PRODUCTS = torch.__version__ >= "2.8"  # torch.mm(…, out_dtype=…)
# Rows of a tile. With as many, a product with the head is bound by arithmetic and not by reading the head's weights.
_MAX_TILE_ROWS = 4096


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits, and the temperature at which they are scored.

    Logits are, in this order: ``z = hidden @ weight.T + bias``; ``z *= scale``; ``z = softcap * tanh(z / softcap)``;
    ``z /= temperature``.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: bound of the soft cap (Gemma's ``final_logit_softcapping``), or None.
        temperature: sampling temperature, above 0.
        accumulate_grad: add the weight's gradient to ``weight.grad`` in the backward pass instead of returning it to
            autograd: one buffer of V x H less where a gradient is there already. Only for a weight that is a leaf and
            has no gradient hooks, as without DDP and FSDP; ``torch.autograd.grad`` then sees no gradient of it.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    accumulate_grad: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether the backward pass adds to ``weight.grad`` by itself."""
        return self.accumulate_grad and self.weight.is_leaf and self.weight.requires_grad

    def gathered(self) -> "Head":
        """The same with the whole weight, where it is sharded over processes (a DTensor); differentiable."""
        weight, bias = whole(self.weight), None if self.bias is None else whole(self.bias)
        return self if weight is self.weight else replace(self, weight=weight, bias=bias)

    def tile(self, hidden: Tensor, columns: slice) -> Tensor:
        """[N, H] -> [N, C]: the logits of some columns, float32 or wider, without a graph."""
        z = product(hidden, self.weight[columns].to(hidden.dtype).T)
        if self.bias is not None:
            z += self.bias[columns]
        return self.transform_(z)

    def transform_(self, z: Tensor) -> Tensor:
        """Apply scale, soft cap and temperature to raw logits, in place."""
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return z if factor == 1.0 else z.mul_(factor)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of logits by ``hidden @ weight.T``, from the logits; without a cap the same for all."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0).mul_(factor)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's whole tensor. Asked of the tensor, since not every build of torch has the class."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def wide_dtype(x: Tensor) -> torch.dtype:
    """Float32, or what is wider."""
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def autocast_at_the_door(hidden: Tensor) -> Iterator[Tensor]:
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
