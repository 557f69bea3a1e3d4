"""Every objective and every control gate against its formula in float64: values, and gradients of the losses."""

import math
from itertools import product
from typing import Any, get_args

import pytest

from opdlab.gating import RuleGate, build_gate, gate_names, gate_registry
from opdlab.objectives import objective_names
from opdlab.objectives.base import objective_registry
from opdlab.objectives.functional import Divergence, Estimator, Tail
from opdlab.objectives.support_divergence import Support
from tests.conformance.batch import STALE, run
from tests.conformance.formulas import ALPHA, BETA, plain_losses
from tests.conformance.gate_formulas import CONTROLS, INPUTS, rows

SHARES = {"beta": BETA, "alpha": ALPHA}
POLICY_GRADIENT: list[dict[str, Any]] = [
    *({"reference": reference} for reference in ("behavior", "current")),
    *({"clip": None}, {"dual_clip": None}, {"clip": 0.1, "dual_clip": 1.5}),
    *({"shape": "clamp", "advantage_clamp": 0.8}, {"shape": "signed_log"}, {"shape": "power", "power": 0.5}),
    *({"shape": shape, "reference": "current"} for shape in ("signed_log", "power")),
    *({"baseline": "support_kl", "k": k} for k in (1, 4)),
    *({"reward_weight": 0.7, "reward_scaled": scaled} for scaled in (False, True)),
    {"baseline": "support_kl", "k": 4, "shape": "signed_log", "reward_weight": 0.7, "clip": None},
]
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "teacher_topk": [{"k": 2}, {"k": 8}],
    "support_divergence": [
        {"divergence": divergence, "support": support, "tail": tail, "k": 4, **SHARES}
        for divergence, support, tail in product(get_args(Divergence), get_args(Support), get_args(Tail))
    ],
    "full_divergence": [{"divergence": divergence, **SHARES} for divergence in get_args(Divergence)],
    "sampled_token": [*({"estimator": estimator} for estimator in get_args(Estimator)), *POLICY_GRADIENT],
}
BUILT_IN = [name for name in objective_names() if objective_registry().get(name).__module__.startswith("opdlab.")]


def test_every_objective_and_every_control_has_a_formula() -> None:
    assert set(OBJECTIVES) == set(BUILT_IN)
    gates = {name: gate_registry().get(name) for name in gate_names()}
    controls = {name for name, gate in gates.items() if issubclass(gate, RuleGate)}
    assert set(CONTROLS) == {name for name in controls if gates[name].__module__.startswith("opdlab.")}


def test_the_batch_reaches_every_clip() -> None:
    case = run("sampled_token")
    ratio = (case.sampled(case.student) - case.sampled(case.behavior)).exp()
    advantage = case.output.metrics["advantage"][case.mask]
    assert ((ratio > 1.2) & (advantage > 0)).any()
    assert ((ratio < 0.8) & (advantage < 0)).any()
    assert ((ratio > 3.0) & (advantage < 0)).any()
    assert ((ratio > 0.8) & (ratio < 1.2)).any()


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, each in OBJECTIVES.items() for options in each], ids=str
)
def test_an_objective_follows_its_formula(name: str, options: dict[str, Any]) -> None:
    case = run(name, STALE, **options)
    # A reward is float32, as the mean verdict of a prompt is.
    single: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if options.get("reward_weight") else {}
    case.agrees(plain_losses(case), **single)


@pytest.mark.parametrize("normalization", ["none", "mean"])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, (_, each) in CONTROLS.items() for options in each], ids=str
)
def test_a_control_follows_its_formula(name: str, options: dict[str, Any], normalization: str) -> None:
    raw = CONTROLS[name][0](**options)
    seen = rows(build_gate(name, **options, normalization=normalization)(INPUTS).weights)
    flat = [weight for row in raw for weight in row]
    # If a gate keeps nothing, all of the batch has weight 1, unless the normalization is none.
    unit = math.fsum(flat) / len(flat) if normalization == "mean" else 1.0
    expected = [[weight / unit if unit else 1.0 for weight in row] for row in raw]
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "sign_consistency"])
def test_a_controls_formula_makes_a_difference(name: str) -> None:
    formula, options = CONTROLS[name]
    assert any(len({round(weight, 6) for row in formula(**each) for weight in row}) > 1 for each in options)
