"""Every built-in gate obeys every law, in every combination of statistic and normalization: a new gate adds one row."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.gating import (
    DriftGate,
    GateInputs,
    Gates,
    GateStrategy,
    NormalizationName,
    RuleGate,
    Statistic,
    gate_names,
    gate_registry,
)
from opdlab.strategies import (
    Block32Gate,
    Block64Gate,
    Block128Gate,
    BlockGate,
    EntropyTopGate,
    FilterReweightGate,
    FreshnessGate,
    HorizonGate,
    NoGate,
    PrefixGate,
    RatioMaskGate,
    RewardGate,
    SequenceGate,
    SequenceRatioMaskGate,
    SignConsistencyGate,
    SpanGate,
    TeachabilityGate,
    TokenGate,
    TokenImportanceGate,
    TruncatedRatioGate,
)
from opdlab.testing import GateTester
from opdlab.toy import chain_tokenizer

GATES: dict[str, Callable[..., GateStrategy]] = {
    "none": NoGate,
    "token": TokenGate,
    "sequence": SequenceGate,
    "block": lambda **options: BlockGate(block_size=7, **options),
    "block32": Block32Gate,
    "block64": Block64Gate,
    "block128": Block128Gate,
    "span": lambda **options: SpanGate(max_tokens=20, **options),
}


@pytest.mark.parametrize("normalization", get_args(NormalizationName))
@pytest.mark.parametrize("statistic", get_args(Statistic))
@pytest.mark.parametrize("name", GATES)
def test_built_in_gate_obeys_the_laws(name: str, statistic: Statistic, normalization: NormalizationName) -> None:
    GateTester(
        lambda: GATES[name](tau=1.5, statistic=statistic, normalization=normalization, rho=0.3, low=0.6, high=1.5),
        tokenizer=chain_tokenizer(),
    ).run()


# Rule gates: whether drift 0 gives weight 1 everywhere, and how to build one.
CONTROLS: dict[str, tuple[bool, Callable[..., GateStrategy]]] = {
    "iw_opd": (False, PrefixGate),
    "fire_opd": (False, FilterReweightGate),
    "ratio_mask": (True, lambda **options: RatioMaskGate(min_ratio=0.7, max_ratio=1.5, **options)),
    "truncated_ratio": (True, lambda **options: TruncatedRatioGate(max_ratio=1.2, **options)),
    "sequence_ratio_mask": (True, SequenceRatioMaskGate),
    "sign_consistency": (False, SignConsistencyGate),
    "entropy_top": (False, EntropyTopGate),
    "tip": (False, TokenImportanceGate),
    "ta_opd": (False, lambda **options: TeachabilityGate(share=0.3, **options)),
    "horizon": (False, lambda **options: HorizonGate(tokens=20, **options)),
    "f_opd": (False, lambda **options: FreshnessGate(threshold=0.1, **options)),
    "rg_opd": (False, RewardGate),
    "rg_opd by block": (False, lambda **options: RewardGate(margin=0.5, block_size=7, **options)),
}


@pytest.mark.parametrize("normalization", [None, *get_args(NormalizationName)])
@pytest.mark.parametrize("name", CONTROLS)
def test_control_obeys_the_laws(name: str, normalization: NormalizationName | None) -> None:
    uniform, make = CONTROLS[name]
    GateTester(
        lambda: make(normalization=normalization, rho=0.3, low=0.6, high=1.5), zero_drift_is_uniform=uniform
    ).run()


@pytest.mark.parametrize("name", GATES)
def test_gate_of_tau_zero_obeys_the_laws(name: str) -> None:
    GateTester(lambda: GATES[name](tau=0.0), tokenizer=chain_tokenizer()).run()


def test_every_registered_gate_has_a_row() -> None:
    built_in = {name for name in gate_names() if gate_registry().get(name).__module__.startswith("opdlab.strategies")}
    assert built_in <= set(GATES) | set(CONTROLS)


# Tests of the tester itself: each law is broken by a gate, and the tester names that law only.

Change = Callable[[GateInputs, Gates], Gates]


class ChangedGate(TokenGate):
    """A token gate whose results (or inputs) are tampered with."""

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self._change = change

    def __call__(self, inputs: GateInputs) -> Gates:
        gates = super().__call__(inputs)
        return self._change(inputs, gates) if self._change is not None else gates


class UniformGate(TokenGate):
    @property
    def uniform(self) -> bool:
        return True


class ExplodingGate(RuleGate):
    def weight(self, inputs: GateInputs) -> Tensor:
        return inputs.drift.abs().exp()


class NumpyGate(RuleGate):
    own_normalization = "mean"

    def weight(self, inputs: GateInputs) -> Tensor:
        return torch.from_numpy(inputs.current_logprobs.numpy()).exp()  # NumPy has no bfloat16


class ForgetfulGate(TokenGate):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tau": 0.1}


class DoublingGate(TokenGate):
    def __init__(self, tau: float = 1.0) -> None:
        super().__init__(tau=2 * tau)


class NamelessGate(TokenGate):
    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__(tau=sharpness)


class WidthGate(DriftGate):
    """Halves of the columns: padding moves them."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        return (2 * torch.arange(inputs.mask.shape[1]) // inputs.mask.shape[1]).expand(inputs.mask.shape)


def weights_times(factor: Callable[[GateInputs], Tensor | float]) -> Callable[[], GateStrategy]:
    return lambda: ChangedGate(lambda inputs, gates: replace(gates, weights=gates.weights * factor(inputs)))


