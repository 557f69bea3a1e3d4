"""Metrics of an optimizer step by position in the response, as pure functions of the step's traces.

A response of length n is cut into 32 bins: its token t belongs to bin ``floor(32 t / n)``, so that a bin means the same
part of short and long responses. The length counts up to the last valid token.

:func:`position_tensors` queues work on the device and does not wait for it,
:func:`opdlab.diagnostics.trace.to_host` makes one copy, :func:`read_positions` returns plain numbers.

Shapes: B rollouts, T response tokens. Divergence, entropy and teacher gap are in nats.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opdlab.diagnostics.trace import GateTrace, StepTrace

NUM_BINS = 32
CURVES = ("divergence", "entropy", "teacher_gap", "weight")
"""Names of the values whose mean is taken in each bin."""


@torch.no_grad()
def position_tensors(traces: Sequence[StepTrace | GateTrace]) -> dict[str, Tensor]:
    """Return the sums of a step by position, still on the device, without waiting for it.

    Args:
        traces: of the step's micro-batches, at least one.

    Returns:
        ``position_sums`` [1 + curves, bins] float64: the number of valid positions, and the sum of each of
        :data:`CURVES`, NaN if it is not known; ``gradient_squares`` [2] float64: the squared gradient at the last
        hidden states, of the first tenth of each response and of all positions, NaN if no norms are known.
    """
    device = traces[0].gates.weights.device
    # The last bin is for masked positions.
    sums = torch.zeros(1 + len(CURVES), NUM_BINS + 1, dtype=torch.float64, device=device)
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for trace in traces:
        inputs, weights, valid = trace.inputs, trace.gates.weights, trace.inputs.mask.bool()
        column = torch.arange(valid.shape[1], device=device)
        length = ((column + 1) * valid).amax(1, keepdim=True).clamp(min=1)  # [B, 1]
        bins = torch.where(valid, NUM_BINS * column // length, NUM_BINS)
        unknown = torch.full_like(weights, torch.nan)
        values = (inputs.divergence, inputs.entropy, inputs.teacher_gap, weights)
        columns = [torch.ones_like(weights), *(unknown if value is None else value for value in values)]
        flat = torch.stack([each.double() for each in columns]).masked_fill(~valid, 0.0).flatten(1)
        sums.scatter_add_(1, bins.flatten().expand_as(flat), flat)
        norms = unknown if trace.gradient_norms is None else trace.gradient_norms
        # Parts of the gradient at different positions are orthogonal, so their squares add up.
        square = (trace.loss_shares.double() * weights * norms).masked_fill(~valid, 0.0).square()
        squares += torch.stack([(square * (10 * column < length)).sum(), square.sum()])
    return {"position_sums": sums[:, :NUM_BINS], "gradient_squares": squares}


def read_positions(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the metrics on the host by name from the output of :func:`position_tensors`; without undefined ones.

    Example:
        >>> sums = torch.zeros(5, 32)
        >>> sums[:, 31] = torch.tensor([2.0, 0.5, 3.0, -1.0, 2.0])
        >>> read_positions({"position_sums": sums, "gradient_squares": torch.tensor([1.0, 4.0])})
        {'position/divergence/31': 0.25, ..., 'position/weight/31': 1.0, 'position/gradient_share/first_tenth': 0.25}
    """
    count, *curves = tensors["position_sums"]
    first, whole = tensors["gradient_squares"].tolist()
    found = {
        f"position/{name}/{index:02d}": value
        for name, sums in zip(CURVES, curves, strict=True)
        for index, value in enumerate((sums / count).tolist())
    }
    found["position/gradient_share/first_tenth"] = first / whole if whole else math.nan
    return {name: value for name, value in found.items() if not math.isnan(value)}
