"""torch.compile for the layers of a model, where they score."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlab.errors import UsageError

_BACKEND = "inductor"


def require_compiler(path: str) -> None:
    """Refuse to compile where torch finds no C++ compiler, which it needs on every device.

    Args:
        path: of the model, named in the message.

    Raises:
        UsageError: there is none.
    """
    if _BACKEND != "inductor":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            f"model '{path}' has compile true, but torch finds no C++ compiler: install one such as g++, name it in "
            "the environment variable CXX, or set compile to false"
        ) from error


def compile_layers(model: PreTrainedModel) -> None:
    """Have every layer compiled at its first call without a cache, for any number and length of rows.

    Layers are alike, so the code of one serves them all, and compiling takes a fraction of the time that the whole
    model takes. With a cache, where shapes change with every token, a layer runs as it is. A copy of the model is not
    compiled, because torch leaves compiled code out of copies.

    Args:
        model: changed in place; what is compiled already is left alone.
    """
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers or [model.base_model]:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True, backend=_BACKEND)
            layer._compiled_call_impl = _unless_decoding(layer)


def _unless_decoding(layer: nn.Module) -> Callable[..., Any]:
    plain: Callable[..., Any] = layer._call_impl
    compiled: Any = layer._compiled_call_impl

    # The arguments decide and nothing outside, since checkpointed layers are called again in the backward pass.
    def call(*inputs: Any, **options: Any) -> Any:
        # A cache is found by its type: architectures and versions of transformers name the argument differently.
        decoding = options.get("use_cache") or any(isinstance(value, Cache) for value in (*inputs, *options.values()))
        return (plain if decoding else compiled)(*inputs, **options)

    return call
