"""Signs of a collapse: sums against plain loops, limits, and no waiting for the device."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opdlab.diagnostics import StepTrace
from opdlab.diagnostics.collapse import (
    BufferSigns,
    CollapseLimits,
    buffer_signs,
    buffer_sums,
    dead,
    entropy_sign,
    entropy_sums,
    step_sums,
)
from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.objectives import TeacherTopK
from opdlab.rollouts import Targets
from tests.diagnostics.synthetic import batch_shares, micro_batch

LIMITS = CollapseLimits()
HEALTHY = BufferSigns(length=100.0, truncated=0.05, repeated=0.2, reverse_kl=0.3)


def traced(targets: Targets | None = None, tau: float = 1.0, **changes: Any) -> StepTrace:
    batch = micro_batch(0)
    objective = TeacherTopK(k=4)
    gates = build_gate("token", tau=tau, normalization="none")(batch.inputs(objective))
    trace = batch.trace(objective, gates, batch_shares([batch], "token_mean")[0])
    entropy = torch.rand(trace.inputs.mask.shape, generator=torch.Generator().manual_seed(1))
    values = {"entropy": entropy.masked_fill(~trace.inputs.mask, torch.nan)}
    return dataclasses.replace(trace, targets=targets or batch.targets, values=values, **changes)


def targets_of(logits: Tensor, tokens: Tensor, k: int, entropy: bool = False) -> Targets:
    """The teacher's targets of full logits, [B, T, V]."""
    full = logits.log_softmax(-1)
    support = logits.topk(k, -1)
    return Targets(
        logprobs=full.gather(-1, tokens[..., None]).squeeze(-1),
        support_ids=support.indices,
        support_logits=support.values,
        support_mass=full.gather(-1, support.indices).exp().sum(-1),
        entropy=torch.special.entr(full.exp()).sum(-1) if entropy else None,
    )


def test_entropies_are_means_over_valid_positions() -> None:
    trace = traced()
    mask, tokens = trace.inputs.mask, trace.rollouts.tokens
    logits = 2 * torch.randn(*mask.shape, 19, generator=torch.Generator().manual_seed(2))
    exact = targets_of(logits, tokens, 19, entropy=True)
    assert exact.entropy is not None
    num, student, teacher = entropy_sums(dataclasses.replace(trace, targets=exact)).tolist()
    assert num == int(mask.sum())
    assert student == pytest.approx(float(trace.values["entropy"][mask].sum()))
    assert teacher == pytest.approx(float(exact.entropy[mask].sum()))
    whole = entropy_sums(dataclasses.replace(trace, targets=targets_of(logits, tokens, 19)))
    assert whole[2].item() == pytest.approx(teacher, rel=1e-5)
    part = entropy_sums(dataclasses.replace(trace, targets=targets_of(logits, tokens, 6)))
    assert 0.5 * teacher < part[2].item() < teacher  # a lower bound


