"""The gates of other papers, against their formulas written as loops over plain numbers."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.gating import GateInputs, RuleGate, build_gate
from opdlab.module import OPDModule
from opdlab.objectives import Objective, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher
from opdlab.strategies import (
    FilterReweightGate,
    PrefixGate,
    RatioMaskGate,
    SequenceRatioMaskGate,
    SignConsistencyGate,
    TruncatedRatioGate,
)
from opdlab.testing import GateTester
from tests.toy_run import STUDENT, TEACHER, Run

INPUTS = GateTester(PrefixGate, num_tokens=40).inputs(torch.float64)


def rows(tensor: Tensor | None) -> list[list[float]]:
    """Values of the valid positions, row by row."""
    assert tensor is not None
    return [values[mask].tolist() for values, mask in zip(tensor, INPUTS.mask, strict=True)]


def check(gate: RuleGate, expected: list[list[float]]) -> None:
    seen = rows(gate(INPUTS).weights)
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_prefix_weights_follow_the_formula() -> None:
    expected = []
    for teacher, current in zip(rows(INPUTS.teacher_logprobs), rows(INPUTS.current_logprobs), strict=True):
        gaps = [abs(q - p) for q, p in zip(teacher, current, strict=True)]
        expected.append([1 + 0.7 * (1 - math.fsum(gaps[:t]) / math.fsum(gaps)) for t in range(len(gaps))])
    check(PrefixGate(gamma=0.7), expected)
    for weights in rows(PrefixGate(gamma=0.7)(INPUTS).weights):
        assert weights == sorted(weights, reverse=True)


def test_prefix_weights_of_perfect_agreement_are_equal() -> None:
    agreeing = replace(INPUTS, teacher_logprobs=INPUTS.current_logprobs)
    assert torch.equal(PrefixGate()(agreeing).weights, 1.5 * INPUTS.mask.float())


@pytest.mark.parametrize("dropped", [0.0, 0.2, 0.5, 0.9])
def test_filter_and_reweight_follow_the_formula(dropped: float) -> None:
    teacher, student = rows(INPUTS.teacher_entropy), rows(INPUTS.entropy)
    most_teacher, most_student = (max(h for row in entropies for h in row) for entropies in (teacher, student))
    likelihoods = [statistics.fmean(row) if row else math.nan for row in rows(INPUTS.teacher_logprobs)]
    known = sorted(value for value in likelihoods if not math.isnan(value))
    place = dropped * (len(known) - 1)  # linear interpolation between the order statistics
    low, high = known[math.floor(place)], known[math.ceil(place)]
    threshold = low + (place - math.floor(place)) * (high - low)
    expected = [
        [
            (likelihood >= threshold - 1e-12) * (1 + 0.5 * (1 - t / most_teacher)) * (1 + 2.0 * s / most_student)
            for t, s in zip(teacher_row, student_row, strict=True)
        ]
        for likelihood, teacher_row, student_row in zip(likelihoods, teacher, student, strict=True)
    ]
    check(FilterReweightGate(dropped, alpha=0.5, beta=2.0, normalization="none"), expected)
    if dropped == 0.5:
        assert [sum(row) > 0 for row in expected].count(True) == 2  # of four rollouts with tokens


def test_ratio_masks_follow_the_formula() -> None:
    drifts = rows(INPUTS.drift)
    check(RatioMaskGate(0.7, 1.5), [[float(0.7 <= math.exp(d) <= 1.5) for d in row] for row in drifts])
    check(TruncatedRatioGate(1.3), [[min(math.exp(d), 1.3) for d in row] for row in drifts])
    for aggregate, low, high in (("geometric_mean", 0.8, 1.3), ("product", 0.1, 1.8)):
        expected = []
        for row in drifts:
            total = math.fsum(row) / (len(row) if aggregate == "geometric_mean" and row else 1)
            expected.append([float(low <= math.exp(total) <= high)] * len(row))
        check(SequenceRatioMaskGate(low, high, aggregate), expected)  # type: ignore[arg-type]
        kept = [row[0] for row in expected if row]
        assert set(kept) == {0.0, 1.0}


def test_an_open_band_masks_nothing() -> None:
    assert torch.equal(RatioMaskGate(0.0, 1e300)(INPUTS).weights, INPUTS.mask.float())


def test_sign_consistency_follows_the_formula() -> None:
    expected = []
    verdicts = {1: 1, 0: -1, -1: 0}
    for teacher, current, correct in zip(
        rows(INPUTS.teacher_logprobs), rows(INPUTS.current_logprobs), rows(INPUTS.correct), strict=True
    ):
        expected.append(
            [
                1 + 0.4 * math.copysign(1, q - p) * verdicts[int(c)]
                for q, p, c in zip(teacher, current, correct, strict=True)
            ]
        )
    check(SignConsistencyGate(0.4), expected)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("iw_opd", {"gamma": -1.0}, "gamma is -1.0, but must be at least 0"),
        ("fire_opd", {"dropped": 1.0}, "dropped is 1.0"),
        ("fire_opd", {"alpha": -0.5}, "alpha is -0.5"),
        ("fire_opd", {"beta": -0.5}, "beta is -0.5"),
        ("ratio_mask", {"min_ratio": 1.5}, "min_ratio is 1.5 and max_ratio is 5.0"),
        ("ratio_mask", {"max_ratio": 0.5}, "max_ratio is 0.5"),
        ("truncated_ratio", {"max_ratio": 0.5}, "max_ratio is 0.5"),
        ("sequence_ratio_mask", {"aggregate": "sum"}, "aggregate is 'sum'"),
        ("sign_consistency", {"strength": 2.0}, "strength is 2.0"),
        ("sign_consistency", {"normalization": "mode"}, "normalization is 'mode'"),
        ("entropy_top", {"share": 0.0}, "share is 0.0, but must be above 0 and at most 1"),
        ("tip", {"share": 1.5}, "share is 1.5"),
        ("horizon", {"tokens": 0}, "tokens is 0, but must be at least 1"),
        ("horizon", {"growth": -1}, "growth is -1"),
        ("horizon", {"every": 0}, "every is 0, but must be at least 1 step"),
        ("f_opd", {"alpha": -1.0}, "alpha is -1.0"),
        ("f_opd", {"threshold": 1.0}, "threshold is 1.0"),
        ("rg_opd", {"margin": -0.1}, "margin is -0.1"),
        ("rg_opd", {"block_size": 0}, "block_size is 0, but must be at least 1 token, or null"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_gate(name, **options)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("iw_opd", "teacher_logprobs"),
        ("fire_opd", "teacher_entropy"),
        ("fire_opd", "entropy"),
        ("sign_consistency", "correct"),
        ("entropy_top", "entropy"),
        ("tip", "divergence"),
        ("ta_opd", "compatible_mass"),
        ("f_opd", "age"),
        ("rg_opd", "correct"),
    ],
)
def test_what_a_gate_needs_and_does_not_get_is_named(name: str, missing: str) -> None:
    with pytest.raises(UsageError, match=f"Gate needs {missing}, which its inputs do not have"):
        build_gate(name)(replace(INPUTS, **{missing: None}))  # type: ignore[arg-type]


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [TeacherTopK(k=8), SampledTokenOPD()], ids=["lsm", "sampled"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("iw_opd", {}), ("fire_opd", {}), ("truncated_ratio", {}), ("sequence_ratio_mask", {})),
        *(("sign_consistency", {}), ("entropy_top", {}), ("tip", {}), ("horizon", {"tokens": 8, "growth": 4})),
        *(("f_opd", {}), ("rg_opd", {"block_size": 1})),
    ],
)
def test_a_run_computes_what_a_control_needs(
    make_run: Callable[..., Run], name: str, options: dict[str, int], objective: Objective
) -> None:
    runs = []
    for accumulate in (1, 2):
        run = make_run(gate=build_gate(name, **options), objective=objective, accumulate=accumulate, refresh=100)
        run.fit(3)
        runs.append(run)
    whole, parts = (run.recorder for run in runs)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    assert [step["gate/std"] for step in parts.steps.values()] == pytest.approx(
        [step["gate/std"] for step in whole.steps.values()], rel=1e-2, abs=1e-4
    )
    assert whole.steps[3]["gate/std"] > 0


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_run_computes_the_teachers_mass_on_the_students_tokens(make_run: Callable[..., Run], support: str) -> None:
    objective = SupportDivergence("forward_kl", support, "renormalize", k=4)  # type: ignore[arg-type]
    run = make_run(gate=build_gate("ta_opd", share=0.25), objective=objective, refresh=100)
    run.fit(2)
    for step in run.recorder.steps.values():
        assert step["gate/max"] == pytest.approx(4, rel=0.1)  # a quarter of the positions, with weights of mean 1
        assert step["gate/min"] == 0


class HungryGate(RuleGate):
    needs = ("entropie",)

    def weight(self, inputs: GateInputs) -> Tensor:
        return torch.ones_like(inputs.drift)


def test_a_need_that_nothing_meets_is_refused_at_once() -> None:
    words = "gate is HungryGate, which needs 'entropie', but .* no such thing; did you mean 'entropy'"
    with pytest.raises(UsageError, match=words):
        OPDModule(LanguageModel(STUDENT), LocalTeacher(TEACHER), TeacherTopK(k=4), HungryGate())


def test_verdicts_need_a_verifier(make_run: Callable[..., Run]) -> None:
    run = make_run(gate=build_gate("sign_consistency"))
    run.data.train_source.verifier = None
    with pytest.raises(UsageError, match="SignConsistencyGate, which needs the verifier's verdict"):
        run.fit(1)
