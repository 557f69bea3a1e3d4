"""The trace of a training step: its tensors, position by position, for callbacks.

Shapes: B rollouts, T response tokens, N valid positions, H hidden size. Log-probabilities are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.collectives import gather_numbers, gather_rows
from opdlab.gating import GateInputs, Gates
from opdlab.objectives import Objective
from opdlab.policies.language_model import Scored
from opdlab.rollouts import Rollouts, Targets
from opdlab.scoring import support_overlap

OVERLAP_POSITIONS = 256
"""Positions of a micro-batch on which the overlap of supports is measured."""


@dataclass(frozen=True)
class StepTrace:
    """Inputs and outputs of gate and objective for a micro-batch, detached, on the module's device.

    Args:
        rollouts: B rollouts.
        reuse_epoch: passes over the rollouts' buffer before this one.
        step: optimizer steps taken before this one.
        inputs: of the gate: drift, teacher's log-probabilities, position losses.
        gates: output of the gate.
        loss_shares: [B, T]: factor of a position's loss, besides its weight, in the optimizer batch's loss:
            1 over the number of tokens for ``token_mean``, times the correction for the sampler if there is one. 0 at
            masked positions.
        values: [B, T] each, by name: ``entropy``, and further values of the objective.
        gradient_norms: see :func:`hidden_gradient_norms`; None if no callback requests it.
        targets: the teacher's; None for a trace that was not made by a training step.
        overlap: see :func:`teacher_support_overlap`; None if no callback requests it, or with another support.
    """

    rollouts: Rollouts
    reuse_epoch: int
    step: int
    inputs: GateInputs
    gates: Gates
    loss_shares: Tensor
    values: dict[str, Tensor]
    gradient_norms: Tensor | None = None
    targets: Targets | None = None
    overlap: Tensor | None = None

    @property
    def age(self) -> Tensor:
        """Return each rollout's number of optimizer steps since the last refresh of its sampling snapshot; [B] long."""
        return self.step - self.rollouts.snapshot_step


@dataclass(frozen=True)
class GateTrace:
    """The part of a :class:`StepTrace` that metrics of a gate need; each field is described there.

    Args:
        inputs: of the gate.
        gates: output of the gate.
        loss_shares: [B, T].
        gradient_norms: [B, T] or None.
    """

    inputs: GateInputs
    gates: Gates
    loss_shares: Tensor
    gradient_norms: Tensor | None = None


@torch.no_grad()
def gather_traces(traces: Sequence[StepTrace]) -> list[GateTrace]:
    """Return the traces of a step's micro-batches in all processes, which call this together.

    Args:
        traces: of this process's micro-batches; the others have as many.
    """
    sizes = [size for trace in traces for size in trace.inputs.mask.shape]
    shapes = gather_numbers(sizes, traces[0].inputs.mask.device)
    found = []
    for n, trace in enumerate(traces):
        inputs, gates = trace.inputs.tensors(), trace.gates
        outputs = {"weights": gates.weights, "segment_ids": gates.segment_ids, "segment_drift": gates.segment_drift}
        own = {**inputs, **outputs, "loss_shares": trace.loss_shares}
        if trace.gradient_norms is not None:
            own["gradient_norms"] = trace.gradient_norms
        for tensors in gather_rows(own, [shape[2 * n : 2 * n + 2] for shape in shapes]):
            fields: dict[str, Any] = {name: tensors[name] for name in inputs}
            weights = replace(gates, **{name: tensors[name] for name in outputs})
            whole = replace(trace.inputs, **fields), weights, tensors["loss_shares"], tensors.get("gradient_norms")
            found.append(GateTrace(*whole))
    return found


def hidden_gradient_norms(objective: Objective, scored: Scored, rollouts: Rollouts, targets: Targets) -> Tensor:
    """Return the gradient norm of each position's loss at the student's last hidden state of that position.

    A position's loss depends on the hidden state of that position alone, so one backward pass through the head
    gives all norms, without one through the model. Graph and gradients of the current step stay unchanged.

    Args:
        objective: of the losses.
        scored: the student's hidden states, N valid positions.
        rollouts: B rollouts of T tokens.
        targets: the teacher's.

    Returns:
        [B, T] float32 (float64 for a float64 model), nats per unit of hidden state; 0 at masked positions.
    """
    hidden = scored.hidden.detach().requires_grad_()
    probe = replace(scored, hidden=hidden, head=scored.head.detached())
    with torch.enable_grad():
        total = objective.position_losses(probe, rollouts, targets).losses.sum()
    (gradient,) = torch.autograd.grad(total, hidden)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return scored.padded(torch.linalg.vector_norm(gradient, dim=-1, dtype=wide))


def teacher_support_overlap(scored: Scored, rollouts: Rollouts, targets: Targets) -> Tensor | None:
    """Return the share of the teacher's K most likely tokens that are among the student's K most likely ones.

    Args:
        scored: the student's hidden states.
        rollouts: B rollouts of T tokens.
        targets: the teacher's.

    Returns:
        [M] float32, of at most 256 positions, evenly spread; None if the support is not the teacher's alone.
    """
    ids = targets.support_ids
    if ids is None or rollouts.behavior_support_ids is not None:
        return None
    return support_overlap(scored.hidden.detach(), scored.head.detached(), scored.picked(ids.long()), OVERLAP_POSITIONS)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the host, by one transfer.

    They travel as float64, which holds float32 and whole numbers below 2^53 exactly.

    Example:
        >>> to_host({"ids": torch.tensor([2**31]), "drift": torch.tensor([0.1])})
        {'ids': tensor([2147483648]), 'drift': tensor([0.1000])}
    """
    if not tensors:
        return {}
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split_with_sizes([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
