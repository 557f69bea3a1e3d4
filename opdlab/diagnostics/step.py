"""What is logged of a training step, as pure functions of the step's valid positions.

Shapes: N valid positions of an optimizer batch. Log-probabilities are in nats. ``docs/metrics.md`` explains each name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlab.gating import GateInputs, Gates

# Values of the valid positions by name, each [N] (``loss`` is a single number).
StepRecord = dict[str, Tensor]

# Positions with more drift than this many nats count as drifted.
DRIFTED = 0.1


def step_record(inputs: GateInputs, gates: Gates, **values: Tensor) -> StepRecord:
    """Gather what :func:`step_metrics` needs of one micro-batch.

    Args:
        inputs: what the gate saw.
        gates: what it returned.
        values: further [B, T] tensors.
    """
    mask = inputs.mask.bool()
    tensors = {"drift": inputs.drift, "segment_drift": gates.segment_drift, "weight": gates.weights, **values}
    return {name: tensor.detach()[mask].float() for name, tensor in tensors.items()}


def merge_records(records: Sequence[StepRecord]) -> StepRecord:
    """Join the records of an optimizer batch's micro-batches."""
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}


def step_metrics(record: StepRecord) -> dict[str, Tensor]:
    """Figures of one optimizer step, each a scalar, by the name under which it is logged.

    Args:
        record: ``drift``, ``segment_drift``, ``weight``, ``entropy``, ``teacher_gap`` and whatever the objective adds;
            every name that is not listed here is averaged.

    Example:
        >>> values = torch.tensor([0.0, 0.5])
        >>> record = dict(drift=values, segment_drift=values, weight=torch.tensor([1.5, 0.5]), entropy=values)
        >>> round(step_metrics(record)["gate/effective_sample_size"].item(), 3)
        0.8
    """
    drift, weight = record["drift"].abs(), record["weight"]
    if not drift.numel():  # every token of the batch is left out of the loss
        return {}
    means = {name: value for name, value in record.items() if name not in ("drift", "segment_drift", "weight")}
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
    }
