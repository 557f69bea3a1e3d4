"""torch.compile for the layers of a model, used for scoring only."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlab.errors import UsageError

_BACKEND = "inductor"
# Variants of a layer's compiled function, which all policies share: with and without gradients, training and eval mode,
# one row and several, few tokens and many, each dtype. torch's own limit is 8; beyond it a layer runs uncompiled.
_MAX_VARIANTS = 64


def require_compiler(path: str) -> None:
    """Raise a UsageError if torch finds no C++ compiler, which torch.compile needs on every device.

    Args:
        path: path of the model, for the message.

    Raises:
        UsageError: torch finds no C++ compiler.
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


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model, outer ones first; empty if transformers does not mark them."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every layer at its first call without a cache, for any number and length of rows.

    The layers are alike, so they share one compiled function, and compilation takes a fraction of the time for the
    whole model. With a cache, shapes change with every token, so a layer runs uncompiled. A copy of the model is not
    compiled, because torch leaves compiled code out of copies.

    Args:
        model: changed in place; compiled layers are skipped.
    """
    for layer in layers_of(model) or [model.base_model]:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True, backend=_BACKEND, recompile_limit=_MAX_VARIANTS)
            layer._compiled_call_impl = _unless_decoding(layer)


def _unless_decoding(layer: nn.Module) -> Callable[..., Any]:
    plain: Callable[..., Any] = layer._call_impl
    compiled: Any = layer._compiled_call_impl

    # Decide from the arguments only: checkpointed layers are called again in the backward pass.
    def call(*inputs: Any, **options: Any) -> Any:
        # Find the cache by type: architectures and versions of transformers name the argument differently.
        decoding = options.get("use_cache") or any(isinstance(value, Cache) for value in (*inputs, *options.values()))
        return (plain if decoding else compiled)(*inputs, **options)

    return call
