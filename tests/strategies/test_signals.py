"""Gates on signals other than drift, against their formulas written as loops over plain numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.gating import GateInputs, Normalization, RuleGate, build_gate
from opdlab.module import OPDModule
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher
from opdlab.strategies import (
    EntropyTopGate,
    FreshnessGate,
    HorizonGate,
    RewardGate,
    TeachabilityGate,
    TokenImportanceGate,
)
from opdlab.testing import GateTester
from opdlab.training import gate_inputs
from opdlab.types import TeacherRequest
from tests.diagnostics.synthetic import micro_batch
from tests.toy_run import STUDENT, TEACHER

INPUTS = replace(GateTester(EntropyTopGate, num_tokens=40).inputs(torch.float64), step=25)
Rows = list[list[float]]


def rows(tensor: Tensor | None) -> Rows:
    """Values of the valid positions, row by row."""
    assert tensor is not None
    return [values[mask].tolist() for values, mask in zip(tensor, INPUTS.mask, strict=True)]


def check(gate: RuleGate, raw: Rows, inputs: GateInputs = INPUTS) -> None:
    """Compare a gate's weights with raw weights that are divided by their mean over all positions."""
    assert gate.normalization.name == "mean"
    flat = [weight for row in raw for weight in row]
    mean = math.fsum(flat) / len(flat)
    for ours, theirs in zip(rows(gate(inputs).weights), raw, strict=True):
        assert ours == pytest.approx([weight / mean for weight in theirs], rel=1e-6, abs=1e-6)


def kept(scores: Rows, share: float) -> Rows:
    """1 at the positions of each row with the highest scores, by repeated search for the largest."""
    found = []
    for row in scores:
        weights = [0.0] * len(row)
        for _ in range(max(1, math.floor(share * len(row) + 1e-9)) if row else 0):
            best = max((t for t in range(len(row)) if not weights[t]), key=lambda t: (row[t], -t))
            weights[best] = 1.0
        found.append(weights)
    return found


def scaled(values: Rows, low: float, high: float) -> Rows:
    """Values between two quantiles of all, as 0 to 1."""
    ordered = sorted(value for row in values for value in row)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        below = math.floor(place)
        return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])

    bottom, top = quantile(low), quantile(high)
    return [[min(1.0, max(0.0, (value - bottom) / (top - bottom))) for value in row] for row in values]


