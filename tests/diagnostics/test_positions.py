"""Metrics by position against plain loops and autograd."""

import math
from dataclasses import replace

import pytest
import torch

from opdlab.diagnostics.positions import CURVES, position_tensors, read_positions
from opdlab.diagnostics.trace import StepTrace, to_host
from opdlab.gating import build_gate
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK, reduce_losses
from opdlab.training import join_gate_inputs, split_gates
from tests.diagnostics.synthetic import MicroBatch, batch_shares, micro_batch


def traced(objective: Objective, parts: int) -> tuple[list[MicroBatch], list[StepTrace]]:
    """An optimizer step of micro-batches of unequal width: long, short and empty responses, one with a hole."""
    lengths = [(70, 9, 0, 32), (33, 1, 3, 100)]
    batches = [micro_batch(seed, lengths[seed]) for seed in range(parts)]
    inputs = [batch.inputs(objective) for batch in batches]
    gates = split_gates(build_gate("token", tau=3.0)(join_gate_inputs(inputs)), inputs)
    shares = batch_shares(batches, "sequence_mean")
    return batches, [b.trace(objective, g, c) for b, g, c in zip(batches, gates, shares, strict=True)]


def read(traces: list[StepTrace]) -> dict[str, float]:
    return read_positions(to_host(position_tensors(traces)))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("objective", [SampledTokenOPD(), TeacherTopK(k=4)], ids=["sampled", "lsm"])
def test_means_by_position_are_those_of_a_loop(objective: Objective, parts: int) -> None:
    _, traces = traced(objective, parts)
    if parts == 2:  # the loss may leave out tokens inside a response
        mask = traces[1].inputs.mask.clone()
        mask[0, 3] = False
        traces[1] = replace(traces[1], inputs=replace(traces[1].inputs, mask=mask))
    values: dict[str, list[float]] = {}
    for trace in traces:
        inputs = trace.inputs
        known = (inputs.divergence, inputs.entropy, inputs.teacher_gap, trace.gates.weights)
        for row, valid in enumerate(inputs.mask.tolist()):
            columns = [column for column, each in enumerate(valid) if each]
            for column in columns:
                index = math.floor(32 * column / (columns[-1] + 1))
                for name, tensor in zip(CURVES, known, strict=True):
                    assert tensor is not None
                    values.setdefault(f"position/{name}/{index:02d}", []).append(float(tensor[row, column]))
    found = read(traces)
    del found["position/gradient_share/first_tenth"]
    assert found == pytest.approx({name: math.fsum(each) / len(each) for name, each in values.items()}, rel=1e-6)
    assert len(found) == 32 * len(CURVES)


@pytest.mark.parametrize("objective", [SampledTokenOPD(), TeacherTopK(k=4)], ids=["sampled", "lsm"])
def test_the_share_of_the_first_tenth_is_that_of_autograd(objective: Objective) -> None:
    batches, traces = traced(objective, 2)
    first = whole = 0.0
    for batch, trace in zip(batches, traces, strict=True):
        loss = reduce_losses(batch.losses(objective).losses, trace.gates.weights.double(), trace.loss_shares.double())
        squares = torch.autograd.grad(loss, batch.hidden)[0].square().sum(-1).tolist()
        place = 0
        for length in batch.rollouts.num_tokens.tolist():
            for column in range(length):
                first += squares[place] * (column < length / 10)
                whole += squares[place]
                place += 1
    assert read(traces)["position/gradient_share/first_tenth"] == pytest.approx(first / whole, rel=1e-6)
    assert 0 < first < whole


def test_what_is_not_known_is_left_out() -> None:
    _, (trace,) = traced(SampledTokenOPD(), 1)
    nothing = replace(trace, inputs=replace(trace.inputs, divergence=None), gradient_norms=None)
    names = {name.rpartition("/")[0] for name in read([nothing])}
    assert names == {"position/entropy", "position/teacher_gap", "position/weight"}
    masked = replace(trace, inputs=replace(trace.inputs, mask=torch.zeros_like(trace.inputs.mask)))
    assert read([masked]) == {}


def test_short_responses_leave_bins_empty_and_padding_changes_nothing() -> None:
    batch = micro_batch(0, (3,))
    trace = batch.trace(TeacherTopK(k=4), build_gate("none")(batch.inputs(TeacherTopK(k=4))), batch.rollouts.mask / 3)
    found = read([trace])
    assert [name for name in found if "entropy" in name] == [f"position/entropy/{n}" for n in ("00", "10", "21")]

    def wider(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(value, (0, 5))

    assert trace.gradient_norms is not None
    padded = replace(
        trace,
        inputs=trace.inputs.map(wider),
        gates=replace(trace.gates, weights=wider(trace.gates.weights)),
        loss_shares=wider(trace.loss_shares),
        gradient_norms=wider(trace.gradient_norms),
    )
    assert read([padded]) == found
