"""Metrics of a gate's effect on an optimizer step, as pure functions of the step's traces.

:func:`gate_tensors` queues work on the device and does not wait for it,
:func:`opdlab.diagnostics.trace.to_host` makes one copy, :func:`read_gates` returns plain numbers.

Shapes: B rollouts, T response tokens, M positions of all micro-batches of a step, valid or not. Drift is in nats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.diagnostics.histograms import Binning, Histogram, bin_rows, merged_rows, read_histograms, row_totals
from opdlab.diagnostics.trace import GateTrace, StepTrace

WEIGHT_BINS = Binning(centre=1.0, scale=0.01)
DRIFT_BINS = Binning(centre=0.0, scale=0.001)

# Weights are float32 numbers around 1: a relative spread below this is rounding.
_ROUNDING = 1e-6
# If position losses cancel to less than this share of their absolute values, a ratio of losses is noise.
_CANCELLED = 0.01


def correlation(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Return Pearson's correlation over valid positions; NaN if x or y varies only by rounding of float32.

    Args:
        x: [M] float64.
        y: [M] float64.
        valid: [M] bool.

    Returns:
        A scalar between -1 and 1.

    Example:
        >>> x, valid = torch.tensor([1.0, 2.0, 3.0, 9.0]).double(), torch.tensor([True, True, True, False])
        >>> round(correlation(x, -2 * x, valid).item(), 6), correlation(torch.ones(4).double(), x, valid).item()
        (-1.0, nan)
    """
    both = torch.stack([x, y]).where(valid, 0.0)
    num = valid.sum()
    # Subtract the mean before squaring: the spread of weights is small beside their mean of 1.
    centred = (both - both.sum(1, keepdim=True) / num).where(valid, 0.0)
    squares = centred.square().sum(1)
    varies = (squares > _ROUNDING**2 * both.square().sum(1)).all()
    pearson = centred.prod(0).sum() / squares[0].sqrt() / squares[1].sqrt()
    return pearson.clamp(-1, 1).where(varies, torch.nan)


