"""Objectives and control gates against the code that papers publish, which is in no package.

These tests need clones of the repositories: ``OFFICIAL_CODE=FOLDER make test-conformance``.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opdlab.gating import build_gate
from tests.conformance.batch import run
from tests.conformance.gate_formulas import INPUTS
from tests.conformance.others import against

DISTILLM = "jongwooko/distillm@d47e77f:distillm/losses.py"
REVISITING = "hhh675597/revisiting_opd@d10aedb:verl/trainer/ppo"
FIRE = "YuYingLi0/FiRe-OPD@2e23cd6:verl/verl/workers/actor/dp_actor.py"
SINGLE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}  # DistiLLM computes probabilities in float32


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@against(f"{DISTILLM}:skewed_forward_kl", f"{DISTILLM}:skewed_reverse_kl")
def test_skewed_divergences(other: Any, alpha: float) -> None:
    forward = other.__name__ == "skewed_forward_kl"
    case = run("full_divergence", divergence="skew_forward_kl" if forward else "skew_reverse_kl", alpha=alpha)
    labels = {"label": case.batch.rollouts.tokens[case.mask]}
    # The forward one leaves out the teacher's entropy, which has no gradient.
    case.agrees(other(case.student, case.teacher, labels, lam=alpha), values=not forward, **SINGLE)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@against(f"{DISTILLM}:js_distance")
def test_jsd(other: Any, beta: float) -> None:
    case = run("full_divergence", divergence="jsd", beta=beta)
    labels = {"label": case.batch.rollouts.tokens[case.mask]}
    case.agrees(other(case.student, case.teacher, labels, lam=1 - beta), **SINGLE)


@against(f"{REVISITING}/core_algos.py:compute_memory_efficient_kl")
def test_teacher_topk(other: Any) -> None:
    case = run("teacher_topk", k=4)
    ids = case.teacher.topk(4).indices
    sides = [part[None] for z in (case.student, case.teacher) for part in (z.gather(-1, ids), z.logsumexp(-1))]
    losses, beyond, _ = other(*sides, sampled_indices=case.batch.rollouts.tokens[case.mask][None])
    assert not beyond.any()
    case.agrees(losses[0])


@against(f"{REVISITING}/core_algos.py:compute_policy_loss")
def test_sampled_token(other: Any) -> None:
    case = run("sampled_token")
    old, new = case.padded(case.sampled(case.behavior)), case.padded(case.sampled(case.student))
    advantage = case.padded(case.sampled(case.teacher)) - old  # as compute_opd_advantage subtracts them
    loss, *_ = other(old, new, advantage, case.mask.double(), cliprange=0.2, clip_ratio_c=3.0)
    case.agrees(loss, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("share", [0.2, 0.5])
@against(f"{REVISITING}/ray_trainer_multitask.py:_compute_entropy_top_mask")
def test_entropy_top(other: Any, share: float) -> None:
    inputs = INPUTS.map(lambda values: values[:-1])  # without the empty row
    theirs = other(inputs.entropy, inputs.mask.long(), share)
    seen = build_gate("entropy_top", share=share, normalization="none")(inputs).weights
    assert torch.equal(seen, theirs)


def fire_opd(function: Any, **log_probs: torch.Tensor) -> Any:
    """The loss of FiRe-OPD's actor, called without a model."""
    settings = SimpleNamespace(traj_skip_percentile=20.0, entropy_alpha=0.5, entropy_beta=2.0)
    actor = SimpleNamespace(config=SimpleNamespace(policy_loss=settings, clip_ratio=0.2))
    inputs = INPUTS.map(lambda values: values[:-1])  # without the empty row
    entropies = {"student_entropys": inputs.entropy, "ref_entropys": inputs.teacher_entropy}
    return function(
        actor,
        **log_probs,
        response_mask=inputs.mask.double(),
        loss_agg_mode="token-mean",
        **entropies,
    )


@against(f"{FIRE}:_compute_entropy_aware_loss")
def test_fire_opd(other: Any) -> None:
    inputs = INPUTS.map(lambda values: values[:-1])
    old = inputs.current_logprobs
    assert inputs.teacher_logprobs is not None
    new = old.clone().requires_grad_()
    # On fresh rollouts with an advantage of 1 the gradient is minus the weight's share of the kept tokens.
    loss, _ = fire_opd(other, old_log_prob=old, log_prob=new, ref_log_prob=inputs.teacher_logprobs)
    (gradient,) = torch.autograd.grad(loss, new)
    theirs = -gradient / (inputs.teacher_logprobs - old)
    seen = build_gate("fire_opd", dropped=0.2, alpha=0.5, beta=2.0)(inputs).weights.double()
    assert torch.equal(seen > 0, theirs.abs() > 1e-9)
    kept = seen > 0
    assert 0 < kept.sum() < inputs.mask.sum()
    # The same weights up to one factor: they make the mean of all tokens 1, opdlab that of the kept ones.
    factors = theirs[kept] / seen[kept]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-5, atol=0)
    plain = build_gate("fire_opd", dropped=0.0, alpha=0.5, beta=2.0, normalization="none")(inputs).weights.double()
    normalised = plain / plain[inputs.mask].mean() / kept.sum()
    torch.testing.assert_close(theirs[kept], normalised[kept], rtol=1e-5, atol=0)
