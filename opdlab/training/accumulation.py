"""One optimizer batch in several micro-batches and processes: gates and metrics are those of the whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from opdlab.collectives import gather_numbers, gather_rows
from opdlab.diagnostics import StepRecord, merge_records
from opdlab.gating import GateInputs, Gates, GateStrategy
from opdlab.objectives import Objective, PositionLosses
from opdlab.objectives.functional import sampled_token_divergence
from opdlab.policies import LanguageModel, Scored
from opdlab.types import Minibatch, Rollouts, Targets


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch with the student's scores and losses, before gating.

    Args:
        rollouts: with behavior log-probabilities.
        scored: the student's hidden states, with their graph if gradients are enabled.
        positions: the objective's losses.
        inputs: inputs of the gate, detached.
    """

    rollouts: Rollouts
    scored: Scored
    positions: PositionLosses
    inputs: GateInputs


def fresh_rollouts(scored: Scored, objective: Objective, batch: Minibatch) -> Rollouts:
    """Return a micro-batch's rollouts with behavior log-probabilities, where these are not computed yet.

    The student then still equals the behavior policy: its own log-probabilities are the behavior's, and the drift is
    exactly 0 in any precision.
    """
    own = objective.own_logprobs(scored, batch.rollouts, batch.targets)
    return replace(batch.rollouts, behavior_logprobs=own)


def score_batch(student: LanguageModel, objective: Objective, batch: Minibatch, step: int) -> ScoredBatch:
    """Return a micro-batch's scores, losses and gate inputs, as the training step computes them.

    Args:
        student: on the batch's device.
        objective: computes the losses.
        batch: on the student's device.
        step: optimizer steps taken so far.
    """
    scored = student.score(batch.rollouts)
    rollouts = batch.rollouts if batch.behavior_known else fresh_rollouts(scored, objective, batch)
    positions = objective.position_losses(scored, rollouts, batch.targets)
    return ScoredBatch(rollouts, scored, positions, gate_inputs(rollouts, batch.targets, positions, step))


def gate_inputs(rollouts: Rollouts, targets: Targets, positions: PositionLosses, step: int = 0) -> GateInputs:
    """Return the gate's inputs for a scored micro-batch after ``step`` optimizer steps."""
    divergence = positions.divergence
    # Targets.known_logprobs, without another call in each step.
    of_teacher = None if targets.support_logits is not None and targets.support_mass is None else targets.logprobs
    if divergence is None and of_teacher is not None:
        divergence = sampled_token_divergence(positions.logprobs, of_teacher, estimator="k3")
    compatible_mass, ids = None, rollouts.behavior_support_ids
    if ids is not None and targets.support_logits is not None and targets.log_normalizer is not None:
        # In a union of supports, the behavior policy's tokens come last.
        inside = targets.support_logits[..., -ids.shape[-1] :].logsumexp(-1)
        compatible_mass = (inside - targets.log_normalizer).exp().clamp(max=1)
    return GateInputs(
        tokens=rollouts.tokens,
        mask=rollouts.mask,
        behavior_logprobs=rollouts.behavior_logprobs,
        current_logprobs=positions.logprobs,
        teacher_logprobs=of_teacher,
        position_losses=positions.losses.detach(),
        entropy=positions.entropy,
        teacher_entropy=targets.entropy,
        divergence=divergence,
        compatible_mass=compatible_mass,
        correct=None if rollouts.correct is None else rollouts.correct[:, None].expand_as(rollouts.mask),
        age=(step - rollouts.snapshot_step).float()[:, None].expand_as(rollouts.mask),
        step=step,
    )


