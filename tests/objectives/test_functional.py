"""The pure functions of the objectives against naive references and closed forms, and the classes that wrap them."""

# mypy: disable-error-code="no-untyped-call"

import itertools
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from opdlab.errors import UsageError
from opdlab.objectives import SampledTokenOPD, TeacherTopK, loss_shares, reduce_losses
from opdlab.objectives.functional import clip_binds, sampled_token_loss, sampler_correction, teacher_topk_loss
from tests.objectives.batch import random_logits, scored_batch

Reference = Literal["behavior", "current"]

# Log-probabilities on either side of every bend: ratios 0.5 to 4, teacher above and below.
GRID = list(itertools.product([-3.0, -1.0, -0.3], [-3.1, -1.7, -1.05, -0.9, -0.2], [-5.0, -2.0, -1.0, -0.25]))
CURRENT, BEHAVIOR, TEACHER = (torch.tensor(column, dtype=torch.float64) for column in zip(*GRID, strict=True))


def naive_loss(
    current: float,
    behavior: float,
    teacher: float,
    reference: Reference,
    clip: float | None,
    dual_clip: float | None,
    clamp: float | None,
) -> float:
    """Ye et al.'s objective for one position, as the paper writes it: a maximised quantity, then its negative."""
    advantage = teacher - (behavior if reference == "behavior" else current)
    if clamp is not None:
        advantage = max(-clamp, min(clamp, advantage))
    ratio = math.exp(current - behavior)
    if clip is None:
        return -ratio * advantage
    clipped = max(1 - clip, min(1 + clip, ratio))
    surrogate = min(ratio * advantage, clipped * advantage)
    if dual_clip is not None and advantage < 0:
        surrogate = max(surrogate, dual_clip * advantage)
    return -surrogate


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize(("clip", "dual_clip"), [(0.2, 3.0), (0.2, None), (0.05, 1.5), (None, 3.0), (None, None)])
@pytest.mark.parametrize("reference", ["behavior", "current"])
def test_sampled_token_loss(
    reference: Reference, clip: float | None, dual_clip: float | None, clamp: float | None
) -> None:
    losses = sampled_token_loss(
        CURRENT, BEHAVIOR, TEACHER, reference=reference, clip=clip, dual_clip=dual_clip, advantage_clamp=clamp
    )
    naive = [naive_loss(*position, reference, clip, dual_clip, clamp) for position in GRID]
    torch.testing.assert_close(losses, torch.tensor(naive, dtype=torch.float64))


def test_grid_reaches_every_branch() -> None:
    ratio, positive = (CURRENT - BEHAVIOR).exp(), TEACHER > BEHAVIOR
    for side in (positive, ~positive):
        assert bool((side & (ratio < 0.8)).any())
        assert bool((side & (ratio > 0.8) & (ratio < 1.2)).any())
        assert bool((side & (ratio > 1.2) & (ratio < 3)).any())
        assert bool((side & (ratio > 3)).any())


def gradient(reference: Reference = "behavior", **options: Any) -> Tensor:
    logprobs = CURRENT.clone().requires_grad_()
    loss = sampled_token_loss(logprobs, BEHAVIOR, TEACHER, reference=reference, **options)
    (result,) = torch.autograd.grad(loss.sum(), logprobs)
    return result


@pytest.mark.parametrize("reference", ["behavior", "current"])
def test_unclipped_gradient_is_minus_ratio_times_advantage(reference: Reference) -> None:
    advantage = TEACHER - (BEHAVIOR if reference == "behavior" else CURRENT)
    torch.testing.assert_close(gradient(reference, clip=None), -(CURRENT - BEHAVIOR).exp() * advantage)


def test_clipped_gradient_vanishes_where_a_clip_binds() -> None:
    ratio, advantage = (CURRENT - BEHAVIOR).exp(), TEACHER - BEHAVIOR
    binds = torch.where(advantage > 0, ratio > 1.2, (ratio < 0.8) | (ratio > 3))
    torch.testing.assert_close(gradient(), torch.where(binds, 0.0, -ratio * advantage))
    for dual_clip in (3.0, None):
        none = gradient(dual_clip=dual_clip).eq(0) & advantage.ne(0)
        assert torch.equal(clip_binds(CURRENT, BEHAVIOR, advantage, 0.2, dual_clip), none)


