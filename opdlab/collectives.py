"""Collectives: what the processes of a run exchange, each of which holds some rows of an optimizer batch.

All processes call a function together, and each gets the same result. Results do not depend on padding.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the whole numbers of each process, in the order of the processes; the host waits for them.

    Args:
        numbers: of this process; the others give as many.
        device: the run's, through which they travel.
    """
    own = torch.tensor(numbers, device=device)
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    found: list[list[int]] = torch.stack(parts).tolist()
    return found


def gather_rows(tensors: Mapping[str, Tensor], shapes: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """Return the tensors of each process, in the order of the processes, bit for bit, by one exchange.

    Args:
        tensors: of this process by name, all of one shape; the others have the same names and dtypes.
        shapes: of each process's tensors.
    """
    own = [tensor.detach().unsqueeze(-1).contiguous().view(torch.uint8) for tensor in tensors.values()]
    rank, sizes = distributed.get_rank(), [each.shape[-1] for each in own]
    largest = [max(lengths) for lengths in zip(*shapes, strict=True)]
    packed = own[0].new_zeros(*largest, sum(sizes))
    packed[tuple(slice(length) for length in shapes[rank])] = torch.cat(own, -1)
    parts = [torch.empty_like(packed) for _ in shapes]
    distributed.all_gather(parts, packed)
    found = []
    for part, shape in zip(parts, shapes, strict=True):
        pieces = part[tuple(slice(length) for length in shape)].split_with_sizes(sizes, -1)
        # A clone starts its memory anew, as a view of wider numbers requires.
        whole = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
        named = zip(tensors.items(), whole, strict=True)
        found.append({name: piece.view(tensor.dtype).squeeze(-1) for (name, tensor), piece in named})
    return found


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of the processes' tensors of one shape; the device does not make the host wait."""
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total


def gather_on_first(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, on the first one; an empty list on the others.

    Args:
        value: can be pickled, with tensors in host memory, through which it travels.
    """
    written = io.BytesIO()
    torch.save(value, written)  # pickle alone cannot read tensors of uint16 back
    parts = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(written.getvalue(), parts, group=host_group())
    # The bytes come from the processes of this run.
    return [torch.load(io.BytesIO(part), weights_only=False) for part in cast("list[bytes]", parts or [])]


def host_group() -> Any:
    """Return a group of all processes that exchanges host memory: a rollout buffer may not fit on a device."""
    return _group_of(distributed.group.WORLD)


@functools.cache
def _group_of(world: Any) -> Any:
    del world  # another one needs another group
    return distributed.new_group(backend="gloo")
