"""Metrics of a training step, as pure functions of the step's valid positions.

Shapes: B rollouts, T response tokens, N valid positions of an optimizer batch. Log-probabilities are in nats. Each name
has a row in :mod:`opdlab.diagnostics.built_in_metrics`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlab.gating import GateInputs, Gates

# Values of the valid positions by name, each [N] (``loss`` is a single number).
StepRecord = dict[str, Tensor]

# Positions with more drift than this, nats, count as drifted; the name of the metric has the number too.
DRIFTED = 0.1


def step_record(inputs: GateInputs, gates: Gates, **values: Tensor) -> StepRecord:
    """Return the record of one micro-batch that :func:`step_metrics` needs.

    Args:
        inputs: of the gate.
        gates: its output.
        values: [B, T] each; further values of positions, to be averaged.
    """
    mask, gap = inputs.mask.bool(), inputs.teacher_gap
    tensors = {"drift": inputs.drift, "segment_drift": gates.segment_drift, "weight": gates.weights, **values}
    if gap is not None:
        tensors["teacher_gap"] = gap
    return {name: tensor.detach()[mask].float() for name, tensor in tensors.items()}


def merge_records(records: Sequence[StepRecord]) -> StepRecord:
    """Return the joined records of an optimizer batch's micro-batches."""
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}


def step_metrics(record: StepRecord) -> dict[str, Tensor]:
    """Return the metrics of one optimizer step, scalars by their name in the log.

    Args:
        record: ``drift``, ``segment_drift``, ``weight``, and further values of each position (``entropy``,
            ``teacher_gap``, values of the objective): ``name`` is averaged and logged as ``train/name``.

    Example:
        >>> values = torch.tensor([0.0, 0.5])
        >>> record = dict(drift=values, segment_drift=values, weight=torch.tensor([1.5, 0.5]), entropy=values)
        >>> round(step_metrics(record)["gate/effective_sample_size"].item(), 3)
        0.8
    """
    drift, weight = record["drift"].abs(), record["weight"]
    if not drift.numel():  # the loss may leave out every token of the batch
        return {}
    means = {name: value for name, value in record.items() if name not in ("drift", "segment_drift", "weight")}
    largest = {"train/sampler_gap_max": record["sampler_gap"].amax()} if "sampler_gap" in record else {}
    return {
        "train/drift/token_mean": drift.mean(),
        "train/drift/segment_mean": record["segment_drift"].abs().mean(),
        "train/drift/max": drift.amax(),
        "train/drift/share_above_0.1": (drift > DRIFTED).float().mean(),
        "gate/min": weight.amin(),
        "gate/max": weight.amax(),
        "gate/mean": weight.mean(),
        "gate/std": weight.std(correction=0),
        "gate/effective_sample_size": weight.sum().square() / (weight.numel() * weight.square().sum()),
        "gate/share_below_0.5": (weight < 0.5).float().mean(),
        "gate/share_above_2": (weight > 2).float().mean(),
        **{f"train/{name}": value.mean() for name, value in means.items()},
        **largest,
    }