def combined(function: Callable[[float, float], float], first: Rows, second: Rows) -> Rows:
    return [[function(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.29, 0.5, 1.0])
def test_the_top_share_of_each_rollout_is_kept(share: float) -> None:
    check(EntropyTopGate(share), kept(rows(INPUTS.entropy), share))


def test_a_share_that_rounds_below_a_whole_number_keeps_it() -> None:
    zeros, ones = torch.zeros(1, 100), torch.ones(1, 100)
    assert 0.29 * 100 < 29  # in floating point
    gate = EntropyTopGate(share=0.29, normalization="none")
    inputs = GateInputs(zeros.long(), ones, zeros, zeros, entropy=torch.arange(100.0)[None])
    assert gate(inputs).weights.sum() == 29


def test_a_teacher_without_a_preference_agrees_with_no_verdict() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    verdicts = torch.tensor([[1] * 3, [0] * 3], dtype=torch.int8)
    inputs = GateInputs(zeros.long(), ones, zeros, zeros, zeros, correct=verdicts)
    assert not RewardGate(normalization="none")(inputs).weights.any()


def test_of_equal_scores_the_earlier_are_kept() -> None:
    gates = EntropyTopGate(0.5, normalization="none")(replace(INPUTS, entropy=torch.zeros_like(INPUTS.drift)))
    for row in rows(gates.weights):
        assert row == [1.0] * (len(row) // 2 or len(row)) + [0.0] * (len(row) - (len(row) // 2 or len(row)))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_tip_follows_the_formula(share: float) -> None:
    h, d = scaled(rows(INPUTS.entropy), 0, 1), scaled(rows(INPUTS.divergence), 0, 1)
    check(TokenImportanceGate(share), kept(combined(lambda a, b: a + b - a * b, h, d), share))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_ta_opd_follows_the_formula(share: float) -> None:
    d, c = (scaled(rows(values), 0.05, 0.95) for values in (INPUTS.divergence, INPUTS.compatible_mass))
    check(TeachabilityGate(share), kept(combined(lambda a, b: a * b, d, c), share))


def test_a_signal_that_is_the_same_everywhere_decides_nothing() -> None:
    level = replace(INPUTS, divergence=torch.full_like(INPUTS.drift, 0.3))
    check(TokenImportanceGate(0.5), kept(rows(INPUTS.entropy), 0.5), level)


@pytest.mark.parametrize(("growth", "every", "horizon"), [(0, 1, 7), (3, 10, 13), (1, 1, 32), (100, 25, 107)])
def test_the_horizon_grows_with_the_step(growth: int, every: int, horizon: int) -> None:
    columns = [[t for t, valid in enumerate(mask) if valid] for mask in INPUTS.mask.tolist()]
    expected = [[float(t < horizon) for t in row] for row in columns]
    check(HorizonGate(7, growth, every), expected)


@pytest.mark.parametrize(("alpha", "threshold"), [(1.0, 0.0), (0.3, 0.2), (0.0, 0.0)])
def test_freshness_follows_the_formula(alpha: float, threshold: float) -> None:
    expected = []
    for drifts, ages in zip(rows(INPUTS.drift), rows(INPUTS.age), strict=True):
        divergence = math.fsum(math.exp(d) * d - math.exp(d) + 1 for d in drifts) / max(len(drifts), 1)
        expected.append([max(0.0, math.exp(-alpha * math.sqrt(divergence)) / (a + 1) - threshold) for a in ages])
    check(FreshnessGate(alpha, threshold), expected)


def test_freshness_of_tiny_drifts_is_exact_in_float32() -> None:
    zeros = torch.zeros(1, 4)
    inputs = GateInputs(zeros.long(), zeros + 1, zeros, zeros + 1e-4, age=zeros)
    weight = FreshnessGate(alpha=100.0, normalization="none")(inputs).weights[0, 0].item()
    assert weight == pytest.approx(math.exp(-100 * 1e-4 / math.sqrt(2)), rel=1e-4)


@pytest.mark.parametrize(("margin", "block_size"), [(0.0, None), (3.0, None), (0.0, 1), (0.4, 1), (0.5, 7)])
def test_rewards_follow_the_formula(margin: float, block_size: int | None) -> None:
    expected: Rows = []
    tensors: list[Any] = [INPUTS.mask, INPUTS.teacher_logprobs, INPUTS.current_logprobs, INPUTS.correct]
    for mask, teacher, student, verdict in zip(*(tensor.tolist() for tensor in tensors), strict=True):
        places = [t for t in range(40) if mask[t]]
        row = []
        for t in places:
            span = places if block_size is None else [u for u in places if u // block_size == t // block_size]
            gap = math.fsum(teacher[u] - student[u] for u in span)
            row.append(float((verdict[t] == 1 and gap > margin) or (verdict[t] == 0 and gap < -margin)))
        expected.append(row)
    if block_size is not None:
        assert {weight for row in expected for weight in row} == {0.0, 1.0}
        check(RewardGate(margin, block_size), expected)
    assert rows(RewardGate(margin, block_size, normalization="none")(INPUTS).weights) == expected


# -- the inputs that a training step computes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "own"), [(TeacherTopK(k=4), True), (SampledTokenOPD(), False)], ids=["lsm", "sampled"]
)
def test_the_divergence_is_the_objectives_own_or_k3(objective: Objective, own: bool) -> None:
    batch = micro_batch(0)
    positions, inputs = batch.losses(objective), batch.inputs(objective)
    mask = inputs.mask
    assert inputs.divergence is not None
    assert not inputs.divergence.requires_grad
    if own:
        assert torch.equal(inputs.divergence, positions.losses.detach())
        return
    expected = []
    for q, p in zip(batch.targets.logprobs[mask].tolist(), positions.logprobs[mask].tolist(), strict=True):
        expected.append(math.exp(min(q - p, 20)) - 1 - min(q - p, 20))
    assert inputs.divergence[mask].tolist() == pytest.approx(expected)
    assert (inputs.divergence[~mask] == 0).all()


@pytest.mark.parametrize("union", [False, True])
def test_the_compatible_mass_is_the_teachers_on_the_students_tokens(union: bool) -> None:
    batch = micro_batch(0)
    rows, width = batch.rollouts.tokens.shape
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, width, 19, generator=generator, dtype=torch.float64)
    students = torch.stack([torch.randperm(19, generator=generator)[:3] for _ in range(rows * width)])
    students = students.view(rows, width, 3)
    support = torch.cat([logits.topk(2).indices, students], -1) if union else students
    targets = replace(
        batch.targets,
        support_ids=support,
        support_logits=logits.gather(-1, support),
        log_normalizer=logits.logsumexp(-1),
    )
    rollouts = replace(batch.rollouts, behavior_support_ids=students)
    inputs = gate_inputs(rollouts, targets, batch.losses(SampledTokenOPD()))
    expected = logits.softmax(-1).gather(-1, students).sum(-1)
    assert inputs.compatible_mass is not None
    assert torch.allclose(inputs.compatible_mass, expected)
    assert batch.inputs(SampledTokenOPD()).compatible_mass is None


class StudentSupport(SampledTokenOPD):
    """An objective that asks for the teacher's logits of the student's tokens."""

    @property
    def request(self) -> TeacherRequest:
        return TeacherRequest(behavior_top_k=4)


def test_ta_opd_asks_for_the_normalizer_and_refuses_an_objective_without_the_students_support() -> None:
    student, teacher, gate = LanguageModel(STUDENT), LocalTeacher(TEACHER), build_gate("ta_opd")
    assert OPDModule(student, teacher, StudentSupport(), gate).request.tail
    assert not OPDModule(student, teacher, StudentSupport(), build_gate("tip")).request.tail
    with pytest.raises(
        UsageError, match="model.gate is TeachabilityGate, which .* model.objective SampledTokenOPD has"
    ):
        OPDModule(student, teacher, SampledTokenOPD(), gate)


def test_the_published_form_has_mean_one() -> None:
    for name in ("entropy_top", "tip", "ta_opd", "horizon", "f_opd", "rg_opd"):
        assert build_gate(name).normalization == Normalization("mean")
