"""The gates of other papers: options, edges, runs; their formulas are in `tests/conformance`."""

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
    PrefixGate,
    RatioMaskGate,
)
from tests.conformance.gate_formulas import INPUTS
from tests.toy_run import STUDENT, TEACHER, Run


def test_prefix_weights_of_perfect_agreement_are_equal() -> None:
    agreeing = replace(INPUTS, teacher_logprobs=INPUTS.current_logprobs)
    assert torch.equal(PrefixGate()(agreeing).weights, 1.5 * INPUTS.mask.float())


def test_an_open_band_masks_nothing() -> None:
    assert torch.equal(RatioMaskGate(0.0, 1e300)(INPUTS).weights, INPUTS.mask.float())


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