def test_fresh_rollouts_have_the_full_gradient() -> None:
    # Ratio 1 is inside the clip, where both branches of the surrogate are equal: the gradient must not be halved.
    logprobs = BEHAVIOR.clone().requires_grad_()
    loss = sampled_token_loss(logprobs, BEHAVIOR, TEACHER)
    (result,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(result, BEHAVIOR - TEACHER)


def test_only_the_student_takes_a_gradient() -> None:
    logprobs, behavior, teacher = (tensor.clone().requires_grad_() for tensor in (CURRENT, BEHAVIOR, TEACHER))
    sampled_token_loss(logprobs, behavior, teacher, reference="current").sum().backward()
    assert logprobs.grad is not None
    assert behavior.grad is None
    assert teacher.grad is None
    student = torch.randn(3, 4, requires_grad=True)
    other = torch.randn(3, 4, requires_grad=True)
    teacher_topk_loss(student, other).sum().backward()
    assert student.grad is not None
    assert other.grad is None


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("reference", ["behavior", "current"])
def test_teacher_equal_to_student_costs_nothing(reference: Reference, clip: float | None) -> None:
    logprobs = BEHAVIOR.clone().requires_grad_()
    loss = sampled_token_loss(logprobs, BEHAVIOR, BEHAVIOR, reference=reference, clip=clip)
    (result,) = torch.autograd.grad(loss.sum(), logprobs)
    assert not loss.any()
    assert not result.any()


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("reference", ["behavior", "current"])
@pytest.mark.parametrize("teacher", [-200.0, -1e-6])
@pytest.mark.parametrize(("current", "behavior"), [(-1e-6, -1e4), (-1e4, -1e-6), (-1e4, -1e4)])
def test_extreme_ratios_are_finite(
    current: float, behavior: float, teacher: float, reference: Reference, clip: float | None
) -> None:
    logprobs = torch.tensor([current], requires_grad=True)
    loss = sampled_token_loss(
        logprobs, torch.tensor([behavior]), torch.tensor([teacher]), reference=reference, clip=clip
    )
    loss.sum().backward()
    assert math.isfinite(loss.item())
    assert logprobs.grad is not None
    assert math.isfinite(logprobs.grad.item())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": "teacher"}, ["reference", "'teacher'"]),
        ({"clip": 0.0}, ["clip", "0.0"]),
        ({"clip": 1.0}, ["clip", "1.0"]),
        ({"clip": -0.2}, ["clip", "-0.2"]),
        ({"clip": math.nan}, ["clip", "nan"]),
        ({"dual_clip": 1.0}, ["dual_clip", "1.0"]),
        ({"dual_clip": 0.5}, ["dual_clip", "0.5"]),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: list[str]) -> None:
    for build in (
        lambda: sampled_token_loss(CURRENT, BEHAVIOR, TEACHER, **options),
        lambda: SampledTokenOPD(**options),
    ):
        with pytest.raises(UsageError) as caught:
            build()
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("clamp", [0.0, -1.0])
def test_bad_advantage_clamp_is_refused(clamp: float) -> None:
    with pytest.raises(UsageError, match=f"advantage_clamp is {clamp}"):
        SampledTokenOPD(advantage_clamp=clamp)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(-50, 50))
def test_topk_loss_is_the_kl_of_renormalised_categoricals(seed: int, k: int, shift: float) -> None:
    student, teacher = random_logits(5, k, seed=seed), random_logits(5, k, seed=seed + 1)
    expected = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    # Logits of the same distribution, with any normalisation.
    torch.testing.assert_close(teacher_topk_loss(student + shift, teacher - shift), expected)


def test_topk_gradient() -> None:
    student, teacher = random_logits(4, 6).requires_grad_(), random_logits(4, 6, seed=1)
    loss = teacher_topk_loss(student, teacher)
    (result,) = torch.autograd.grad(loss.sum(), student)
    p, log_ratio = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(result, p * (log_ratio - loss[:, None]))
    assert torch.autograd.gradcheck(teacher_topk_loss, (student, teacher))


def test_topk_loss_of_equal_distributions_is_zero() -> None:
    student = random_logits(4, 6).requires_grad_()
    loss = teacher_topk_loss(student, student.detach() + 2.0)
    (result,) = torch.autograd.grad(loss.sum(), student)
    assert float(loss.detach().abs().amax()) < 1e-12
    assert float(result.abs().amax()) < 1e-12


def test_topk_of_the_whole_vocabulary_is_the_full_reverse_kl() -> None:
    student, teacher = random_logits(7, 38), random_logits(7, 38, seed=1)
    order = teacher.topk(38).indices
    loss = teacher_topk_loss(student.gather(1, order), teacher.gather(1, order))
    torch.testing.assert_close(loss, kl_divergence(Categorical(logits=student), Categorical(logits=teacher)))


