"""Gates on signals other than drift; their formulas are in `tests/conformance`."""

import math
from dataclasses import replace

import pytest
import torch

from opdlab.errors import UsageError
from opdlab.gating import GateInputs, Normalization, build_gate
from opdlab.module import OPDModule
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher
from opdlab.strategies import (
    EntropyTopGate,
    FreshnessGate,
    RewardGate,
    TokenImportanceGate,
)
from opdlab.training import gate_inputs
from opdlab.types import TeacherRequest
from tests.conformance.gate_formulas import INPUTS, kept, rows
from tests.diagnostics.synthetic import micro_batch
from tests.toy_run import STUDENT, TEACHER


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


def test_a_signal_that_is_the_same_everywhere_decides_nothing() -> None:
    level = replace(INPUTS, divergence=torch.full_like(INPUTS.drift, 0.3))
    gate = TokenImportanceGate(0.5, normalization="none")
    assert rows(gate(level).weights) == kept(rows(INPUTS.entropy), 0.5)


def test_freshness_of_tiny_drifts_is_exact_in_float32() -> None:
    zeros = torch.zeros(1, 4)
    inputs = GateInputs(zeros.long(), zeros + 1, zeros, zeros + 1e-4, age=zeros)
    weight = FreshnessGate(alpha=100.0, normalization="none")(inputs).weights[0, 0].item()
    assert weight == pytest.approx(math.exp(-100 * 1e-4 / math.sqrt(2)), rel=1e-4)


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