def join_gate_inputs(parts: Sequence[GateInputs]) -> GateInputs:
    """Return micro-batches joined to one batch, padded on the right to the longest."""
    width = max(part.mask.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    tensors: dict[str, Any] = {name: joined(name) for name in parts[0].tensors()}
    return replace(parts[0], **tensors)


def split_gates(gates: Gates, parts: Sequence[GateInputs]) -> list[Gates]:
    """Return each micro-batch's part of the gates of joined inputs: the reverse of :func:`join_gate_inputs`."""
    rows = [part.mask.shape[0] for part in parts]
    fields = (gates.weights, gates.segment_ids, gates.segment_drift)
    pieces = zip(*(tensor.split_with_sizes(rows) for tensor in fields), strict=True)
    return [
        replace(Gates(*(tensor[:, : part.mask.shape[1]] for tensor in piece)), tau=gates.tau)
        for piece, part in zip(pieces, parts, strict=True)
    ]


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of an optimizer batch in all processes.

    Args:
        num_tokens: valid response tokens, the denominator of ``token_mean``.
        num_rollouts: rollouts with a valid token, the denominator of ``sequence_mean``.
        shapes: number of rollouts and longest response of each process.
        tokens: valid response tokens of each process.
    """

    num_tokens: int
    num_rollouts: int
    shapes: list[tuple[int, int]]
    tokens: list[int]


class AccumulationWindow:
    """The state of the current optimizer batch while its micro-batches are accumulated.

    Args:
        num_processes: processes that share each optimizer batch. With several, all call each method together.
    """

    def __init__(self, num_processes: int = 1) -> None:
        self._several = num_processes > 1
        self._gates: list[Gates] | None = None  # of each micro-batch, once they are computed
        self._sizes: BatchSizes | None = None  # with several processes, once they are known
        self._records: list[StepRecord] = []

    def sizes(self, batch: Minibatch, device: torch.device) -> BatchSizes:
        """Return the sizes of a micro-batch's optimizer batch in all processes, by one exchange for all micro-batches.

        Args:
            batch: with the micro-batches of this process.
            device: of the student.
        """
        if self._sizes is None:
            masks = [rollouts.mask for rollouts, _ in batch.micro_batches]
            lengths = torch.cat([mask.sum(1) for mask in masks])
            own = [len(lengths), max(mask.shape[1] for mask in masks), int(lengths.sum()), int((lengths > 0).sum())]
            rows, widths, tokens, rollouts = zip(*gather_numbers(own, device), strict=True)
            shapes = list(zip(rows, widths, strict=True))
            self._sizes = BatchSizes(sum(tokens), sum(rollouts), shapes, list(tokens))
        return self._sizes

    def gates(
        self, gate: GateStrategy, batch: Minibatch, inputs: GateInputs, student: LanguageModel, objective: Objective
    ) -> Gates:
        """Return a micro-batch's weights, normalised over its whole optimizer batch.

        The student does not change while an optimizer batch is accumulated. At the first micro-batch, the others are
        therefore scored without gradient to obtain their gate inputs. This costs a forward pass, and makes accumulation
        equal to one large batch for every gate. With several processes, each gathers the gate inputs of all, computes
        the gate on the whole batch and keeps its own rows, so a gate need not know of processes.

        Args:
            gate: the gate.
            batch: on the student's device.
            inputs: the gate's inputs of this micro-batch.
            student: scores the other micro-batches.
            objective: computes their losses, which a gate may use.
        """
        if self._gates is None:
            parts = []
            for position, (rollouts, targets) in enumerate(batch.micro_batches):
                if position == batch.position:
                    parts.append(inputs)
                    continue
                with torch.no_grad():
                    sibling = replace(batch, rollouts=rollouts, targets=targets).to(student.device)
                    parts.append(score_batch(student, objective, sibling, inputs.step).inputs)
            own = join_gate_inputs(parts)
            self._gates = split_gates(self._gates_of_all(gate, batch, own) if self._several else gate(own), parts)
        return self._gates[batch.position]

    def _gates_of_all(self, gate: GateStrategy, batch: Minibatch, own: GateInputs) -> Gates:
        """Return this process's part of the gates of all processes' inputs."""
        gathered = gather_rows(own.tensors(), self.sizes(batch, own.mask.device).shapes)
        parts = []
        for tensors in gathered:
            fields: dict[str, Any] = tensors
            parts.append(replace(own, **fields))
        return split_gates(gate(join_gate_inputs(parts)), parts)[distributed.get_rank()]

    def finish(self, batch: Minibatch, record: StepRecord) -> StepRecord | None:
        """Add a micro-batch's record; at the last one, return the merged record and begin a new window."""
        records = [*self._records, record]
        if batch.position + 1 < len(batch.micro_batches):
            self._records = records
            return None
        self._records, self._gates, self._sizes = [], None, None
        return merge_records(records)


def record_of_all(record: StepRecord, sizes: BatchSizes) -> StepRecord:
    """Return the joined records of an optimizer batch in all processes, which call this together.

    Args:
        record: of this process's rows: ``age`` of each rollout, and values of the valid positions.
        sizes: of the optimizer batch.
    """
    positions = {name: values for name, values in record.items() if name != "age"}
    ages = gather_rows({"age": record["age"]}, [shape[:1] for shape in sizes.shapes])
    parts = gather_rows(positions, [(count,) for count in sizes.tokens])
    return merge_records([part | age for part, age in zip(parts, ages, strict=True)])