@pytest.mark.parametrize("k", [1, 0, -3])
def test_k_below_two_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=f"k is {k}, but must be at least 2"):
        TeacherTopK(k=k)


def test_support_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="k is 1, but must be at least 2"):
        teacher_topk_loss(torch.zeros(3, 1), torch.zeros(3, 1))


def test_what_objectives_ask_of_the_teacher() -> None:
    assert TeacherTopK(k=5).request.top_k == 5
    assert TeacherTopK().request.top_k == 32
    assert SampledTokenOPD().request.top_k == 0


def test_sampled_token_objective() -> None:
    scored, rollouts, targets, student, _ = scored_batch()
    result = SampledTokenOPD(clip=None).position_losses(scored, rollouts, targets)
    logprobs = student.log_softmax(-1)[torch.arange(5), scored.tokens]
    valid = rollouts.mask
    advantage = targets.logprobs[valid] + 1.5
    torch.testing.assert_close(result.losses[valid], -(logprobs + 1.5).exp() * advantage)
    torch.testing.assert_close(result.logprobs[valid], logprobs.detach())
    torch.testing.assert_close(result.entropy[valid], Categorical(logits=student.detach()).entropy())
    torch.testing.assert_close(result.metrics["advantage"][valid], advantage)
    assert not result.losses[~valid].any()
    assert not result.logprobs.requires_grad
    (ours,) = torch.autograd.grad(result.losses.sum(), scored.hidden)
    (plain,) = torch.autograd.grad((-(logprobs + 1.5).exp() * advantage).sum(), scored.hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_teacher_topk_objective() -> None:
    scored, rollouts, targets, student, teacher = scored_batch()
    result = TeacherTopK(k=4).position_losses(scored, rollouts, targets)
    ids, valid = teacher.topk(4).indices, rollouts.mask
    support = student.gather(1, ids)
    expected = kl_divergence(Categorical(logits=support), Categorical(logits=teacher.gather(1, ids)))
    torch.testing.assert_close(result.losses[valid], expected, rtol=1e-4, atol=1e-5)
    assert not result.losses[~valid].any()
    mass = student.detach().softmax(-1).gather(1, ids).sum(-1)
    torch.testing.assert_close(result.metrics["student_support_mass"][valid], mass)
    (ours,) = torch.autograd.grad(result.losses.sum(), scored.hidden)
    (plain,) = torch.autograd.grad(expected.sum(), scored.hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


LENGTHS = torch.tensor([5, 1, 0, 3, 4, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


def reduced(rows: slice, reduction: Literal["token_mean", "sequence_mean"]) -> Tensor:
    losses, weights = random_logits(6, 5), random_logits(6, 5, seed=1).exp()
    losses[~MASK] = torch.nan  # values at padded positions must not matter
    shares = loss_shares(MASK[rows], reduction=reduction, num_tokens=15, num_rollouts=5)
    return reduce_losses(losses[rows], weights[rows], shares)


def test_reductions_against_loops() -> None:
    losses, weights = random_logits(6, 5).tolist(), random_logits(6, 5, seed=1).exp().tolist()
    sums = [sum(weights[i][t] * losses[i][t] for t in range(n)) for i, n in enumerate(LENGTHS.tolist())]
    assert reduced(slice(None), "token_mean").item() == pytest.approx(sum(sums) / 15)
    means = [total / n for total, n in zip(sums, LENGTHS.tolist(), strict=True) if n]
    assert reduced(slice(None), "sequence_mean").item() == pytest.approx(sum(means) / 5)


def test_a_ratio_that_underflows_is_outside() -> None:
    factors, outside = sampler_correction(torch.tensor([[-200.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), "icepop")
    assert (factors.tolist(), outside.tolist()) == ([[0.0, 1.0]], [[True, False]])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_sum_to_the_whole(reduction: Literal["token_mean", "sequence_mean"], size: int) -> None:
    parts = [reduced(slice(start, start + size), reduction) for start in range(0, 6, size)]
    torch.testing.assert_close(torch.stack(parts).sum(), reduced(slice(None), reduction))


def test_unit_losses_reduce_to_one() -> None:
    ones = torch.ones(6, 5)
    for reduction in ("token_mean", "sequence_mean"):
        shares = loss_shares(MASK, reduction=reduction, num_tokens=15, num_rollouts=5)
        assert reduce_losses(ones, ones, shares).item() == pytest.approx(1.0)
