"""Plain scoring: all logits at once, by differentiable operations of torch."""

from typing import Any

import torch
from torch import Tensor

N, H, V, K = 13, 7, 61, 4

HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"softcap": 3.0},
    {"scale": 0.0625},
    {"scale": 2.5, "softcap": 5.0},
    {"scale": 2.5, "softcap": 5.0, "temperature": 0.7},
]


def inputs(bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    return hidden, weight, offset if bias else None


def draw(*shape: int, high: int = V) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
