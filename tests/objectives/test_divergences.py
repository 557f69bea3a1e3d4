"""Divergences on a support and of the sampled token, against plain softmaxes over the whole vocabulary in float64."""

# mypy: disable-error-code="no-untyped-call"

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.objectives import build_objective, objective_names
from opdlab.objectives.functional import (
    Divergence,
    Estimator,
    Tail,
    sampled_token_divergence,
    support_divergence,
    teacher_topk_loss,
)
from tests.conformance.formulas import ALPHA, BETA, kl, restricted
from tests.conformance.formulas import divergence as divergence_of

DIVERGENCES, TAILS = get_args(Divergence), get_args(Tail)
V = 11


def logits(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def ours(student: Tensor, teacher: Tensor, ids: Tensor, divergence: str, tail: str, **options: Any) -> Tensor:
    """`support_divergence` on a support of whole-vocabulary logits, with tails summed outside the support."""
    whole: dict[str, Any] = {}
    if tail != "renormalize":
        outside = torch.ones_like(student, dtype=torch.bool).scatter(-1, ids, False)
        for name, z in (("student", student), ("teacher", teacher)):
            whole[f"{name}_log_normalizer"] = z.logsumexp(-1)
            whole[f"{name}_log_tail"] = z.masked_fill(~outside, -torch.inf).logsumexp(-1)
    settings: dict[str, Any] = {"divergence": divergence, "tail": tail, "beta": BETA, "alpha": ALPHA}
    return support_divergence(student.gather(-1, ids), teacher.gather(-1, ids), **whole | settings | options)


def batch(k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = logits(7, V, seed=seed), logits(7, V, seed=seed + 1)
    return student, teacher, teacher.topk(k).indices


@pytest.mark.parametrize("k", [2, 4, V - 1])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradient_equal_those_of_plain_probabilities(divergence: str, tail: str, k: int) -> None:
    student, teacher, ids = batch(k)
    student.requires_grad_()
    expected = divergence_of(
        divergence, restricted(student.softmax(-1), ids, tail), restricted(teacher.softmax(-1), ids, tail)
    )
    seen = ours(student, teacher, ids, divergence, tail)
    torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(seen.sum(), student)[0],
        torch.autograd.grad(expected.sum(), student)[0],
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_on_the_whole_vocabulary_have_their_closed_form(divergence: str) -> None:
    student, teacher, ids = batch(V)
    student.requires_grad_()
    value = ours(student, teacher, ids, divergence, "renormalize")
    (gradient,) = torch.autograd.grad(value.sum(), student)
    a, b = student.detach().softmax(-1), teacher.softmax(-1)
    if divergence == "reverse_kl":
        expected = a * (a.log() - b.log() - kl(a, b)[:, None])
    elif divergence == "forward_kl":
        expected = a - b
    elif divergence == "jsd":
        m = (1 - BETA) * a + BETA * b
        expected = (1 - BETA) * a * ((a / m).log() - kl(a, m)[:, None])
    else:
        share = 1 - ALPHA
        m = share * b + ALPHA * a if divergence == "skew_reverse_kl" else share * a + ALPHA * b
        slope = (a / m).log() - ALPHA * a / m if divergence == "skew_reverse_kl" else -share * b / m
        expected = a * (slope - (a * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 8.0), st.sampled_from(DIVERGENCES))
def test_bucket_grows_with_the_support_and_never_exceeds_the_whole(seed: int, spread: float, divergence: str) -> None:
    student, teacher = logits(5, V, seed=seed, spread=spread), logits(5, V, seed=seed + 1, spread=spread)
    order = student.argsort(-1)  # any nested supports, not only the teacher's likely tokens
    whole = divergence_of(divergence, student.softmax(-1), teacher.softmax(-1))
    before = torch.zeros(5, dtype=torch.float64)
    for k in range(1, V):
        value = ours(student, teacher, order[:, :k], divergence, "bucket")
        assert bool((value >= before - 1e-12).all()), k
        assert bool((value <= whole + 1e-12).all()), k
        before = value
    torch.testing.assert_close(before, whole, rtol=1e-10, atol=1e-12)  # K = V - 1


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_support_of_the_whole_vocabulary_is_the_whole_divergence(divergence: str, tail: str) -> None:
    student, teacher, ids = batch(V)
    student.requires_grad_()
    value = ours(student, teacher, ids, divergence, tail)  # the tail is empty: its logarithm is -inf
    torch.testing.assert_close(value, divergence_of(divergence, student.softmax(-1), teacher.softmax(-1)))
    assert bool(torch.autograd.grad(value.sum(), student)[0].isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_drop_at_equality(divergence: str) -> None:
    teacher = logits(6, V)
    student, ids = teacher.clone().requires_grad_(), teacher.topk(3).indices
    value = ours(student, teacher, ids, divergence, "drop")
    assert float(value.detach().abs().amax()) < 1e-14
    (gradient,) = torch.autograd.grad(value.sum(), student)
    towards_support = -gradient.gather(-1, ids).sum(-1)  # what descent adds to the support's logits
    if divergence == "jsd":
        assert float(gradient.abs().amax()) < 1e-14
    elif divergence.endswith("reverse_kl"):
        assert bool((towards_support < -1e-4).all())
    else:
        assert bool((towards_support > 1e-4).all())


def test_drop_may_be_negative_except_jsd() -> None:
    student, teacher, ids = batch(3)
    for divergence in DIVERGENCES:
        both = torch.cat([ours(x, y, ids, divergence, "drop") for x, y in ((student, teacher), (teacher, student))])
        assert (float(both.min()) >= -1e-14) == (divergence == "jsd"), divergence


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_sides_give_zero_and_no_gradient(divergence: str, tail: str) -> None:
    teacher = logits(6, V)
    student = teacher.clone().requires_grad_()
    value = ours(student, teacher, teacher.topk(3).indices, divergence, tail)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert float(value.detach().abs().amax()) < 1e-14
    assert float(gradient.abs().amax()) < 1e-14


@pytest.mark.parametrize("given_tails", [True, False])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_union_counts_each_id_once(divergence: str, tail: str, given_tails: bool) -> None:
    student, teacher, _ = batch(2)
    student.requires_grad_()
    ids = torch.tensor([3, 5, 8, 5, 1, 3]).expand(7, 6)
    valid = torch.tensor([True, True, True, False, True, False]).expand(7, 6)
    options: dict[str, Any] = {"valid": valid}
    if tail == "bucket" and not given_tails:
        options |= {"student_log_tail": None, "teacher_log_tail": None}
    union = ours(student, teacher, ids, divergence, tail, **options)
    once = ours(student, teacher, ids[:, [0, 1, 2, 4]], divergence, tail)
    torch.testing.assert_close(union, once)
    gradients = [torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in (union, once)]
    torch.testing.assert_close(*gradients)


def test_tail_from_normalizers_alone_is_floored() -> None:
    # float32: outside the first token the student has 5e-8 and the teacher 0.1
    student = torch.tensor([[0.0, math.log(5e-8)]])
    teacher = torch.tensor([[math.log(0.9), math.log(0.1)]])
    normalizers: dict[str, Any] = {
        "student_log_normalizer": student.logsumexp(-1),
        "teacher_log_normalizer": teacher.logsumexp(-1),
    }
    pair = (student[:, :1].requires_grad_(), teacher[:, :1])
    floored = support_divergence(*pair, divergence="forward_kl", tail="bucket", **normalizers)
    expected = 0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 1e-6)
    assert floored.item() == pytest.approx(expected, rel=1e-5)
    exact = support_divergence(
        *pair,
        divergence="forward_kl",
        tail="bucket",
        student_log_tail=student[:, 1],
        teacher_log_tail=teacher[:, 1],
        **normalizers,
    )
    assert exact.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 5e-8), rel=1e-5)


