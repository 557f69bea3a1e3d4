"""Frozen weights that stay in the host's memory and are on the device only while they work.

Libraries have near relatives, which do other things. ``cpu_offload_with_hook`` of accelerate moves weights back after
use, though nobody changed them, into memory that it allocates anew and does not pin; its ``cpu_offload`` copies each
layer in each forward pass, which for sampling means all weights for every token. Offloading in torch belongs to FSDP
or to activations. Like ``nn.Module.to`` and diffusers' group offloading, this exchanges ``Tensor.data``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opdlab.errors import require

Conversion = Callable[[Tensor], Tensor]
_HOST = torch.device("cpu")


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Work with copies of a frozen module's weights and buffers on a device; the host keeps the originals.

    All copies are put into the current stream at once, without waiting: the host goes on, and the device begins to
    work when the last has arrived. Afterwards the parameters have their host tensors back, the very same, and the
    copies' memory is the allocator's again. Nothing is copied back, but for buffers that the module has replaced
    meanwhile. Tied weights are copied once and stay tied.

    Args:
        module: frozen, on the host; one that was moved to a device stays there.
        device: where to work; on a CPU nothing is done.

    Example:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> with on_device(layer, torch.device("cpu")):
        ...     layer(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    if device.type == "cpu" or any(parameter.device != _HOST for parameter in module.parameters()):
        yield
        return
    pin_memory(module, device)
    originals = [(tensor, tensor.data) for tensor in _tensors(module)]
    try:
        for tensor, original in originals:
            tensor.data = original.to(device, non_blocking=True)
        yield
    finally:
        _put_back(module, originals)


# Evaluations run in inference mode, and a tensor that is made in it stays unfit for autograd.
@torch.inference_mode(False)
def _put_back(module: nn.Module, originals: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, original in originals:
        tensor.data = original
    # Rotary embeddings whose frequencies depend on the length replace them when a longer row comes.
    known = {id(tensor) for tensor, _ in originals}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            if id(buffer) not in known:
                owner._buffers[name] = buffer.to(_HOST)


@torch.inference_mode(False)
def pin_memory(module: nn.Module, device: torch.device) -> None:
    """Pin a module's tensors, which are on the host, where that makes copies asynchronous: with CUDA.

    torch rounds each piece of pinned memory up to a power of two bytes;
    ``PYTORCH_CUDA_ALLOC_CONF=pinned_max_round_threshold_mb:64`` leaves larger ones as they are, where torch knows it.
    """
    if device.type != "cuda":
        return
    for tensor in _tensors(module):
        if not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()


def without_moving(convert: Conversion) -> Conversion:
    """Of a conversion that ``nn.Module.to`` hands to ``_apply``, the change of dtype alone.

    Example:
        >>> without_moving(lambda tensor: tensor.to("meta", torch.bfloat16))(torch.ones(1))
        tensor([1.], dtype=torch.bfloat16)
    """
    return lambda tensor: tensor.to(convert(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)


def keep_from_strategy(root: nn.Module, name: str, strategy: Strategy, option: str) -> None:
    """Have Lightning's strategy leave a submodule's tensors on the host.

    DDP is told to ignore them: processes would otherwise bring them in line through the device, and they are in line
    as long as all take them from equal weights.

    Args:
        root: what the strategy is given.
        name: of the submodule.
        strategy: the trainer's.
        option: named in the message.

    Raises:
        UsageError: the strategy moves or shards what it is given by rules of its own, as FSDP and DeepSpeed do.
    """
    ddp = type(strategy) is DDPStrategy  # DeepSpeed's and XLA's are subclasses
    require(
        ddp or isinstance(strategy, SingleDeviceStrategy),
        f"{option} is true, but trainer.strategy is {type(strategy).__name__}, which places the weights itself: set "
        f"{option} to false, or take a single device or ddp",
    )
    if ddp:
        module = root.get_submodule(name)
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        ignored = [f"{name}.{key}" for key, _ in named]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            root, ignored
        )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Each once, also where weights are tied."""
    yield from module.parameters()
    yield from module.buffers()
