"""Gates against a plain-Python reference in double precision, written from the definitions and not from the code."""

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.gating import (
    DriftGate,
    GateInputs,
    GateStrategy,
    Normalization,
    NormalizationName,
    RuleGate,
    Statistic,
    build_gate,
    dense_ids,
    gate_names,
    gate_registry,
    register_gate,
    segment_statistic,
)
from opdlab.strategies import (
    Block32Gate,
    Block64Gate,
    Block128Gate,
    BlockGate,
    FilterReweightGate,
    NoGate,
    RatioMaskGate,
    SequenceGate,
    SpanGate,
    TokenGate,
)
from opdlab.tau import LinearTau
from opdlab.testing import GateTester

Row = list[int]
Segmentation = Callable[[Row, Row], Row]  # tokens, valid columns -> a label per valid column

NEWLINES = (0, 4)
STATISTICS = get_args(Statistic)
NORMALIZATIONS = get_args(NormalizationName)


# --- the reference -----------------------------------------------------------------------------------------------


@dataclass
class Reference:
    weights: list[list[float]]
    segment_ids: list[list[int]]
    segment_drift: list[list[float]]


def blocks_of(size: int) -> Segmentation:
    return lambda tokens, valid: [column // size for column in valid]


def spans_of(min_tokens: int, max_tokens: int, fallback_tokens: int) -> Segmentation:
    def segmentation(tokens: Row, valid: Row) -> Row:
        spans: list[Row] = [[]]
        for column in valid:
            spans[-1].append(column)
            if tokens[column] in NEWLINES:
                spans.append([])
        spans = [span for span in spans if span]
        longest = max_tokens if any(tokens[column] in NEWLINES for column in valid) else fallback_tokens
        merged: list[Row] = []
        carried: Row = []
        for span in spans:
            carried = carried + span
            if len(carried) >= min_tokens:
                merged.append(carried)
                carried = []
        if carried and merged:
            merged[-1] = merged[-1] + carried
        elif carried:
            merged.append(carried)
        chunks = [span[i : i + longest] for span in merged for i in range(0, len(span), longest)]
        return [number for number, chunk in enumerate(chunks) for _ in chunk]

    return segmentation


SEGMENTATIONS: dict[type[DriftGate], Segmentation] = {
    NoGate: lambda tokens, valid: [0 for _ in valid],
    SequenceGate: lambda tokens, valid: [0 for _ in valid],
    TokenGate: lambda tokens, valid: list(valid),
    Block32Gate: blocks_of(32),
    Block64Gate: blocks_of(64),
    Block128Gate: blocks_of(128),
}


def reduced(drifts: list[float], statistic: str) -> float:
    if statistic == "signed_mean":
        return abs(math.fsum(drifts) / len(drifts))
    if statistic == "abs_mean":
        return math.fsum(abs(d) for d in drifts) / len(drifts)
    if statistic == "rms":
        return math.sqrt(math.fsum(d * d for d in drifts) / len(drifts))
    return max(abs(d) for d in drifts)


def normalized(gates: dict[tuple[int, int], float], rule: Normalization) -> dict[tuple[int, int], float]:
    def unit(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        mean = math.fsum(values.values()) / max(len(values), 1)
        return {position: value / mean for position, value in values.items()}

    if rule.name == "none":
        return gates
    weights = unit(gates)
    if rule.name == "residual":
        return {position: (1 - rule.rho) + rule.rho * w for position, w in weights.items()}
    if rule.name == "clipped":
        return unit({position: min(max(w, rule.low), rule.high) for position, w in weights.items()})
    return weights


def reference(gate: DriftGate, segmentation: Segmentation, inputs: GateInputs) -> Reference:
    mask, tokens = inputs.mask.tolist(), inputs.tokens.tolist()
    behavior, current = inputs.behavior_logprobs.tolist(), inputs.current_logprobs.tolist()
    assert isinstance(gate.tau, float)
    tau = gate.tau
    num_columns = inputs.mask.shape[1]
    result = Reference(
        weights=[[0.0] * num_columns for _ in mask],
        segment_ids=[[-1] * num_columns for _ in mask],
        segment_drift=[[0.0] * num_columns for _ in mask],
    )
    gates: dict[tuple[int, int], float] = {}
    for i, row in enumerate(mask):
        valid = [t for t in range(num_columns) if row[t]]
        labels = segmentation(tokens[i], valid)
        numbers: dict[int, int] = {}
        for t, label in zip(valid, labels, strict=True):
            members = [u for u, other in zip(valid, labels, strict=True) if other == label]
            drifts = [current[i][u] - behavior[i][u] for u in members]
            result.segment_ids[i][t] = numbers.setdefault(label, len(numbers))
            result.segment_drift[i][t] = math.fsum(drifts) / len(drifts)
            gates[i, t] = 1.0 if isinstance(gate, NoGate) else math.exp(-tau * reduced(drifts, gate.statistic))
    for (i, t), weight in normalized(gates, gate.normalization).items():
        result.weights[i][t] = weight
    return result


def assert_matches(gate: DriftGate, segmentation: Segmentation, inputs: GateInputs, tolerance: float = 1e-6) -> None:
    seen, expected = gate(inputs), reference(gate, segmentation, inputs)
    assert seen.segment_ids.tolist() == expected.segment_ids
    for name in ("weights", "segment_drift"):
        wanted = torch.tensor(getattr(expected, name), dtype=torch.float64)
        torch.testing.assert_close(getattr(seen, name).double(), wanted, rtol=tolerance, atol=tolerance)


# --- generated inputs --------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, prefixes: bool = False) -> GateInputs:
    num_rows, num_columns = draw(st.integers(1, 4)), draw(st.integers(1, 24))

    def matrix(elements: st.SearchStrategy[Any]) -> Any:
        return draw(
            st.lists(
                st.lists(elements, min_size=num_columns, max_size=num_columns), min_size=num_rows, max_size=num_rows
            )
        )

    if prefixes:
        lengths = draw(st.lists(st.integers(0, num_columns), min_size=num_rows, max_size=num_rows))
        mask = [[column < length for column in range(num_columns)] for length in lengths]
    else:
        mask = matrix(st.booleans())
    nats = st.floats(-5, 5, allow_subnormal=False)
    return GateInputs(
        tokens=torch.tensor(matrix(st.integers(0, 9))),
        mask=torch.tensor(mask),
        behavior_logprobs=torch.tensor(matrix(nats), dtype=torch.float64),
        current_logprobs=torch.tensor(matrix(nats), dtype=torch.float64),
    )


@st.composite
def gate_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "tau": draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
        "statistic": draw(st.sampled_from(STATISTICS)),
        "normalization": draw(st.sampled_from(NORMALIZATIONS)),
        "rho": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "low": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "high": draw(st.sampled_from([1.0, 1.5, 3.0])),
    }


@pytest.mark.parametrize("cls", [NoGate, SequenceGate, TokenGate])
@settings(max_examples=50, deadline=None)
@given(inputs=batches(), options=gate_options())
def test_gates_without_options_match_the_reference(
    cls: type[DriftGate], inputs: GateInputs, options: dict[str, Any]
) -> None:
    assert_matches(cls(**options), SEGMENTATIONS[cls], inputs)


@settings(max_examples=120, deadline=None)
@given(inputs=batches(), options=gate_options(), size=st.integers(1, 9))
def test_blocks_match_the_reference(inputs: GateInputs, options: dict[str, Any], size: int) -> None:
    assert_matches(BlockGate(size, **options), blocks_of(size), inputs)


@settings(max_examples=250, deadline=None)
@given(
    inputs=batches(prefixes=True),
    options=gate_options(),
    least=st.integers(1, 6),
    more=st.integers(0, 6),
    fallback=st.integers(1, 9),
)
def test_spans_match_the_reference(
    inputs: GateInputs, options: dict[str, Any], least: int, more: int, fallback: int
) -> None:
    gate = SpanGate(NEWLINES, least, least + more, fallback, **options)
    assert_matches(gate, spans_of(least, least + more, fallback), inputs)


def random_batch(dtype: torch.dtype, num_columns: int, seed: int = 0, prefixes: bool = False) -> GateInputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, num_columns)
    mask = torch.rand(shape, generator=generator) < 0.8
    if prefixes:
        mask = torch.arange(num_columns) < torch.tensor([[num_columns], [num_columns // 2], [1], [0]])
    behavior = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    drift = torch.randn(shape, generator=generator, dtype=torch.float64)
    return GateInputs(
        tokens=torch.randint(40, shape, generator=generator),
        mask=mask,
        behavior_logprobs=behavior.to(dtype),
        current_logprobs=(behavior + drift).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("cls", [*SEGMENTATIONS, SpanGate])
def test_every_combination_matches_the_reference_on_long_responses(
    cls: type[DriftGate], statistic: Statistic, normalization: NormalizationName, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"statistic": statistic, "normalization": normalization, "rho": 0.7}
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5
    if cls is SpanGate:
        gate = SpanGate(NEWLINES, **options)
        inputs = random_batch(dtype, 180, prefixes=True)
        assert_matches(gate, spans_of(8, 128, 64), inputs, tolerance)
    else:
        assert_matches(cls(**options), SEGMENTATIONS[cls], random_batch(dtype, 180), tolerance)


# --- cases by hand -----------------------------------------------------------------------------------------------


def of_drift(drift: list[list[float]], mask: list[list[int]] | None = None) -> GateInputs:
    values = torch.tensor(drift)
    return GateInputs(
        tokens=torch.zeros_like(values, dtype=torch.long),
        mask=torch.ones_like(values) if mask is None else torch.tensor(mask),
        behavior_logprobs=torch.zeros_like(values),
        current_logprobs=values,
    )


def test_the_formula_by_hand() -> None:
    # Segment means 1 and -2, four positions in the first and two in the second.
    gates = BlockGate(4)(of_drift([[0.0, 2.0, 1.0, 1.0, -1.0, -3.0]]))
    first, second = math.exp(-1), math.exp(-2)
    mean = (4 * first + 2 * second) / 6
    torch.testing.assert_close(gates.weights, torch.tensor([[first / mean] * 4 + [second / mean] * 2]))
    assert gates.segment_drift.tolist() == [[1.0, 1.0, 1.0, 1.0, -2.0, -2.0]]
    assert gates.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1]]


def test_the_mean_is_over_the_whole_batch() -> None:
    gates = TokenGate()(of_drift([[1.0, 9.0], [3.0, 2.0]], mask=[[1, 0], [1, 1]]))
    expected = torch.tensor([[-1.0, -torch.inf], [-3.0, -2.0]]).exp()
    torch.testing.assert_close(gates.weights, expected / (expected.sum() / 3))


def test_the_statistics_by_hand() -> None:
    inputs = of_drift([[3.0, -1.0]])
    seen = {}
    for statistic in STATISTICS:
        weights = SequenceGate(statistic=statistic, normalization="none")(inputs).weights
        seen[statistic] = -weights[0, 0].log().item()
    assert seen == pytest.approx({"signed_mean": 1.0, "abs_mean": 2.0, "rms": math.sqrt(5), "max": 3.0}, rel=1e-5)


def test_none_leaves_the_drift_reported_and_the_weights_alone() -> None:
    gates = build_gate("none")(of_drift([[2.0, 4.0]], mask=[[1, 1]]))
    assert gates.weights.tolist() == [[1.0, 1.0]]
    assert gates.segment_drift.tolist() == [[3.0, 3.0]]


def test_gates_too_small_for_a_float_keep_their_ratio() -> None:
    weights = TokenGate()(of_drift([[500.0, 501.0]])).weights
    assert (weights[0, 0] / weights[0, 1]).item() == pytest.approx(math.e, rel=1e-5)
    assert weights.mean().item() == pytest.approx(1.0)


def test_the_mean_of_many_weights_is_exact() -> None:
    inputs = random_batch(torch.float32, 200_000)
    weights = TokenGate()(inputs).weights
    assert weights.double().sum().item() == pytest.approx(int(inputs.mask.sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("gate", [NoGate(), TokenGate(), SequenceGate(), BlockGate(), SpanGate([1])])
def test_a_batch_without_positions(gate: GateStrategy, shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    gates = gate(GateInputs(zeros.long(), zeros, zeros, zeros))
    assert gates.weights.shape == gates.segment_ids.shape == gates.segment_drift.shape == shape


def test_rms_of_huge_and_tiny_drifts_neither_overflows_nor_vanishes() -> None:
    drift = torch.tensor([[1e30, 1e30, 1e-30, 1e-30]])
    ids, mask = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(segment_statistic(drift, ids, mask, "rms"), drift, rtol=1e-6, atol=0)


def test_drift_is_detached_wide_and_blank_behind_the_mask() -> None:
    current = torch.tensor([[1.0, torch.nan]], dtype=torch.float16, requires_grad=True)
    inputs = GateInputs(torch.zeros(1, 2).long(), torch.tensor([[1, 0]]), torch.zeros(1, 2).half(), current)
    assert inputs.drift.tolist() == [[1.0, 0.0]]
    assert inputs.drift.dtype == torch.float32
    assert not inputs.drift.requires_grad


def test_dense_ids_take_any_labels() -> None:
    largest, smallest = torch.iinfo(torch.long).max, torch.iinfo(torch.long).min
    labels = torch.tensor([[largest, 5, smallest, 5], [0, 1, 2, 3], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert dense_ids(labels, mask).tolist() == [[2, 1, 0, 1], [-1, 0, -1, 1], [-1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("gate", "uniform"),
    [
        (NoGate(), True),
        (NoGate(normalization="none"), True),
        (TokenGate(tau=0), True),
        (TokenGate(), False),
        (TokenGate(tau=LinearTau(0.0, 0.0)), False),
        (RatioMaskGate(), False),
    ],
)
def test_uniform_is_said_of_gates_that_never_weigh(gate: GateStrategy, uniform: bool) -> None:
    assert gate.uniform is uniform


SCHEDULE = "LinearTau(start=0.0, end=2.0, num_steps=100)"


@pytest.mark.parametrize(
    ("gate", "shown"),
    [
        (BlockGate(8, tau=2.0), "BlockGate(tau=2.0, statistic='signed_mean', normalization='mean', block_size=8)"),
        (
            TokenGate(normalization="residual", rho=0.1, low=0.3),
            "TokenGate(tau=1.0, statistic='signed_mean', normalization='residual', rho=0.1)",
        ),
        (
            TokenGate(LinearTau(end=2.0), "rms", normalization="clipped", high=3.0),
            f"TokenGate(tau={SCHEDULE}, statistic='rms', normalization='clipped', low=0.5, high=3.0)",
        ),
        (RatioMaskGate(), "RatioMaskGate(normalization='none', min_ratio=0.5, max_ratio=5.0)"),
        (FilterReweightGate(), "FilterReweightGate(normalization='mean', dropped=0.2, alpha=1.0, beta=1.0)"),
        (NoGate(tau=3.0, statistic="max", normalization="clipped", low=0.1), "NoGate()"),
    ],
)
def test_repr_shows_the_options_that_act(gate: GateStrategy, shown: str) -> None:
    assert repr(gate) == shown


@pytest.mark.parametrize("name", ["token", "block", "ratio_mask", "none"])
@pytest.mark.parametrize("rule", [Normalization("residual", rho=0.3), Normalization("clipped", low=0.6, high=1.5)])
def test_a_normalization_may_be_an_object(name: str, rule: Normalization) -> None:
    inputs = random_batch(torch.float32, 100)
    named = build_gate(name, normalization=rule.name, rho=rule.rho, low=rule.low, high=rule.high)
    given = build_gate(name, normalization=rule)
    assert torch.equal(given(inputs).weights, named(inputs).weights)
    assert repr(given) == repr(named)
    assert pickle.loads(pickle.dumps(given)).normalization == rule


def test_block_is_registered_beside_its_presets() -> None:
    inputs = random_batch(torch.float32, 100)
    assert torch.equal(build_gate("block", block_size=32)(inputs).weights, build_gate("block32")(inputs).weights)
    assert build_gate("block", block_size=7)(inputs).segment_ids.max() == 99 // 7


def test_the_teacher_gap_is_the_teacher_less_the_student() -> None:
    current = torch.tensor([[1.0, torch.nan]], dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0]], dtype=torch.float32, requires_grad=True)
    inputs = GateInputs(torch.zeros(1, 2).long(), torch.tensor([[1, 0]]), torch.zeros(1, 2), current, teacher)
    gap = inputs.teacher_gap
    assert gap is not None
    assert gap.tolist() == [[2.0, 0.0]]
    assert gap.dtype == torch.float32
    assert not gap.requires_grad
    assert replace(inputs, teacher_logprobs=None).teacher_gap is None


# --- errors of users ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("token", {"tau": -1.0}, r"tau is -1\.0"),
        ("token", {"tau": math.nan}, r"tau is nan"),
        ("token", {"tau": math.inf}, r"tau is inf"),
        ("token", {"rho": -0.1}, r"rho is -0\.1"),
        ("token", {"rho": 1.1}, r"rho is 1\.1"),
        ("token", {"rho": math.nan}, r"rho is nan"),
        ("token", {"low": -0.1}, r"low is -0\.1"),
        ("token", {"low": 1.2}, r"low is 1\.2"),
        ("token", {"high": 0.9}, r"high is 0\.9"),
        ("token", {"statistic": "absmean"}, r"statistic is 'absmean'.*did you mean 'abs_mean'\?"),
        ("token", {"normalization": "clip"}, r"normalization is 'clip'.*did you mean 'clipped'\?"),
        ("token", {"statistic": None}, r"statistic is 'None'"),
        ("span", {"min_tokens": 0}, r"min_tokens is 0"),
        ("span", {"max_tokens": 7}, r"max_tokens is 7.*min_tokens, which is 8"),
        ("span", {"fallback_tokens": 0}, r"fallback_tokens is 0"),
        ("blok64", {}, r"unknown gate 'blok64'; did you mean 'block64'\?.*span"),
        ("zzzzzz", {}, r"unknown gate 'zzzzzz'; registered: .*block64.*span"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_gate(name, **options)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("mask", (2, 1)),
        ("behavior_logprobs", (5,)),
        ("current_logprobs", (2, 1)),
        ("teacher_logprobs", (1, 5)),
        ("position_losses", (2, 5, 1)),
        ("correct", (2, 1)),
    ],
)
@pytest.mark.parametrize("gate", [TokenGate(), RatioMaskGate(), NoGate()])
def test_inputs_of_other_shapes_are_refused(gate: GateStrategy, field: str, shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(2, 5)
    changed: dict[str, Any] = {field: torch.zeros(shape)}
    inputs = replace(GateInputs(zeros.long(), zeros + 1, zeros, zeros), **changed)
    words = f"{type(gate).__name__} got {field} of shape {list(shape)} for tokens of shape [2, 5]"
    with pytest.raises(UsageError, match=re.escape(words)):
        gate(inputs)


def test_inputs_that_are_no_matrix_are_refused() -> None:
    zeros = torch.zeros(5)
    with pytest.raises(UsageError, match=r"shape \[5\]: both must be \[rollouts, response tokens\]"):
        TokenGate()(GateInputs(zeros.long(), zeros, zeros, zeros))


@pytest.mark.parametrize("size", [0, -3])
def test_bad_block_sizes_are_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"block_size is {size}"):
        BlockGate(size)


def test_the_bounds_of_the_options_are_allowed() -> None:
    TokenGate(tau=0, rho=0, low=1, high=1)
    TokenGate(tau=0, rho=1, low=0, high=1e9)
    BlockGate(1)
    SpanGate([1], min_tokens=1, max_tokens=1, fallback_tokens=1)


# --- third-party gates -------------------------------------------------------------------------------------------


class ParityGate(DriftGate):
    """Only segments: even and odd columns."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        return (torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device) % 2).expand_as(inputs.tokens)


class HugeLabelGate(DriftGate):
    """Labels without order or bound: a hash of the token."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        return (inputs.tokens % 5 - 2) * 0x123456789ABCDEF


class CauchyGate(RuleGate):
    """Only another rule."""

    own_normalization = "mean"

    def weight(self, inputs: GateInputs) -> Tensor:
        return 1 / (1 + inputs.drift.square())


class TeacherGate(RuleGate):
    """A rule that looks at more than drift, and at whole rows: it relies on zeros behind the mask."""

    needs = ("teacher_logprobs",)

    def weight(self, inputs: GateInputs) -> Tensor:
        assert inputs.teacher_logprobs is not None
        total = inputs.teacher_logprobs.float().sum(1, keepdim=True)
        return (total / inputs.mask.sum(1, keepdim=True).clamp(min=1)).exp().expand(inputs.mask.shape)


class NestedGate(CauchyGate):
    """Overrides nothing itself."""


class LeastDriftGate(GateStrategy):
    """Neither base: the raw weight of a pair of tokens, in logarithms, from its smallest drift."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        return (torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device) // 2).expand_as(inputs.tokens)

    def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
        return segment_statistic(inputs.drift, segments, inputs.mask, "max") * -2.0


GateOfOptions = Callable[..., GateStrategy]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("cls", [ParityGate, HugeLabelGate, CauchyGate, TeacherGate, NestedGate, LeastDriftGate])
def test_strangers_gates_obey_the_laws(cls: GateOfOptions, normalization: NormalizationName) -> None:
    tester = GateTester(lambda: cls(normalization=normalization), zero_drift_is_uniform=cls is not TeacherGate)
    tester.run()
    assert "yaml_round_trip" in dict(tester.laws())


def test_a_strangers_labels_are_numbered_per_row() -> None:
    tokens = torch.tensor([[1, 0, 1, 3], [4, 4, 4, 4]])
    zeros = torch.zeros(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    gates = HugeLabelGate()(GateInputs(tokens, mask, zeros, zeros))
    assert gates.segment_ids.tolist() == [[1, 0, 1, -1], [0, 0, 0, 0]]


def test_a_strangers_rule_is_normalised_and_its_positions_are_segments() -> None:
    gates = CauchyGate()(of_drift([[0.0, 1.0, 2.0, 7.0]], mask=[[1, 1, 1, 0]]))
    gate = torch.tensor([[1.0, 0.5, 0.2, 0.0]])
    torch.testing.assert_close(gates.weights, gate / (1.7 / 3))
    assert gates.segment_ids.tolist() == [[0, 1, 2, -1]]


def test_a_strangers_rule_that_is_zero_everywhere_weighs_evenly() -> None:
    class ZeroGate(RuleGate):
        def weight(self, inputs: GateInputs) -> Tensor:
            return torch.zeros_like(inputs.drift)

    assert ZeroGate("mean")(of_drift([[1.0, 2.0]])).weights.tolist() == [[1.0, 1.0]]
    assert ZeroGate()(of_drift([[1.0, 2.0]])).weights.tolist() == [[0.0, 0.0]]


def test_a_strangers_rule_may_build_on_the_usual_one() -> None:
    class HardGate(TokenGate):
        def log_weight(self, inputs: GateInputs, segments: Tensor) -> Tensor:
            return (super().log_weight(inputs, segments).exp() > 0.5).float().log()

    for tau in (1.0, LinearTau(1.0, 1.0)):
        weights = HardGate(tau=tau)(of_drift([[0.1, 5.0, 0.2, 0.3]])).weights
        torch.testing.assert_close(weights, torch.tensor([[4 / 3, 0, 4 / 3, 4 / 3]]))


def test_a_strangers_parameter_gets_no_gradient() -> None:
    class LearnedGate(RuleGate):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.tensor(2.0, requires_grad=True)

        def weight(self, inputs: GateInputs) -> Tensor:
            return (-self.slope * inputs.drift.abs()).exp()

    assert not LearnedGate()(of_drift([[1.0, 2.0]])).weights.requires_grad


@pytest.mark.parametrize(
    ("base", "method"), [(GateStrategy, "log_weight"), (DriftGate, "segment_ids"), (RuleGate, "weight")]
)
def test_a_gate_without_the_method_of_its_base_cannot_be_built(base: type[GateStrategy], method: str) -> None:
    with pytest.raises(TypeError, match=rf"EmptyGate.*{method}"):
        type("EmptyGate", (base,), {})()


def test_segments_alone_are_told_to_extend_drift_gate() -> None:
    with pytest.raises(UsageError, match=r"OldGate extends GateStrategy and defines segment_ids: .*DriftGate"):

        class OldGate(GateStrategy):
            def segment_ids(self, inputs: GateInputs) -> Tensor:
                return torch.zeros_like(inputs.tokens)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("rule", "ColumnGate returned weights of shape [2, 1] for tokens of shape [2, 3]"),
        ("segments", "RowGate returned segment_ids of shape [3] for tokens of shape [2, 3]"),
        ("floats", "FloatGate returned segment_ids of torch.float32, but must return integers"),
    ],
)
def test_results_of_another_shape_are_refused(gate: str, words: str) -> None:
    class ColumnGate(RuleGate):
        def weight(self, inputs: GateInputs) -> Tensor:
            return torch.ones(len(inputs.tokens), 1)

    class RowGate(DriftGate):
        def segment_ids(self, inputs: GateInputs) -> Tensor:
            return torch.arange(inputs.tokens.shape[1])

    class FloatGate(DriftGate):
        def segment_ids(self, inputs: GateInputs) -> Tensor:
            return inputs.drift

    made: GateStrategy = {"rule": ColumnGate, "segments": RowGate, "floats": FloatGate}[gate]()
    with pytest.raises(UsageError, match=re.escape(words)):
        made(of_drift([[1.0, 2.0, 3.0]] * 2))


def test_a_registered_gate_is_built_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_names()  # the built-in gates register now, and stay
    # The registry belongs to the process, and no class can be taken out of it: a copy, for this test alone.
    monkeypatch.setattr(gate_registry(), "_classes", dict(gate_registry()._classes))
    assert register_gate("parity")(ParityGate) is ParityGate
    gate = build_gate("parity", tau=3.0)
    assert isinstance(gate, ParityGate)
    assert gate.tau == 3.0
    assert "parity" in gate_names()
    assert {"none", "token", "sequence", "block32", "block64", "block128", "span"} <= set(gate_names())
