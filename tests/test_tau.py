"""Schedules of tau: the closed form for two groups of positions, and their use in training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opdlab.cli import main
from opdlab.errors import UsageError
from opdlab.gating import GateInputs, build_gate
from opdlab.tau import EffectiveSampleSizeTau, LinearTau
from opdlab.testing import GateTester
from tests.toy_run import Run

MakeRun = Callable[..., Run]


def effective_sample_size(weights: torch.Tensor, mask: torch.Tensor) -> float:
    w = weights[mask].double()
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.6, 0.9, 0.99])
def test_effective_sample_size_of_two_groups_has_a_closed_form(scale: float, target: float) -> None:
    # Half of the positions at 0, half at `scale`: with x = exp(-tau * scale) the size is (1 + x)^2 / (2 (1 + x^2)).
    x = (1 - math.sqrt(1 - (2 * target - 1) ** 2)) / (2 * target - 1)
    statistic = torch.tensor([[0.0, scale], [scale, 0.0], [7.0, 7.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    tau = EffectiveSampleSizeTau(target, max_tau=1e4)(0, statistic, mask)
    assert float(tau) == pytest.approx(-math.log(x) / scale, rel=1e-4)


@pytest.mark.parametrize("name", ["token", "block32", "sequence"])
@pytest.mark.parametrize("statistic", ["signed_mean", "rms"])
@pytest.mark.parametrize("target", [0.7, 0.95])
def test_weights_rest_on_the_share_asked_for(name: str, statistic: Any, target: float) -> None:
    gate = build_gate(name, tau=EffectiveSampleSizeTau(target), statistic=statistic)
    inputs = GateTester(lambda: gate, num_tokens=400).inputs()
    gates = gate(inputs)
    assert effective_sample_size(gates.weights, inputs.mask) == pytest.approx(target, abs=1e-3)
    assert gates.tau is not None
    same = build_gate(name, tau=float(gates.tau), statistic=statistic)(inputs)
    torch.testing.assert_close(gates.weights, same.weights, rtol=1e-5, atol=1e-6)


def test_where_nothing_drifts_the_largest_tau_leaves_weights_of_one() -> None:
    zeros, mask = torch.zeros(2, 3), torch.tensor([[True, True, False]] * 2)
    gates = build_gate("token", tau=EffectiveSampleSizeTau(0.5, max_tau=8.0))(
        GateInputs(zeros.long(), mask, zeros, zeros)
    )
    assert torch.equal(gates.weights, mask.float())
    assert gates.tau is not None
    assert float(gates.tau) == pytest.approx(8.0)


@pytest.mark.parametrize("tau", [LinearTau(2.0, 0.0, 10), EffectiveSampleSizeTau(0.8)], ids=["linear", "size"])
@pytest.mark.parametrize("name", ["block32", "span", "none"])
def test_scheduled_gates_obey_the_laws(name: str, tau: Any) -> None:
    options: dict[str, Any] = {"newline_token_ids": [3]} if name == "span" else {}
    gate = {"class_path": f"opdlab.tau.{type(tau).__name__}", "init_args": vars(tau)}
    GateTester(lambda: build_gate(name, tau=tau, **options), init_args={"tau": gate, **options}).run()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_follows_the_schedule_and_logs_it(make_run: MakeRun, accumulate: int) -> None:
    run = make_run(tau=LinearTau(0.0, 4.0, num_steps=4), accumulate=accumulate)
    run.fit(6)
    assert [run.recorder.steps[step]["gate/tau"] for step in range(1, 7)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    adaptive = make_run(tau=EffectiveSampleSizeTau(0.9), accumulate=accumulate, refresh=100)
    adaptive.fit(4)
    for step in (2, 3, 4):  # drifted
        assert adaptive.recorder.steps[step]["gate/effective_sample_size"] == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearTau(start=-1.0), "start is -1.0"),
        (lambda: LinearTau(end=1e31), "end is 1e\\+31"),
        (lambda: LinearTau(num_steps=0), "num_steps is 0"),
        (lambda: EffectiveSampleSizeTau(target=1.0), "target is 1.0"),
        (lambda: EffectiveSampleSizeTau(target=0.0), "target is 0.0"),
        (lambda: EffectiveSampleSizeTau(max_tau=0.0), "max_tau is 0.0"),
        (lambda: EffectiveSampleSizeTau(max_tau=1e12), "max_tau is 1000000000000.0, but must be at most 1e\\+06"),
    ],
)
def test_wrong_schedules_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_schedules_come_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "{class_path: LinearTau, init_args: {end: 5, num_steps: 40}}"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "quickstart", f"--model.gate.tau={schedule}", "--print_config"])
    assert stop.value.code == 0
    assert "class_path: opdlab.tau.LinearTau" in capsys.readouterr().out
