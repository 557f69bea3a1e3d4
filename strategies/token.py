"""One weight per token."""

import torch
from torch import Tensor

from opdlab.gating import DriftGate, GateInputs, register_gate


@register_gate("token")
class TokenGate(DriftGate):
    """Gate with every token as its own segment: the finest gate, and the noisiest.

    The paper (arXiv 2606.24084) argues against it but did not run it.

    Example:
        >>> from opdlab.gating import GateInputs
        >>> zeros = torch.zeros(1, 3)
        >>> TokenGate()(GateInputs(zeros.long(), torch.ones(1, 3), zeros, zeros)).segment_ids
        tensor([[0, 1, 2]])
    """

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return one label per column."""
        return torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device).expand_as(inputs.tokens)
