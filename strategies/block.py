"""One weight per fixed block of tokens."""

from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import DriftGate, GateInputs, register_gate


@register_gate("block")
class BlockGate(DriftGate):
    """Gate on fixed blocks counted from the first response token; the last one may be short.

    Blocks are columns ``0..n-1, n..2n-1, …``. The paper (arXiv 2606.24084) uses n = 64 and tau = 1.

    Args:
        block_size: tokens in a block, at least 1.
        options: see :class:`opdlab.gating.DriftGate`.

    Example:
        >>> zeros = torch.zeros(1, 5)
        >>> BlockGate(block_size=2)(GateInputs(zeros.long(), torch.ones(1, 5), zeros, zeros)).segment_ids
        tensor([[0, 0, 1, 1, 2]])
    """

    def __init__(self, block_size: int = 64, **options: Any) -> None:
        super().__init__(**options)
        require(block_size >= 1, f"block_size is {block_size}, but must be at least 1 token")
        self.block_size = block_size

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return the number of each column's block."""
        columns = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
        return (columns // self.block_size).expand_as(inputs.tokens)


@register_gate("block32")
class Block32Gate(BlockGate):
    """Gate on blocks of 32 tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(block_size=32, **options)


@register_gate("block64")
class Block64Gate(BlockGate):
    """Gate on blocks of 64 tokens: the paper's Block64."""

    def __init__(self, **options: Any) -> None:
        super().__init__(block_size=64, **options)


@register_gate("block128")
class Block128Gate(BlockGate):
    """Gate on blocks of 128 tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(block_size=128, **options)
