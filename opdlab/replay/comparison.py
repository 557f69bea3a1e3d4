"""Results of a replayed step: weights, losses and gradients of every gate.

Shapes: V gates, N valid positions of the step, J fresh draws, P trained parameters.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opdlab.gating import DriftGate, GateInputs, Normalization
from opdlab.replay.step_gradients import Products, inner_products
from opdlab.replay.variants import Variant

Value = float | int | str | bool | None
Row = dict[str, Value]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# For the plot of effective sample sizes, which needs no gradients; per nat.
PLOTTED_TAUS = tuple(10 ** (e / 8) for e in range(-8, 17))


@dataclass(frozen=True)
class ReplayedStep:
    """Results of a replayed step.

    Args:
        number: of the optimizer step, counted from 1.
        age: of its rollouts, optimizer steps.
        recorded_loss: nats.
        replayed_loss: the loss under the run's own gate in the replay, nats.
        recorded_norm: norm of the gradient before clipping, or None.
        replayed_norm: the norm under the run's own gate in the replay.
        ceilings: by reference (``fresh``, ``other``) the mean cosine between two fresh gradients.
        rows: a line for each gate.
        sample_sizes: by gate, the effective sample size at each of :data:`PLOTTED_TAUS`.
        num_backward: backward passes that gates, parts and other objectives took.
        others: by the name of another objective, a line for each gate.
        parts: a line for each part of a gate's weights, under all objectives; empty unless they were asked for.
    """

    number: int
    age: float
    recorded_loss: float
    replayed_loss: float
    recorded_norm: float | None
    replayed_norm: float
    ceilings: dict[str, float]
    rows: list[Row]
    sample_sizes: dict[str, list[float]]
    num_backward: int
    others: dict[str, list[Row]] = field(default_factory=dict)
    parts: list[Row] = field(default_factory=list)


def sample_sizes(variants: Sequence[Variant], inputs: GateInputs) -> dict[str, list[float]]:
    """Return effective sample sizes over a range of taus, of every gate with a tau, with the paper's options."""
    valid, found = inputs.mask.bool(), {}
    gates = {v.gate: v.strategy for v in variants if v.tau is not None}
    for name, gate in gates.items():
        assert isinstance(gate, DriftGate)
        each = copy.copy(gate)
        each.statistic, each.normalization = "signed_mean", Normalization()
        weights = []
        for tau in PLOTTED_TAUS:
            each.tau = tau
            weights.append(each(inputs).weights[valid].double())
        found[name] = effective_sample_size(torch.stack(weights)).tolist()
    return found


def compare(products: Products, references: Mapping[str, Tensor], run: Tensor) -> tuple[list[Row], dict[str, float]]:
    """Return cosines and norms of every gate's gradient, and the ceiling of each reference.

    Args:
        products: of every gate; the first gate is the ungated one.
        references: by name, [J, P]; ``products`` has them in this order, after the ungated gradient.
        run: ungated gradient of the run's own objective, [P]; the last one in ``products``.

    Returns:
        A row for each gate, None where a gradient is zero; and by reference the mean cosine between two of its J
        gradients.
    """
    norms, ceilings = products.squares.sqrt(), {}
    columns = {
        "gradient_norm": norms,
        "ungated_norm_ratio": norms / norms[0],
        "ungated_cosine": (products.references[:, 0] / (norms * norms[0])).clamp(max=1),
        "run_cosine": (products.references[:, -1] / (norms * run.double().norm().cpu())).clamp(max=1),
    }
    start = 1
    for name, fresh in references.items():
        among, count = inner_products(fresh, fresh), len(fresh)
        lengths = among.diagonal().sqrt()
        units = lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        between = among / units / units[:, None]
        ceilings[name] = float((between.sum() - between.trace()) / (count * (count - 1)))
        cosines = products.references[:, start : start + count] / (norms[:, None] * lengths)  # [V, J]
        change = cosines - cosines[0]
        start += count
        for part, values in (("cosine", cosines), ("change", change)):
            columns |= {
                f"{name}_{part}": values.mean(1),
                f"{name}_{part}_se": values.std(1) / math.sqrt(count),
            }
        columns[f"{name}_norm_ratio"] = norms / lengths.mean()
        columns[f"{name}_ceiling"] = torch.full_like(norms, ceilings[name])
    return _rows(columns), ceilings


def effective_sample_size(weights: Tensor) -> Tensor:
    """Return ``(sum w)^2 / (N * sum w^2)`` of [V, N] weights: the effective share of the positions."""
    return weights.sum(1).square() / (weights.shape[1] * weights.square().sum(1))


def weight_metrics(weights: Tensor) -> list[Row]:
    """Return the distribution of each gate's weights.

    Args:
        weights: [V, N].

    Example:
        >>> row = weight_metrics(torch.tensor([[0.5, 1.5]]))[0]
        >>> row["weight_mean"], row["effective_sample_size"], row["weight_q50"]
        (1.0, 0.8, 1.0)
    """
    wide = weights.double().cpu()
    # numpy, because torch.quantile takes at most 2^24 numbers
    quantiles = torch.from_numpy(np.quantile(wide.numpy(), QUANTILES, axis=1))
    columns = {
        "weight_min": wide.amin(1),
        **{f"weight_q{round(100 * q):02d}": values for q, values in zip(QUANTILES, quantiles, strict=True)},
        "weight_max": wide.amax(1),
        "weight_mean": wide.mean(1),
        "weight_std": wide.std(1, correction=0),
        "effective_sample_size": effective_sample_size(wide),
    }
    return _rows(columns)


def _rows(columns: Mapping[str, Tensor]) -> list[Row]:
    """Return a row for each gate; numbers that are not finite become None."""
    table = torch.stack(list(columns.values()), dim=1).tolist()
    return [{name: v if math.isfinite(v) else None for name, v in zip(columns, row, strict=True)} for row in table]