def gradient_effect(weights: Tensor, shares: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and norm ratio of the gated and the ungated gradient, at the student's last hidden states.

    The optimizer batch's loss is ``L = sum_n c_n w_n l_n``, and without the gate ``sum_n c_n l_n``, with the shares c
    and detached weights w. Position n's loss depends on the last hidden state h_n of that position alone, so the
    gradient of L with respect to all hidden states consists of the parts ``dL/dh_n = c_n w_n dl_n/dh_n``, one for each
    position, and the parts of different positions are orthogonal. With ``g_n = |dl_n/dh_n|``

    - inner product of gated and ungated gradient: ``sum c^2 w g^2``;
    - squared lengths: ``sum c^2 w^2 g^2`` gated, ``sum c^2 g^2`` ungated;
    - ``cosine = sum c^2 w g^2 / sqrt(sum c^2 w^2 g^2 * sum c^2 g^2)``;
    - ``ratio = sqrt(sum c^2 w^2 g^2 / sum c^2 g^2)``.

    This needs no gradient of the gated loss and no second backward pass. Weights are never negative, so the cosine is
    between 0 and 1. It compares the gradients that flow into the network below the head, not the parameters'
    gradients, in which positions mix.

    Args:
        weights: w, [M] float64, 0 where not valid.
        shares: c, [M] float64; a common factor cancels.
        norms: g, [M] float64, nats per unit of hidden state.

    Returns:
        Cosine and ratio, scalars; NaN where a gradient is zero.

    Example:
        >>> ones = torch.ones(2).double()
        >>> cosine, ratio = gradient_effect(torch.tensor([2.0, 0.0]).double(), ones, ones)
        >>> round(cosine.item(), 4), round(ratio.item(), 4)
        (0.7071, 1.4142)
    """
    # c is 1e-6 for a batch of a million tokens and g of a trained position 1e-4: squares need float64, and a common
    # scale prevents underflow for every model.
    ungated = shares * norms
    ungated = ungated / ungated.amax()
    gated = weights * ungated
    product, gated_square, square = (gated * ungated).sum(), gated.square().sum(), ungated.square().sum()
    defined = gated_square > 0
    ratio = (gated_square / square).sqrt()
    cosine = (product / gated_square.sqrt() / square.sqrt()).clamp(max=1)
    return cosine.where(defined, torch.nan), ratio.where(defined, torch.nan)


def loss_effect(weights: Tensor, shares: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss without the gate, ``sum c l``, and the ratio of the gated loss to it, ``sum c w l / sum c l``.

    Args:
        weights: w, [M] float64.
        shares: c, [M] float64.
        losses: l, [M] float64, nats.

    Returns:
        Ungated loss and ratio, scalars. The ratio is NaN if losses of both signs (sampled-token) cancel to less
        than 1% of ``sum c |l|``, because it is noise then.
    """
    ungated, absolute = (shares * losses).sum(), (shares * losses).abs().sum()
    ratio = (shares * weights * losses).sum() / ungated
    return ungated, ratio.where(ungated.abs() > _CANCELLED * absolute, torch.nan)


@torch.no_grad()
def gate_tensors(traces: Sequence[StepTrace | GateTrace], max_blocks: int) -> dict[str, Tensor]:
    """Return all metrics of a step, still on the device, without waiting for it.

    Args:
        traces: of the step's micro-batches.
        max_blocks: number of segments counted separately; further ones are counted together.

    Returns:
        Tensors by name, for :func:`opdlab.diagnostics.trace.to_host` and :func:`read_gates`.
    """
    valid, columns = _positions(traces)
    ids, weights, drift, segment_drift, shares, gap, losses, norms = columns
    # Row `max_blocks` has the further segments, the next one the positions that are not valid.
    block = ids.long().clamp(max=max_blocks).where(valid, max_blocks + 1)
    everywhere = (~valid).long()
    cosine, norm_ratio = gradient_effect(weights, shares, norms)
    ungated, loss_ratio = loss_effect(weights, shares, losses)
    return {
        "gate/ungated_loss": ungated,
        "gate/loss_ratio": loss_ratio,
        "gate/gradient_cosine": cosine,
        "gate/gradient_norm_ratio": norm_ratio,
        "gate/correlation/teacher_gap": correlation(weights, gap, valid),
        "gate/correlation/position_loss": correlation(weights, losses, valid),
        "weights": bin_rows(weights, block, max_blocks + 1, WEIGHT_BINS),
        "token_drift": bin_rows(drift, everywhere, 1, DRIFT_BINS),
        "segment_drift": bin_rows(segment_drift, everywhere, 1, DRIFT_BINS),
        "block_drift": weights.new_zeros(max_blocks + 2).index_add_(0, block, drift.abs())[:max_blocks],
    }


def _positions(traces: Sequence[StepTrace | GateTrace]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return which positions are valid, [M] bool, and their values, [M] float64 each: 0 where not valid.

    The values: segment ids, weights, drift, segment drift, loss shares; teacher gap, position losses and gradient
    norms, which are NaN if they are not known.
    """
    valid = torch.cat([trace.inputs.mask.bool().flatten() for trace in traces])
    parts = []
    for trace in traces:
        inputs, gates = trace.inputs, trace.gates
        unknown = torch.full_like(gates.weights, torch.nan)
        optional = (inputs.teacher_gap, inputs.position_losses, trace.gradient_norms)
        columns = [gates.segment_ids, gates.weights, inputs.drift, gates.segment_drift, trace.loss_shares]
        columns += [unknown if column is None else column for column in optional]
        parts.append(torch.stack([column.double() for column in columns]).flatten(1))
    return valid, torch.cat(parts, 1).where(valid, 0.0).unbind()


@dataclass(frozen=True)
class GateMetrics:
    """A step's metrics on the host.

    Args:
        scalars: by tag; undefined metrics are left out.
        histograms: by tag; without empty ones.
        block_weights: [max_blocks], mean weight of each segment; NaN where no rollout has it.
        block_drift: [max_blocks], mean absolute drift of each segment's tokens, nats; NaN if no rollout has it.
    """

    scalars: dict[str, float]
    histograms: dict[str, Histogram]
    block_weights: Tensor
    block_drift: Tensor


def read_gates(tensors: Mapping[str, Tensor]) -> GateMetrics:
    """Return the metrics on the host from the output of :func:`gate_tensors`."""
    weights = tensors["weights"]
    # Edges span all rows, including the last one, of the further segments.
    blocks = read_histograms(weights, WEIGHT_BINS)[:-1]
    drawn = {
        "gate/weights": read_histograms(merged_rows(weights), WEIGHT_BINS)[0],
        "gate/token_drift": read_histograms(tensors["token_drift"], DRIFT_BINS)[0],
        "gate/segment_drift": read_histograms(tensors["segment_drift"], DRIFT_BINS)[0],
        **{f"gate/block/{n:03d}": found for n, found in enumerate(blocks)},
    }
    scalars = {name: float(value) for name, value in tensors.items() if name.startswith("gate/")}
    counts, sums = row_totals(weights[:-1])
    return GateMetrics(
        scalars={name: value for name, value in scalars.items() if not math.isnan(value)},
        histograms={name: histogram for name, histogram in drawn.items() if histogram is not None},
        block_weights=sums / counts,
        block_drift=tensors["block_drift"] / counts,
    )
