"""Metrics of gating against autograd, numpy, and plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from opdlab.diagnostics.gate_metrics import (
    WEIGHT_BINS,
    GateMetrics,
    correlation,
    gate_tensors,
    gradient_effect,
    loss_effect,
    read_gates,
)
from opdlab.diagnostics.histograms import Binning, Histogram, bin_rows, read_histograms
from opdlab.diagnostics.run_history import (
    MAX_AGES,
    BlockHistory,
    add_to_age_table,
    age_scalars,
    new_age_table,
    read_ages,
)
from opdlab.diagnostics.trace import StepTrace, to_host
from opdlab.gating import build_gate
from opdlab.objectives import Objective, Reduction, SampledTokenOPD, TeacherTopK, reduce_losses
from opdlab.training import join_gate_inputs, split_gates
from tests.diagnostics.synthetic import MicroBatch, batch_shares, micro_batch


def traced(
    objective: Objective, reduction: Reduction = "token_mean", gate: str = "token", tau: float = 6.0, parts: int = 2
) -> tuple[list[MicroBatch], list[StepTrace]]:
    """An optimizer step of micro-batches of unequal width, and its traces."""
    lengths = [(5, 9, 0, 7), (12, 3, 3, 1)]
    batches = [micro_batch(seed, lengths[seed]) for seed in range(parts)]
    inputs = [batch.inputs(objective) for batch in batches]
    gates = split_gates(build_gate(gate, tau=tau)(join_gate_inputs(inputs)), inputs)
    shares = batch_shares(batches, reduction)
    return batches, [b.trace(objective, g, c) for b, g, c in zip(batches, gates, shares, strict=True)]


def metrics_of(traces: list[StepTrace], max_blocks: int = 64) -> GateMetrics:
    return read_gates(to_host(gate_tensors(traces, max_blocks)))


def joined(traces: list[StepTrace], *path: str) -> np.ndarray:
    """Values of the valid positions, [N] float64."""
    pieces = []
    for trace in traces:
        value: object = trace
        for name in path:
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        pieces.append(value[trace.inputs.mask].double())
    return torch.cat(pieces).numpy()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("objective", [SampledTokenOPD(), TeacherTopK(k=4)], ids=["sampled", "lsm"])
def test_effect_on_the_gradient_is_that_of_autograd(objective: Objective, reduction: Reduction, parts: int) -> None:
    batches, traces = traced(objective, reduction, parts=parts)

    def gradient(gated: bool) -> tuple[float, Tensor]:
        total, pieces = 0.0, []
        for batch, trace in zip(batches, traces, strict=True):
            weights = trace.gates.weights.double() if gated else trace.inputs.mask.double()
            loss = reduce_losses(batch.losses(objective).losses, weights, trace.loss_shares.double())
            pieces.append(torch.autograd.grad(loss, batch.hidden)[0].flatten())
            total += loss.item()
        return total, torch.cat(pieces)

    (gated_loss, gated), (loss, ungated) = gradient(True), gradient(False)
    scalars = metrics_of(traces).scalars
    cosine = float(gated @ ungated / gated.norm() / ungated.norm())
    assert scalars["gate/gradient_cosine"] == pytest.approx(cosine, rel=1e-6)
    assert scalars["gate/gradient_norm_ratio"] == pytest.approx(float(gated.norm() / ungated.norm()), rel=1e-6)
    assert scalars["gate/ungated_loss"] == pytest.approx(loss, rel=1e-6)
    assert scalars["gate/loss_ratio"] == pytest.approx(gated_loss / loss, rel=1e-6)
    assert cosine < 0.97  # a case in which wrong formulas give other numbers
    assert abs(float(gated.norm() / ungated.norm()) - 1) > 0.02


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradient_effect_has_no_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, shares, norms = torch.rand(3, 1000, generator=generator, dtype=torch.float64)
    expected = gradient_effect(weights, shares, norms)
    torch.testing.assert_close(gradient_effect(weights, shares * scale, norms * scale**5), expected)


def test_what_is_undefined_is_left_out() -> None:
    zero = torch.zeros(4).double()
    assert all(value.isnan() for value in gradient_effect(zero + 1, zero + 1, zero))
    one = torch.ones(4).double()
    balanced = torch.tensor([1.0, -1.0, 1.0, -0.99]).double()
    assert loss_effect(one, one, balanced)[1].isnan()
    assert loss_effect(one, one, zero)[1].isnan()
    assert float(loss_effect(2 * one, one, one)[1]) == 2
    _, traces = traced(TeacherTopK(k=4), gate="none")
    scalars = metrics_of(traces).scalars
    assert not any("correlation" in name for name in scalars)
    assert scalars["gate/gradient_cosine"] == pytest.approx(1)
    assert scalars["gate/gradient_norm_ratio"] == pytest.approx(1)
    assert scalars["gate/loss_ratio"] == pytest.approx(1)
    bare = [replace(trace, gradient_norms=None) for trace in traces]
    assert not any("gradient" in name for name in metrics_of(bare).scalars)


def test_correlations_are_those_of_numpy() -> None:
    _, traces = traced(SampledTokenOPD(), gate="block64")
    weights = joined(traces, "gates", "weights")
    gap = joined(traces, "inputs", "teacher_logprobs") - joined(traces, "inputs", "current_logprobs")
    losses = joined(traces, "inputs", "position_losses")
    scalars = metrics_of(traces).scalars
    expected = np.corrcoef([weights, gap, losses])[0]
    assert scalars["gate/correlation/teacher_gap"] == pytest.approx(expected[1])
    assert scalars["gate/correlation/position_loss"] == pytest.approx(expected[2])
    assert abs(expected[1:]).min() > 0.01


def test_rounding_correlates_with_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator).double()
    everywhere = torch.ones(100).bool()
    assert correlation(1 + 1e-7 * noise, noise, everywhere).isnan()
    assert float(correlation(1 + 1e-4 * noise, noise, everywhere)) == pytest.approx(1)


@pytest.mark.parametrize(("gate", "max_blocks"), [("block32", 64), ("token", 64), ("token", 3)])
def test_histograms_hold_every_valid_position_once(gate: str, max_blocks: int) -> None:
    _, traces = traced(TeacherTopK(k=4), gate=gate)
    metrics = metrics_of(traces, max_blocks)
    ids, weights = joined(traces, "gates", "segment_ids"), joined(traces, "gates", "weights")
    blocks = [name for name in metrics.histograms if name.startswith("gate/block/")]
    assert blocks == [f"gate/block/{n:03d}" for n in range(min(int(ids.max()) + 1, max_blocks))]
    drift = joined(traces, "inputs", "drift")
    for n, name in enumerate(blocks):
        assert_holds(metrics.histograms[name], weights[ids == n])
        assert float(metrics.block_weights[n]) == pytest.approx(weights[ids == n].mean())
        assert float(metrics.block_drift[n]) == pytest.approx(abs(drift[ids == n]).mean())
    assert metrics.block_weights[len(blocks) :].isnan().all()
    assert_holds(metrics.histograms["gate/weights"], weights)
    assert_holds(metrics.histograms["gate/token_drift"], drift)
    assert_holds(metrics.histograms["gate/segment_drift"], joined(traces, "gates", "segment_drift"))


def assert_holds(histogram: Histogram, values: np.ndarray) -> None:
    assert histogram.num == len(values) == sum(histogram.counts)
    assert histogram.sum == pytest.approx(values.sum(), rel=1e-12)
    assert histogram.sum_squares == pytest.approx((values**2).sum(), rel=1e-12)
    assert (histogram.min, histogram.max) == (values.min(), values.max())
    assert histogram.limits == sorted(histogram.limits)
    # Counts are exact bin by bin, except for values on an edge.
    below = [(values <= limit * (1 + 1e-9) + 1e-12).sum() for limit in histogram.limits]
    assert below == list(np.cumsum(histogram.counts))


def test_bins_are_fine_where_values_crowd() -> None:
    values = torch.cat([torch.linspace(-0.01, 0.01, 999), torch.tensor([20.0])]).double()
    table = bin_rows(values, torch.zeros(1000).long(), 1, Binning(0.0, 0.001))
    (histogram,) = read_histograms(table, Binning(0.0, 0.001))
    assert histogram is not None
    assert max(histogram.counts) < 150  # equally wide bins would hold 999 in one


def test_equal_values_and_no_values_make_histograms() -> None:
    ones = torch.ones(5).double()
    (equal,) = read_histograms(bin_rows(ones, torch.zeros(5).long(), 1, WEIGHT_BINS), WEIGHT_BINS)
    assert equal is not None
    assert (equal.min, equal.max, equal.num, equal.limits) == (1.0, 1.0, 5, [1.0])
    assert read_histograms(bin_rows(ones, torch.ones(5).long(), 1, WEIGHT_BINS), WEIGHT_BINS) == [None]


def test_a_step_without_a_valid_position_has_no_metrics() -> None:
    batch = micro_batch(0, lengths=(4, 4))
    mask = torch.zeros(2, 4).bool()
    objective = TeacherTopK(k=4)
    inputs = batch.inputs(objective)
    trace = batch.trace(objective, build_gate("block32")(inputs), mask.double())
    empty = replace(trace, inputs=replace(inputs, mask=mask))
    metrics = metrics_of([empty])
    assert metrics.histograms == {}
    assert metrics.scalars == {"gate/ungated_loss": 0.0}


# -- by age ----------------------------------------------------------------------------------------------------------


def test_ages_are_means_over_positions() -> None:
    objective = SampledTokenOPD()
    table = new_age_table()
    expected: dict[int, list[np.ndarray]] = {}
    for step, snapshot, epoch in [(5, 5, 0), (7, 5, 1), (9, 7, 0), (500, 7, 40)]:
        batch = micro_batch(step, snapshot_step=snapshot)
        gates = build_gate("token", tau=2.0)(batch.inputs(objective))
        trace = batch.trace(objective, gates, batch_shares([batch], "token_mean")[0], step=step, epoch=epoch)
        add_to_age_table(table, trace)
        values = np.stack([abs(joined([trace], "inputs", "drift")), joined([trace], "gates", "weights")])
        for key in (min(step - snapshot, MAX_AGES - 1), 1000 + min(epoch, 15)):
            expected.setdefault(key, []).append(values)
    scalars = age_scalars(table)
    assert len(scalars) == 3 * len(expected)
    for key, pieces in expected.items():
        drift, weights = np.concatenate(pieces, axis=1)
        family, place = ("age", f"{key:03d}") if key < 1000 else ("reuse_epoch", str(key - 1000))
        assert scalars[f"{family}/drift/{place}"] == pytest.approx(drift.mean())
        assert scalars[f"{family}/weight_mean/{place}"] == pytest.approx(weights.mean())
        assert scalars[f"{family}/weight_std/{place}"] == pytest.approx(weights.std())
    ages = read_ages(table)
    assert ages["age"].ages == [0, 2, 63]
    assert ages["reuse_epoch"].ages == [0, 1, 15]
    assert ages["age"].num_positions == [21, 42, 21]


def test_small_spread_of_weights_is_not_lost() -> None:
    # Squares of numbers near 1 cancel: their spread would be rounding.
    table = new_age_table()
    excess = 1e-6 * torch.tensor([1.0, -1.0]).double()
    table[0] = torch.tensor([2.0, 0.0, float(excess.sum()), float(excess.square().sum())])
    assert age_scalars(table)["age/weight_std/000"] == pytest.approx(1e-6)


# -- history ---------------------------------------------------------------------------------------------------------


def filled(history: BlockHistory, steps: range) -> BlockHistory:
    for step in steps:
        history.add(step, torch.full((history.max_blocks,), float(step)), torch.zeros(history.max_blocks))
    return history


def test_history_is_thinned_out_evenly() -> None:
    history = filled(BlockHistory(3, max_steps=8), range(100))
    assert history.steps == list(range(0, 100, 16))
    assert history.values.shape == (2, 3, 7)
    assert history.values[0, 0].tolist() == history.steps


@pytest.mark.parametrize("stopped", [1, 8, 9, 37])
def test_history_goes_on_after_a_resume(stopped: int) -> None:
    whole = filled(BlockHistory(3, max_steps=8), range(100))
    first = filled(BlockHistory(3, max_steps=8), range(stopped))
    second = BlockHistory(3, max_steps=8)
    second.load_state_dict(first.state_dict())
    filled(second, range(stopped, 100))
    assert second.steps == whole.steps
    assert torch.equal(second.values, whole.values)


@pytest.mark.parametrize("max_blocks", [2, 5])
def test_history_takes_another_number_of_segments(max_blocks: int) -> None:
    history = BlockHistory(max_blocks)
    history.load_state_dict(filled(BlockHistory(3), range(4)).state_dict())
    filled(history, range(4, 6))
    assert history.values.shape == (2, max_blocks, 6)
    assert history.values[0, 3:, :4].isnan().all()