def test_tail_from_normalizers_alone_agrees_where_there_is_mass() -> None:
    student, teacher, ids = batch(3)
    student.requires_grad_()
    for divergence in DIVERGENCES:
        exact = ours(student, teacher, ids, divergence, "bucket")
        derived = ours(student, teacher, ids, divergence, "bucket", student_log_tail=None, teacher_log_tail=None)
        keep = student.detach().softmax(-1).gather(-1, ids).sum(-1) < 1 - 1e-5
        torch.testing.assert_close(exact[keep], derived[keep])
        slopes = [torch.autograd.grad(v[keep].sum(), student, retain_graph=True)[0] for v in (exact, derived)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_are_finite_and_near_float64(divergence: str, tail: str) -> None:
    student, teacher = logits(8, V, spread=1.0) * 300, logits(8, V, seed=1, spread=1.0) * 300
    ids = torch.cat([teacher.topk(3).indices, student.topk(1).indices], -1)
    valid = (ids[:, :3] != ids[:, 3:]).all(-1, keepdim=True)
    valid = torch.cat([torch.ones(8, 3, dtype=torch.bool), valid], -1)
    exact = ours(student, teacher, ids, divergence, tail, valid=valid)
    single = student.float().requires_grad_()
    value = ours(single, teacher.float(), ids, divergence, tail, valid=valid)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-3)
    assert bool(torch.autograd.grad(value.sum(), single)[0].isfinite().all())


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, ids = batch(3)
    value = ours(student.bfloat16(), teacher.bfloat16(), ids, "reverse_kl", "renormalize")
    assert value.dtype == torch.float32
    rounded = ours(student.bfloat16().double(), teacher.bfloat16().double(), ids, "reverse_kl", "renormalize")
    torch.testing.assert_close(value.double(), rounded, rtol=1e-5, atol=1e-6)


