"""Micro-batches seen as the one optimizer batch that they are parts of, for the gate to normalise over."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.gating import GateInputs, Gates
from opdlab.objectives import PositionLosses
from opdlab.rollouts import Rollouts, Targets


def gate_inputs(rollouts: Rollouts, targets: Targets, positions: PositionLosses, step: int = 0) -> GateInputs:
    """What a gate may look at, of a scored micro-batch, after so many optimizer steps."""
    return GateInputs(
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        behavior_logprobs=rollouts.behavior_logprobs,
        current_logprobs=positions.logprobs,
        teacher_logprobs=targets.logprobs,
        position_losses=positions.losses.detach(),
        entropy=positions.entropy,
        teacher_entropy=targets.entropy,
        correct=None if rollouts.correct is None else rollouts.correct[:, None].expand_as(rollouts.mask),
        step=step,
    )


def join_gate_inputs(parts: Sequence[GateInputs]) -> GateInputs:
    """Stack micro-batches into one batch, padded on the right to the longest."""
    width = max(part.mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    tensors: dict[str, Any] = {name: joined(name) for name in parts[0].tensors()}
    return replace(parts[0], **tensors)


def split_gates(gates: Gates, parts: Sequence[GateInputs]) -> list[Gates]:
    """The reverse of :func:`join_gate_inputs`, for what the gate returned."""
    rows = [part.mask.shape[0] for part in parts]
    fields = (gates.weights, gates.segment_ids, gates.segment_drift)
    pieces = zip(*(tensor.split_with_sizes(rows) for tensor in fields), strict=True)
    return [
        replace(Gates(*(tensor[:, : part.mask.shape[1]] for tensor in piece)), tau=gates.tau)
        for piece, part in zip(pieces, parts, strict=True)
    ]
