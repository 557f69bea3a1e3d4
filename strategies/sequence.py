"""One weight per response, and no gating at all."""

import torch
from torch import Tensor

from opdlab.gating import DriftGate, GateInputs, register_gate


@register_gate("sequence")
class SequenceGate(DriftGate):
    """Gate with the whole response as one segment: the coarsest gate.

    The paper (arXiv 2606.24084) argues against it but did not run it.

    Example:
        >>> behavior, current = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> SequenceGate()(GateInputs(torch.zeros(2, 2).long(), torch.ones(2, 2), behavior, current)).weights
        tensor([[1.4621, 1.4621],
                [0.5379, 0.5379]])
    """

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return the same label everywhere."""
        return torch.zeros_like(inputs.tokens)


@register_gate("none")
class NoGate(SequenceGate):
    """Gate with weight 1 at every valid position, whatever the drift. Drift is still reported, per response.

    It takes the options of every gate on drift and ignores them, so that sweeps and stacked configurations need no
    special case.

    Example:
        >>> behavior, current = torch.zeros(1, 2), torch.tensor([[9.0, 0.0]])
        >>> NoGate()(GateInputs(torch.zeros(1, 2).long(), torch.ones(1, 2), behavior, current)).weights
        tensor([[1., 1.]])
    """

    @property
    def uniform(self) -> bool:
        """Return True: all weights are equal."""
        return True

    @property
    def unused_options(self) -> set[str]:
        """Return the names of all options."""
        return {"tau", "statistic", *self.normalization.options}

    def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(inputs.drift)
