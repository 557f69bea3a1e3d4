"""torch.compile for the pass that scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model's forward, compiled at its first call, for any number and length of rows.

    It is no module, so that whoever holds it has no second set of parameters.

    Args:
        model: keeps its own forward as it is: sampling with a cache would have to be compiled again and again.
    """

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    run: Callable[..., Any] = torch.compile(forward, dynamic=True, backend=_BACKEND)
    return run
