"""Weights that FSDP2, torch's ``fully_shard``, shards over the processes of a run.

Each process keeps an equal part of each weight, of its gradient and of its optimizer state. Each layer is a group whose
weights are gathered for its part of a pass, and the rest of the model is another: embeddings, norm and head, so tied
weights are in one group. That group stays gathered from a pass until the backward pass, so the head's tiles use plain
tensors between the two, and FSDP2 averages the head's gradient over the processes like any other.

Gathering is collective: all processes must run the same number of passes. Where they cannot, as in sampling, whose
loops end at different times, :meth:`Sharding.whole` gathers all weights before.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.collectives import gather_numbers

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")  # of a module


def _is_fsdps(hook: Any) -> bool:
    """True if a hook is a function of FSDP2, or a method of its state of a module."""
    origin = type(hook.__self__) if hasattr(hook, "__self__") else hook
    return str(getattr(origin, "__module__", "")).startswith("torch.distributed.fsdp")


class Sharding:
    """The sharded weights of a model.

    Args:
        root: its forward is called for every pass; sharded in place.
        layers: modules of ``root`` that are gathered one at a time.
        mesh: a device mesh of all processes, of one dimension.

    Attributes:
        is_whole: True inside :meth:`whole`.
    """

    def __init__(self, root: nn.Module, layers: Sequence[nn.Module], mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in reversed(layers):  # inner ones first
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(root, mesh=mesh, reshard_after_forward=False)
        self._root: Any = root
        self._layers: list[Any] = list(layers)
        self._device = next(root.parameters()).device
        self.is_whole = False
        # The first pass must be one of the root, and outside of inference mode, whose tensors autograd cannot use.
        with torch.inference_mode(False), torch.no_grad():
            self._pass()
        self.release()

    def _pass(self) -> None:
        """Run a pass over one token, for the other processes."""
        self._root(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), use_cache=False)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all weights in each process, so that passes inside exchange nothing. All processes enter together.

        Parameters are plain tensors inside, passes are those of a plain model, without gradient, and a process may take
        a state dict alone.
        """
        if self.is_whole:
            yield
            return
        self.is_whole = True
        groups = [self._root, *self._layers]
        with torch.inference_mode(False), torch.no_grad():
            for group in groups:
                group.unshard()
        # FSDP2's hooks take time at each token, note each pass of a layer until the next backward pass, and shard the
        # weights again where a state dict is taken.
        modules = list(self._root.modules())
        taken_off = [(module, name, getattr(module, name)) for module in modules for name in _HOOKS]
        for module, name, hooks in taken_off:
            setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if not _is_fsdps(hook)))
        try:
            yield
        finally:
            self.is_whole = False
            for module, name, hooks in taken_off:
                setattr(module, name, hooks)
            self.release()

    def release(self) -> None:
        """Shard all weights again after passes without gradient, and free what FSDP2 notes of each pass."""
        with torch.inference_mode(False):
            self._root.reset_iter_state()

    def finish_passes(self, count: int, agreed: int) -> None:
        """Run further passes, so that this process has run as many as agreed, and release the weights.

        Args:
            count: passes without gradient that it has run.
            agreed: see :meth:`agree`.
        """
        for _ in range(agreed - count):
            self._pass()
        self.release()

    def agree(self, count: int) -> int:
        """Return the largest number of passes that a process wants to run; all processes ask together."""
        return max(number for (number,) in gather_numbers([count], self._device))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of one that is sharded; all processes call this together. Others are returned as is."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; others are returned as is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, equal in all processes, sharded as another one is; as is if that is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


@torch.no_grad()
def whole_tree(tree: Any, *, keep: bool) -> Any:
    """Return nested dicts and lists with whole tensors in host memory; all processes call this together.

    Tensors are gathered one by one. One that stands there several times, as tied weights, is one in the result too.

    Args:
        tree: with tensors and plain values.
        keep: False to return None for each tensor, in a process that only takes part.
    """
    known: dict[int, Tensor | None] = {}

    def gathered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: gathered(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(gathered, value))
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            full = whole(value.detach())
            known[id(value)] = full.cpu() if keep else None
        return known[id(value)]

    return gathered(tree)


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Return the state dict of a module with sharded weights, see :func:`whole_tree`; an empty one if not kept."""
    state: dict[str, Any] = dict(module.state_dict(keep_vars=True))
    whole_ones: dict[str, Any] = whole_tree(state, keep=keep)
    return whole_ones if keep else {}