def with_changed(**change: Callable[[Tensor], Tensor]) -> Callable[[], GateStrategy]:
    return lambda: ChangedGate(
        lambda inputs, gates: replace(gates, **{name: fn(getattr(gates, name)) for name, fn in change.items()})
    )


def spoil(inputs: GateInputs, gates: Gates) -> Gates:
    inputs.tokens.add_(1)
    return gates


@pytest.mark.parametrize(
    ("law", "make_gate", "seen"),
    [
        ("unit_mean", weights_times(lambda inputs: 2), "the mean weight is 1.99"),
        ("unit_mean", weights_times(lambda inputs: -1), "the smallest weight is -"),
        ("no_gradient", weights_times(lambda inputs: inputs.current_logprobs), "weights requires grad"),
        ("unit_mean", with_changed(weights=lambda weights: weights.double()), "weights are torch.float64"),
        ("no_gradient", with_changed(segment_ids=lambda ids: ids.int()), "segment_ids are torch.int32"),
        ("masked_positions_are_blank", with_changed(weights=lambda weights: weights + 1), "weights behind the mask"),
        ("masked_positions_are_blank", with_changed(segment_ids=lambda ids: ids.clamp(min=0)), "segment_ids behind"),
        ("masked_positions_are_blank", with_changed(segment_drift=lambda drift: drift - 1), "segment_drift behind"),
        ("garbage_behind_the_mask_has_no_influence", weights_times(lambda inputs: inputs.tokens.sum()), "token 1"),
        ("garbage_behind_the_mask_has_no_influence", weights_times(lambda inputs: inputs.current_logprobs), "nan"),
        ("mask_dtype_has_no_influence", weights_times(lambda inputs: 1 + inputs.mask.dtype.itemsize), "mask as"),
        ("padding_invariance", WidthGate, "more columns of padding"),
        ("row_permutation_equivariance", weights_times(lambda inputs: torch.rand(5, 1)), "weights at row 0"),
        ("zero_drift_gives_ones", weights_times(lambda inputs: inputs.tokens), "weights at drift 0"),
        ("uniform_gates_give_ones", UniformGate, "weights"),
        ("segments_are_numbered_from_zero", with_changed(segment_ids=lambda ids: 2 * ids), r"row 0 are \[0, 2, 4"),
        ("segment_drift_is_the_mean", with_changed(segment_drift=lambda drift: drift.abs()), "segment_drift"),
        ("inputs_are_not_modified", lambda: ChangedGate(spoil), "tokens after the call"),
        ("pickling_round_trip", ForgetfulGate, "after pickling"),
        ("pickling_round_trip", weights_times(lambda inputs: 1), "raised (AttributeError|PicklingError)"),
        ("devices_and_dtypes", NumpyGate, "raised TypeError"),
        ("extreme_inputs", ExplodingGate, "weights holds"),
        ("yaml_round_trip", DoublingGate, "after a round trip"),
        ("yaml_round_trip", NamelessGate, "no attribute holds the argument sharpness"),
    ],
)
def test_a_broken_law_is_noticed(law: str, make_gate: Callable[[], GateStrategy], seen: str) -> None:
    tester = GateTester(make_gate)
    with pytest.raises(AssertionError, match=rf"law '{law}' does not hold for {type(make_gate()).__name__}\(.*{seen}"):
        dict(tester.laws())[law]()
    with pytest.raises(AssertionError, match="does not hold for"):
        tester.run()


def test_laws_that_do_not_apply_are_left_out() -> None:
    class LocalGate(TokenGate):
        pass

    assert "yaml_round_trip" not in dict(GateTester(LocalGate).laws())
    assert "zero_drift_gives_ones" not in dict(GateTester(TokenGate, zero_drift_is_uniform=False).laws())
    assert {"yaml_round_trip", "zero_drift_gives_ones"} <= set(dict(GateTester(TokenGate).laws()))


def test_run_prints_a_line_for_each_law(capsys: pytest.CaptureFixture[str]) -> None:
    tester = GateTester(TokenGate, zero_drift_is_uniform=False)
    tester.run()
    *lines, left_out, last = capsys.readouterr().out.splitlines()
    assert lines == [f"passed    {name}" for name, _ in tester.laws()]
    assert left_out == "left out  zero_drift_gives_ones: zero_drift_is_uniform is False"
    assert last == f"TokenGate: {len(lines)} laws passed, 1 left out"


def test_a_gate_that_needs_a_tokenizer_takes_the_toys() -> None:
    tester = GateTester(lambda: SpanGate(max_tokens=20))
    tester.run()
    given = GateTester(lambda: SpanGate(max_tokens=20), tokenizer=chain_tokenizer())
    assert torch.equal(tester.gate()(tester.inputs()).segment_ids, given.gate()(given.inputs()).segment_ids)


def test_constructor_arguments_may_be_given() -> None:
    GateTester(lambda: NamelessGate(3.0), init_args={"sharpness": 3.0}).run()
    with pytest.raises(AssertionError, match="yaml_round_trip"):
        GateTester(lambda: NamelessGate(3.0), init_args={"sharpness": 2.0}).run()


def test_a_gate_that_needs_arguments_is_built_by_a_function() -> None:
    class WideGate(TokenGate):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

    with pytest.raises(
        UsageError, match=r"make_gate without arguments.*'width'.*give a function, for example GateTest"
    ):
        GateTester(WideGate)  # type: ignore[arg-type]
    GateTester(lambda: WideGate(3), init_args={"width": 3}).unit_mean()