def test_the_teachers_entropy_is_estimated_from_sampled_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width = 64, 200
    student, teacher = (torch.randn(19, generator=generator).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(student.exp(), rows * width, replacement=True, generator=generator).view(rows, width)
    mask = torch.ones(rows, width).bool()
    trace = traced()
    inputs = dataclasses.replace(trace.inputs, mask=mask, behavior_logprobs=student[tokens])
    sampled = Targets(logprobs=teacher[tokens])
    trace = dataclasses.replace(trace, inputs=inputs, targets=sampled, values={"entropy": torch.zeros(rows, width)})
    estimate = entropy_sums(trace)[2].item() / (rows * width)
    assert estimate == pytest.approx(float(torch.special.entr(teacher.exp()).sum()), rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_repeated_ngrams_are_those_of_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, (4, 60), generator=generator)
    mask = torch.rand(4, 60, generator=generator) > 0.02
    mask[3] = False
    repeats = grams = 0
    for row, valid in zip(tokens.tolist(), mask.tolist(), strict=True):
        seen = set()
        for start in range(len(row) - 3):
            if all(valid[start : start + 4]):
                gram = tuple(row[start : start + 4])
                grams, repeats = grams + 1, repeats + (gram in seen)
                seen.add(gram)
    trace = traced()
    rollouts = dataclasses.replace(trace.rollouts, tokens=tokens, mask=mask)
    inputs = dataclasses.replace(
        trace.inputs, mask=mask, behavior_logprobs=torch.zeros(4, 60), teacher_logprobs=torch.full((4, 60), -0.5)
    )
    found = buffer_sums(dataclasses.replace(trace, rollouts=rollouts, inputs=inputs)).tolist()
    num = int(mask.sum())
    assert found == [num, 0.5 * num, repeats, grams]
    assert repeats > 20


def test_demonstrations_are_no_samples_of_the_snapshot() -> None:
    trace = traced()
    tokens, mask = torch.full((2, 5), 7), torch.ones(2, 5, dtype=torch.bool)
    behavior, teacher = (torch.tensor(rows).expand(2, 5) for rows in ([[0.0], [-1.0]], [[-3.0], [-1.5]]))
    inputs = dataclasses.replace(trace.inputs, mask=mask, behavior_logprobs=behavior, teacher_logprobs=teacher)
    given = dataclasses.replace(trace.rollouts, tokens=tokens, mask=mask, demonstration=torch.tensor([True, False]))
    trace = dataclasses.replace(
        trace, rollouts=given, inputs=inputs, targets=Targets(logprobs=teacher), values={"entropy": torch.ones(2, 5)}
    )
    assert buffer_sums(trace).tolist() == [5, 5 * 0.5, 1, 2]
    assert entropy_sums(trace).tolist() == pytest.approx([5, 5, 5 * 1.5 * math.exp(-0.5)])
    all_given = dataclasses.replace(given, demonstration=torch.tensor([True, True]))
    trace = dataclasses.replace(trace, rollouts=all_given)
    assert buffer_sums(trace).tolist() == [0] * 4
    assert entropy_sums(trace).tolist() == [0] * 3


def test_a_step_whose_gap_is_not_known_is_not_dead() -> None:
    trace = traced()
    zeros = torch.zeros_like(trace.inputs.drift)
    unknown = dataclasses.replace(trace.inputs, position_losses=zeros, teacher_logprobs=None, divergence=None)
    assert dead(step_sums(dataclasses.replace(trace, inputs=unknown)), LIMITS).tolist() == [0, 0]


@pytest.mark.parametrize(("tau", "expected"), [(1.0, [0, 0]), (1e9, [1, 1])])
def test_a_step_without_weights_is_dead(tau: float, expected: list[int]) -> None:
    assert dead(step_sums(traced(tau=tau)), LIMITS).tolist() == expected


def test_a_loss_of_zero_is_dead_where_the_models_differ() -> None:
    trace = traced()
    zeros = torch.zeros_like(trace.inputs.drift)
    silent = dataclasses.replace(trace.inputs, position_losses=zeros)
    assert dead(step_sums(dataclasses.replace(trace, inputs=silent)), LIMITS).tolist() == [0, 1]
    equal = dataclasses.replace(silent, teacher_logprobs=trace.inputs.current_logprobs)
    assert dead(step_sums(dataclasses.replace(trace, inputs=equal)), LIMITS).tolist() == [0, 0]
    masked = dataclasses.replace(silent, mask=torch.zeros_like(trace.inputs.mask))
    gates = dataclasses.replace(trace.gates, weights=zeros)
    empty = dataclasses.replace(trace, inputs=masked, gates=gates)
    assert dead(step_sums(empty), LIMITS).tolist() == [0, 0]  # the loss may leave out every token


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        (0.01, 0.5, "0.01 nats, the teacher's 0.5"),
        (0.0, 0.0, "one token has all"),
        (math.log(19), 2.0, "all 19 tokens are equally likely"),
        (0.03, 0.5, None),
        (2.9, 1.0, None),  # ln 19 is 2.944
    ],
)
def test_the_entropy_has_a_lower_and_an_upper_limit(student: float, teacher: float, words: str | None) -> None:
    sign = entropy_sign(student, teacher, 19, LIMITS)
    assert (sign is None) if words is None else (words in str(sign))


@pytest.mark.parametrize(
    ("change", "signs"),
    [
        ({}, set()),
        ({"repeated": 0.59}, set()),
        ({"repeated": 0.61}, {"repeated"}),
        ({"truncated": 1.0}, set()),  # a student that leaks writes to the limit, and repeats nothing
        ({"truncated": 1.0, "repeated": 0.4}, {"truncated"}),
        ({"length": 13.0}, set()),
        ({"length": 12.0}, {"length"}),
        ({"length": 801.0}, {"length"}),
        ({"reverse_kl": 2.2}, set()),
        ({"reverse_kl": 2.4}, {"reverse_kl"}),
        ({"reverse_kl": math.nan}, set()),
    ],
)
def test_a_buffer_is_compared_with_the_first_and_the_best(change: dict[str, float], signs: set[str]) -> None:
    assert set(buffer_signs(dataclasses.replace(HEALTHY, **change), HEALTHY, 0.3, LIMITS)) == signs


def test_repetition_from_the_start_is_no_sign() -> None:
    stuck = dataclasses.replace(HEALTHY, repeated=0.9, truncated=1.0)
    assert buffer_signs(stuck, dataclasses.replace(stuck, repeated=0.7), 0.3, LIMITS) == {}


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="patience is 0, but must be at least 1"):
        CollapseLimits(patience=0)
    with pytest.raises(UsageError, match=r"max_length_factor is 0\.5, but must be at least 1"):
        CollapseLimits(max_length_factor=0.5)
    with pytest.raises(UsageError, match=r"max_repeated is -0\.1, but must be at least 0"):
        CollapseLimits(max_repeated=-0.1)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values, as an accelerator's are at first: whoever reads one gets an error."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # for constants

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: fake(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return {name: fake(each) for name, each in value.items()} if isinstance(value, dict) else value

    trace = fake(traced())
    sampled = dataclasses.replace(trace, targets=Targets(logprobs=trace.targets.logprobs))
    with mode:
        dead(step_sums(trace), LIMITS)
        buffer_sums(trace)
        for each in (trace, sampled):
            entropy_sums(each)
