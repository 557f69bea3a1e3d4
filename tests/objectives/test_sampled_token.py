"""The options of the sampled-token objective: estimators, shapes, baseline, reward."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.objectives import PositionLosses, SampledTokenOPD
from opdlab.objectives.functional import (
    Estimator,
    Shape,
    clip_binds,
    group_reward,
    policy_gradient_loss,
    sampled_token_divergence,
    teacher_advantage,
)
from opdlab.rollouts.collector import with_groups
from opdlab.types import Rollouts, TeacherRequest
from tests.objectives.batch import random_logits, scored_batch


def drifted(rollouts: Rollouts, scored: Any, drift: tuple[float, ...]) -> Rollouts:
    """The rollouts with behavior log-probabilities from which the student has drifted by so many nats."""
    behavior = scored.statistics().logprobs.detach() - torch.tensor(drift)
    return replace(rollouts, behavior_logprobs=scored.padded(behavior))


def apply(objective: SampledTokenOPD, **changes: Any) -> tuple[PositionLosses, Tensor, Any]:
    """Losses, their gradient at the hidden states, and the batch, with drifts on either side of both clips."""
    scored, rollouts, targets, _, _ = scored_batch()
    rollouts = replace(drifted(rollouts, scored, (0.1, 0.5, -0.5, 2.0, -0.05)), **changes)
    losses = objective.position_losses(scored, rollouts, targets)
    (gradient,) = torch.autograd.grad(losses.losses.sum(), scored.hidden, retain_graph=True)
    return losses, gradient, (scored, rollouts, targets)


def earlier_loss(logprobs: Tensor, behavior: Tensor, teacher: Tensor) -> Tensor:
    """The default objective as it was before it had these options."""
    advantage = (teacher - behavior).detach()
    ratio = (logprobs - behavior.detach()).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
    return torch.where(advantage < 0, torch.minimum(loss, -3.0 * advantage), loss)


def test_the_defaults_have_the_bits_that_they_had() -> None:
    seen, gradient, (scored, rollouts, targets) = apply(SampledTokenOPD())
    logprobs = scored.padded(scored.statistics().logprobs)
    losses = earlier_loss(logprobs, rollouts.behavior_logprobs, targets.logprobs)
    assert torch.equal(seen.losses, losses)
    assert torch.equal(gradient, torch.autograd.grad(losses.sum(), scored.hidden)[0])
    assert torch.equal(seen.metrics["advantage"], targets.logprobs - rollouts.behavior_logprobs)
    assert set(seen.metrics) == {"advantage", "clip_share"}


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["behavior", "current"])
def test_shapes_by_formula(reference: Any) -> None:
    own, behavior, teacher = (-random_logits(50, seed=seed).abs() for seed in range(3))
    x = teacher - (behavior if reference == "behavior" else own)
    expected = {
        "identity": x,
        "clamp": x.clamp(-1.5, 1.5),
        "signed_log": torch.where(x > 0, (1 + x).log(), -(1 - x).log()),
        "power": teacher.exp() ** 0.3 - (behavior if reference == "behavior" else own).exp() ** 0.3,
    }
    assert set(expected) == set(get_args(Shape))
    for shape, value in expected.items():
        seen = teacher_advantage(own, behavior, teacher, reference, shape=shape, clamp=1.5, power=0.3)  # type: ignore[arg-type]
        torch.testing.assert_close(seen, value)


@pytest.mark.parametrize(
    "options",
    [
        {"shape": "clamp", "advantage_clamp": 0.3},
        {"advantage_clamp": 0.3},
        {"shape": "signed_log", "reference": "current"},
        {"shape": "power", "power": 0.5, "dual_clip": None, "reference": "current"},
    ],
)
def test_the_reported_advantage_is_the_one_that_is_used(options: dict[str, Any]) -> None:
    seen, gradient, (scored, rollouts, _) = apply(SampledTokenOPD(**options))
    advantage, logprobs = seen.metrics["advantage"], scored.padded(scored.statistics().logprobs)
    assert not advantage.requires_grad
    clips: dict[str, Any] = {"clip": 0.2, "dual_clip": options.get("dual_clip", 3.0)}
    losses = policy_gradient_loss(logprobs, rollouts.behavior_logprobs, advantage, **clips)
    assert torch.equal(seen.losses, losses)
    assert torch.equal(gradient, torch.autograd.grad(losses.sum(), scored.hidden)[0])
    if "advantage_clamp" in options:
        assert float(advantage.abs().max()) == pytest.approx(0.3)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clip_share_counts_the_positions_without_gradient(dual_clip: float | None) -> None:
    behavior = torch.full((10,), -30.0)
    drift = torch.tensor([-25.0, -1.0, -0.1, 0.0, 0.1, 0.5, 1.05, 1.2, 5.0, 25.0])
    for sign in (1.0, -1.0):
        logprobs = (behavior + drift).requires_grad_()
        advantage = torch.full_like(drift, sign)
        loss = policy_gradient_loss(logprobs, behavior, advantage, dual_clip=dual_clip)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert torch.equal(clip_binds(logprobs, behavior, advantage, 0.2, dual_clip), gradient == 0)
    assert not clip_binds(behavior + drift, behavior, torch.zeros_like(drift), 0.2, dual_clip).any()
    seen, _, (_, rollouts, _) = apply(SampledTokenOPD(dual_clip=dual_clip))
    logprobs = seen.logprobs.clone().requires_grad_()
    advantage = seen.metrics["advantage"]
    loss = policy_gradient_loss(logprobs, rollouts.behavior_logprobs, advantage, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(seen.metrics["clip_share"].bool(), (gradient == 0) & (advantage != 0))


# -- direct estimators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_direct_estimators_have_no_ratio(estimator: Any) -> None:
    objective = SampledTokenOPD(estimator=estimator)
    seen, gradient, (scored, _, targets) = apply(objective)
    logprobs = scored.padded(scored.statistics().logprobs)
    losses = sampled_token_divergence(logprobs, targets.logprobs, estimator=estimator)
    assert torch.equal(seen.losses, losses)
    assert torch.equal(gradient, torch.autograd.grad(losses.sum(), scored.hidden)[0])
    assert not seen.losses[~scored.mask].any()
    assert seen.metrics == {}
    assert objective.request == TeacherRequest()


# -- baseline ----------------------------------------------------------------------------------------------------------


def with_tail(k: int) -> tuple[Any, Rollouts, Any, Tensor, Tensor]:
    scored, rollouts, targets, student, teacher = scored_batch()
    top = teacher.topk(k)
    outside = teacher.scatter(-1, top.indices, -torch.inf)
    targets = replace(
        targets,
        support_ids=scored.padded(top.indices.int()),
        support_logits=scored.padded(top.values),
        log_normalizer=scored.padded(teacher.logsumexp(-1)),
        log_tail=scored.padded(outside.logsumexp(-1)),
    )
    return scored, rollouts, targets, student.detach().double(), teacher.double()


@pytest.mark.parametrize("k", [1, 4, 39])
def test_support_kl_is_the_reverse_kl_with_a_bucket(k: int) -> None:
    scored, rollouts, targets, student, teacher = with_tail(k)
    objective = SampledTokenOPD(baseline="support_kl", k=k)
    assert objective.request == TeacherRequest(top_k=k, tail=True)
    seen = objective.position_losses(scored, rollouts, targets)
    p, q = student.softmax(-1), teacher.softmax(-1)
    ids, valid = teacher.topk(k).indices, rollouts.mask
    a, b = ([x.gather(-1, ids), x.scatter(-1, ids, 0.0).sum(-1, keepdim=True)] for x in (p, q))
    expected = sum((x * (x / y).log()).sum(-1) for x, y in zip(a, b, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(seen.metrics["baseline"][valid].double(), expected, rtol=1e-4, atol=1e-5)
    assert seen.divergence is not None
    assert torch.equal(seen.divergence, seen.metrics["baseline"])
    whole = (p * (p / q).log()).sum(-1)
    assert bool((expected <= whole + 1e-9).all())
    if k == 39:  # all but one token: the mean of the advantage over fresh samples is then 0
        torch.testing.assert_close(expected, whole)
        torch.testing.assert_close((p * ((q / p).log() + expected[:, None])).sum(-1), torch.zeros(5).double())
    plain = SampledTokenOPD().position_losses(scored, rollouts, targets)
    torch.testing.assert_close(
        seen.metrics["advantage"], plain.metrics["advantage"] + seen.metrics["baseline"], rtol=0, atol=0
    )
    assert not seen.losses[~valid].any()


def test_support_kl_is_detached() -> None:
    scored, rollouts, targets, _, _ = with_tail(4)
    seen = SampledTokenOPD(baseline="support_kl", k=4, clip=None).position_losses(scored, rollouts, targets)
    assert not seen.metrics["advantage"].requires_grad
    (gradient,) = torch.autograd.grad(seen.losses.sum(), scored.hidden, retain_graph=True)
    logprobs = scored.padded(scored.support_tail(targets.support_ids).statistics.logprobs)
    loss = policy_gradient_loss(logprobs, rollouts.behavior_logprobs, seen.metrics["advantage"], clip=None)
    assert torch.equal(gradient, torch.autograd.grad(loss.sum(), scored.hidden)[0])


def test_fresh_rollouts_have_no_drift_beside_a_baseline() -> None:
    """The behavior log-probabilities of a fresh buffer come from the pass over the support."""
    scored, rollouts, targets, _, _ = with_tail(4)
    own = scored.own_logprobs(targets)
    assert torch.equal(SampledTokenOPD(baseline="support_kl").position_losses(scored, rollouts, targets).logprobs, own)


# -- the verifier's reward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8])
def test_rewards_are_verdicts_normalised_in_their_group(n: int) -> None:
    for hits in range(n + 1):
        verdicts = torch.tensor([1.0] * hits + [0.0] * (n - hits), dtype=torch.float64)
        group = (verdicts.to(torch.int8), torch.full((n,), hits / n), torch.full((n,), n))
        centred = verdicts - verdicts.mean()
        torch.testing.assert_close(group_reward(*group).double(), centred, rtol=1e-6, atol=1e-7)
        scaled = centred / verdicts.std() if 0 < hits < n else centred  # torch's std divides by n - 1
        torch.testing.assert_close(group_reward(*group, scaled=True).double(), scaled, rtol=1e-6, atol=1e-7)
    alone = group_reward(torch.tensor([1], dtype=torch.int8), torch.ones(1), torch.ones(1).long(), scaled=True)
    assert alone.tolist() == [0.0]


JUDGED: dict[str, Any] = {
    "correct": torch.tensor([1, 0], dtype=torch.int8),
    "group_accuracy": torch.tensor([0.25, 0.25]),
    "group_size": torch.tensor([4, 4]),
}


@pytest.mark.parametrize("scaled", [False, True])
def test_the_reward_is_added_to_the_advantage(scaled: bool) -> None:
    plain, _, (_, rollouts, _) = apply(SampledTokenOPD())
    seen, _, _ = apply(SampledTokenOPD(reward_weight=0.5, reward_scaled=scaled), **JUDGED)
    deviation = math.sqrt(0.25 * 0.75 * 4 / 3) if scaled else 1.0
    reward = 0.5 * torch.tensor([[0.75], [-0.25]]) / deviation * rollouts.mask
    torch.testing.assert_close(seen.metrics["advantage"], plain.metrics["advantage"] + reward)
    share = reward.abs() / (reward.abs() + plain.metrics["advantage"].abs())
    torch.testing.assert_close(seen.metrics["reward_share"][rollouts.mask], share[rollouts.mask])
    assert not seen.losses[~rollouts.mask].any()
    assert not seen.metrics["reward_share"][~rollouts.mask].any()


def test_a_weight_of_zero_is_the_run_without_a_reward() -> None:
    plain, gradient, _ = apply(SampledTokenOPD())
    seen, same, _ = apply(SampledTokenOPD(reward_weight=0.0), **JUDGED)
    assert torch.equal(seen.losses, plain.losses)
    assert torch.equal(same, gradient)
    assert seen.metrics.keys() == plain.metrics.keys()


def test_demonstrations_and_unjudged_rollouts_have_no_reward() -> None:
    plain, _, _ = apply(SampledTokenOPD())
    for changes in (
        {"correct": torch.tensor([-1, -1], dtype=torch.int8)},
        {"demonstration": torch.tensor([True, True])},
    ):
        seen, _, _ = apply(SampledTokenOPD(reward_weight=2.0), **JUDGED | changes)
        assert torch.equal(seen.losses, plain.losses)


def test_groups_leave_out_demonstrations_and_unjudged_rollouts() -> None:
    zeros, mask = torch.zeros(7).long(), torch.ones(7, 1).bool()
    rollouts = Rollouts(*2 * (zeros[:, None], mask), torch.zeros(7, 1), *5 * (zeros,))
    grouped = with_groups(
        replace(
            rollouts,
            prompt_ids=torch.tensor([9, 3, 9, 3, 9, 3, 9]),
            correct=torch.tensor([1, 0, 1, -1, 0, 1, 1], dtype=torch.int8),
            demonstration=torch.tensor([False] * 5 + [True, True]),
        )
    )
    assert grouped.group_accuracy is not None
    assert grouped.group_size is not None
    torch.testing.assert_close(grouped.group_accuracy, torch.tensor([2 / 3, 0, 2 / 3, 0, 2 / 3, 0, 2 / 3]))
    assert grouped.group_size.tolist() == [3, 1, 3, 1, 3, 1, 3]


def test_rollouts_without_verdicts_are_refused() -> None:
    with pytest.raises(UsageError, match="reward_weight is 0.5, but the rollouts have no verdicts"):
        apply(SampledTokenOPD(reward_weight=0.5))


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "k4"}, "estimator is 'k4'; did you mean"),
        ({"shape": "clip"}, "shape is 'clip'; did you mean"),
        ({"baseline": "support"}, "baseline is 'support'; did you mean 'support_kl'?"),
        ({"shape": "clamp"}, "shape is clamp, which needs a bound: give advantage_clamp"),
        ({"shape": "power", "power": 0.0}, "power is 0.0, but must be above 0"),
        ({"shape": "power", "power": math.inf}, "power is inf, but must be above 0 and finite"),
        ({"baseline": "support_kl", "k": 0}, "k is 0, but must be at least 1"),
        ({"reward_weight": -1.0}, "reward_weight is -1.0, but must be at least 0 and finite"),
        ({"reward_weight": math.nan}, "reward_weight is nan, but must be at least 0 and finite"),
        ({"estimator": "k2", "clip": 0.1}, "clip is 0.1, which has no effect with estimator k2: leave it out"),
        ({"estimator": "nll", "reference": "current"}, "reference is current, which has no effect with estimator nll"),
        ({"estimator": "k3", "reward_weight": 1.0}, "reward_weight is 1.0, which has no effect with estimator k3"),
        ({"estimator": "abs", "baseline": "support_kl"}, "baseline is support_kl, which has no effect with estimator"),
        ({"clip": None, "dual_clip": 2.0}, "dual_clip is 2.0, which has no effect with clip null: leave it out"),
        ({"shape": "signed_log", "advantage_clamp": 1.0}, "advantage_clamp is 1.0, which has no effect with"),
        ({"power": 0.5}, "power is 0.5, which has no effect with shape identity: leave it out"),
        ({"k": 8}, "k is 8, which has no effect with baseline none: leave it out"),
        ({"reward_scaled": True}, "reward_scaled is True, which has no effect with reward_weight 0: leave it out"),
    ],
)
def test_options_that_are_wrong_or_idle_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        SampledTokenOPD(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "k2", "clip": 0.2, "dual_clip": 3.0, "reference": "behavior", "k": 32},
        {"clip": None, "dual_clip": 3.0},
        {"clip": None, "dual_clip": None},
        {"baseline": "support_kl", "k": 1, "shape": "power", "power": 2.0},
    ],
)
def test_options_of_a_saved_configuration_are_taken(options: dict[str, Any]) -> None:
    SampledTokenOPD(**options)