def test_only_the_student_takes_a_gradient_of_a_divergence() -> None:
    student, teacher, ids = batch(3)
    student.requires_grad_()
    teacher.requires_grad_()
    for tail in TAILS:
        ours(student, teacher, ids, "jsd", tail).sum().backward()
    for estimator in get_args(Estimator):
        sampled_token_divergence(student.log_softmax(-1), teacher.log_softmax(-1), estimator=estimator).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_teacher_topk_loss_is_a_named_case() -> None:
    student, teacher, ids = batch(4)
    pair = (student.gather(-1, ids).float(), teacher.gather(-1, ids).float())
    case = support_divergence(*pair, divergence="reverse_kl", tail="renormalize")
    log_p, log_q = pair[0].log_softmax(-1), pair[1].log_softmax(-1)
    assert torch.equal(teacher_topk_loss(*pair), case)
    assert torch.equal(case, (log_p.exp() * (log_p - log_q)).sum(-1))


def test_skew_of_zero_is_the_plain_divergence() -> None:
    student, teacher, ids = batch(4)
    for skewed in ("skew_reverse_kl", "skew_forward_kl"):
        seen = ours(student, teacher, ids, skewed, "bucket", alpha=0.0)
        assert torch.equal(seen, ours(student, teacher, ids, skewed.removeprefix("skew_"), "bucket"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "reverse_lk"}, "divergence is 'reverse_lk'; did you mean 'reverse_kl'?"),
        ({"tail": "buckets"}, "tail is 'buckets'; did you mean 'bucket'?"),
        ({"divergence": "jsd", "beta": 0.0}, "beta is 0.0, where jsd is always 0: use divergence forward_kl"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0, where jsd is always 0: use divergence reverse_kl"),
        ({"divergence": "jsd", "beta": 1.5}, "beta is 1.5, but must lie between 0 and 1"),
        ({"divergence": "jsd", "beta": math.nan}, "beta is nan, but must lie between 0 and 1"),
        ({"divergence": "skew_reverse_kl", "alpha": 1.0}, "alpha is 1.0, but must be at least 0 and below 1"),
        ({"divergence": "skew_forward_kl", "alpha": -0.1}, "alpha is -0.1, but must be at least 0 and below 1"),
        ({"tail": "bucket"}, "tail is bucket, which needs student_log_normalizer: give it"),
        ({"tail": "drop", "student_log_normalizer": torch.zeros(7)}, "which needs teacher_log_normalizer: give it"),
    ],
)
def test_bad_options_of_a_divergence_are_refused(options: dict[str, Any], words: str) -> None:
    student, teacher, ids = batch(3)
    settings: dict[str, Any] = {"divergence": "reverse_kl", "tail": "renormalize"}
    with pytest.raises(UsageError) as caught:
        support_divergence(student.gather(-1, ids), teacher.gather(-1, ids), **settings | options)
    assert words in str(caught.value)


