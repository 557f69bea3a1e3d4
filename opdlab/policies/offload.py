"""Frozen weights that stay in host memory and are on the device only while they are used.

Existing libraries do not cover this case. ``cpu_offload_with_hook`` of accelerate moves unchanged weights back after
use, into newly allocated memory that is not pinned. Its ``cpu_offload`` copies each layer in each forward pass; for
sampling, this copies all weights for every token. Offloading in torch is for FSDP or activations. Like
``nn.Module.to`` and diffusers' group offloading, this module swaps ``Tensor.data``.
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
    """Run a block with copies of a frozen module's weights and buffers on a device; the host keeps the originals.

    All copies are queued in the current stream without waiting: the host continues, and the device starts its work
    after the last copy. Afterwards the parameters have their original host tensors again, and the memory of the copies
    returns to the allocator. Nothing is copied back except buffers that the module has replaced in the block. Tied
    weights are copied once and stay tied.

    Args:
        module: frozen, on the host; a module on another device is left unchanged.
        device: device for the copies; on a CPU nothing is done.

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


# Evaluations run in inference mode, and tensors created in it cannot be used with autograd.
@torch.inference_mode(False)
def _put_back(module: nn.Module, originals: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, original in originals:
        tensor.data = original
    # Rotary embeddings with length-dependent frequencies replace their buffers when a longer row comes.
    known = {id(tensor) for tensor, _ in originals}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            if id(buffer) not in known:
                owner._buffers[name] = buffer.to(_HOST)


@torch.inference_mode(False)
def pin_memory(module: nn.Module, device: torch.device) -> None:
    """Pin a module's host tensors if the device is CUDA, so that copies are asynchronous.

    torch rounds each piece of pinned memory up to a power of two bytes. With
    ``PYTORCH_CUDA_ALLOC_CONF=pinned_max_round_threshold_mb:64``, torch versions that support it do not round larger
    pieces.
    """
    if device.type != "cuda":
        return
    for tensor in _tensors(module):
        if not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()


def without_moving(convert: Conversion) -> Conversion:
    """Return a conversion that applies only the change of dtype of a ``.to()`` call.

    Example:
        >>> without_moving(lambda tensor: tensor.to("meta", torch.bfloat16))(torch.ones(1))
        tensor([1.], dtype=torch.bfloat16)
    """
    return lambda tensor: tensor.to(convert(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype)


def keep_from_strategy(root: nn.Module, name: str, strategy: Strategy, option: str) -> None:
    """Exclude a submodule's host tensors from Lightning's strategy.

    DDP ignores the tensors: otherwise it would synchronize them through the device. They are already equal, because
    all processes copy them from equal weights.

    Args:
        root: the module that the strategy wraps.
        name: name of the submodule in ``root``.
        strategy: the trainer's strategy.
        option: name of the option, for the message.

    Raises:
        UsageError: the strategy places or shards weights itself, as FSDP and DeepSpeed do.
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
    """Yield parameters and buffers, tied weights once."""
    yield from module.parameters()
    yield from module.buffers()