def test_one_token_is_refused_where_it_is_always_zero() -> None:
    student, teacher, ids = batch(1)
    for tail in ("bucket", "drop"):
        assert bool(ours(student, teacher, ids, "reverse_kl", tail).any())
    with pytest.raises(UsageError, match="k is 1, but must be at least 2"):
        ours(student, teacher, ids, "reverse_kl", "renormalize")


# -- the sampled token -------------------------------------------------------------------------------------------------


def estimate(logprobs: Tensor, teacher: Tensor, estimator: Any) -> tuple[Tensor, Tensor]:
    logprobs = logprobs.clone().requires_grad_()
    value = sampled_token_divergence(logprobs, teacher, estimator=estimator)
    return value.detach(), torch.autograd.grad(value.sum(), logprobs)[0]


def test_estimators_by_formula() -> None:
    own, teacher = (-logits(50, seed=seed).abs() for seed in (0, 1))
    r = teacher - own
    expected = {
        "k2": (r**2 / 2, -r),
        "k3": (r.exp() - 1 - r, 1 - r.exp()),
        "abs": (r.abs(), -r.sign()),
        "nll": (-own, -torch.ones_like(own)),
    }
    assert set(expected) == set(get_args(Estimator))
    for estimator, pair in expected.items():
        torch.testing.assert_close(estimate(own, teacher, estimator), pair, rtol=1e-10, atol=1e-12)


def expected_gradient(estimator: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Expected gradient in logits over fresh samples, and the exact gradients of reverse and forward KL."""
    student, teacher = logits(V).requires_grad_(), logits(V, seed=1)
    a, b = student.softmax(-1), teacher.softmax(-1)
    each = sampled_token_divergence(student.log_softmax(-1), teacher.log_softmax(-1), estimator=estimator)
    seen = torch.autograd.grad((a.detach() * each).sum(), student, retain_graph=True)[0]
    reverse = torch.autograd.grad(kl(a, b), student, retain_graph=True)[0]
    return seen, reverse, torch.autograd.grad(kl(b, a), student)[0]


def test_expected_gradients_on_fresh_rollouts() -> None:
    for estimator, which in (("k2", 1), ("k3", 2)):
        gradients = expected_gradient(estimator)
        torch.testing.assert_close(gradients[0], gradients[which], rtol=1e-10, atol=1e-12)
    seen, *exact = expected_gradient("abs")
    assert all(float(torch.cosine_similarity(seen, other, dim=0)) < 0.999 for other in exact)


def test_a_token_that_the_student_all_but_excludes_does_not_overflow() -> None:
    value, gradient = estimate(torch.tensor([-1e4, -50.0, -1e-6]), torch.tensor([-1e-6, -1.0, -1e4]), "k3")
    assert bool(value.isfinite().all())
    assert gradient.tolist() == [0.0, 0.0, 1.0]


def test_k3_is_accurate_near_equality() -> None:
    value, _ = estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + 2**-12]), "k3")
    assert value.item() == pytest.approx(2**-25, rel=1e-2)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(UsageError, match="estimator is 'k4'; did you mean 'k.'"):
        sampled_token_divergence(torch.zeros(1), torch.zeros(1), estimator="k4")  # type: ignore[arg-type]


# -- names -------------------------------------------------------------------------------------------------------------


def test_objectives_are_built_by_name() -> None:
    assert {"sampled_token", "teacher_topk"} <= set(objective_names())
    assert build_objective("teacher_topk", k=5).request.top_k == 5
    with pytest.raises(UsageError, match="unknown objective 'sampled_tokens'; did you mean 'sampled_token'"):
        build_objective("sampled_tokens")
