"""The sampled token's losses, and the reward, against those of other packages: values and gradients."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conformance.batch import FRESH, STALE, Case, run
from tests.conformance.others import against


class Settings(SimpleNamespace):
    """Attributes that can be read with a default, as verl reads its settings."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


@pytest.mark.parametrize("reference", ["behavior", "current"])
@pytest.mark.parametrize("dual_clip", [3.0, 1.5])
@against("verl.trainer.ppo.core_algos:compute_policy_loss_vanilla")
def test_clip_and_dual_clip(other: Any, reference: str, dual_clip: float) -> None:
    case = run("sampled_token", reference=reference, clip=0.1, dual_clip=dual_clip)
    settings = Settings(
        clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=dual_clip, global_batch_info={}
    )
    old, new, mask = (
        case.padded(case.sampled(case.behavior)),
        case.padded(case.sampled(case.student)),
        case.mask.double(),
    )
    advantage = case.padded(case.sampled(case.teacher))
    advantage = (advantage - (old if reference == "behavior" else new)).detach()
    loss, metrics = other(old, new, advantage, mask, config=settings)
    case.agrees(loss, rtol=1e-7, atol=1e-8)  # verl adds 1e-8 to the number of tokens
    shares = metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    assert float(case.output.metrics["clip_share"][case.mask].mean()) == pytest.approx(shares, rel=1e-6)


def grpo(compute_loss: Any, case: Case, beta: float, advantage: Any, delta: float | None) -> torch.Tensor:
    """The loss of TRL's GRPO trainer, which here gets the batch's log-probabilities instead of a model."""
    per_token = case.padded(case.sampled(case.student))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (per_token, torch.zeros_like(per_token).detach(), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta),
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(reduce=lambda values, reduction: values, gather=lambda values: values),
    )
    rollouts = case.batch.rollouts
    inputs = {
        "prompt_ids": rollouts.prompt_tokens,
        "prompt_mask": rollouts.prompt_mask.long(),
        "completion_ids": rollouts.tokens,
        "completion_mask": rollouts.mask.double(),
        "advantages": advantage,
        "old_per_token_logps": case.padded(case.sampled(case.behavior)),
        "ref_per_token_logps": case.padded(case.sampled(case.teacher)),
    }
    loss: torch.Tensor = compute_loss(trainer, None, inputs)
    return loss


@against("trl.trainer.grpo_trainer:GRPOTrainer._compute_loss")
def test_k3_as_grpo_estimates_it(other: Any) -> None:
    case = run("sampled_token", estimator="k3")
    case.agrees(grpo(other, case, beta=1.0, advantage=torch.zeros(case.mask.shape), delta=None))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@against("trl.trainer.grpo_trainer:GRPOTrainer._compute_loss")
def test_clip_as_grpo_clips(other: Any, dual_clip: float | None) -> None:
    case = run("sampled_token", dual_clip=dual_clip)
    advantage = case.padded(case.sampled(case.teacher) - case.sampled(case.behavior)).detach()
    case.agrees(grpo(other, case, beta=0.0, advantage=advantage, delta=dual_clip))


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
@against("verl.trainer.ppo.core_algos:kl_penalty")
def test_estimators(other: Any, estimator: str) -> None:
    case = run("sampled_token", estimator=estimator)
    theirs = other(case.sampled(case.student), case.sampled(case.teacher), estimator)
    # verl bounds k3 at 10, where its gradient ends: there the values are compared with the bound.
    bounded = (theirs >= 10) if estimator == "k3" else torch.zeros_like(theirs, dtype=torch.bool)
    assert bounded.any() == (estimator == "k3")
    assert (case.losses[bounded] > 10).all()
    inside = case.padded((~bounded).double())
    replace(case, output=replace(case.output, losses=case.output.losses * inside)).agrees(theirs * ~bounded)


@against("liger_kernel.chunked_loss.grpo_loss:k3_loss_fn")
def test_k3(other: Any) -> None:
    case = run("sampled_token", estimator="k3")
    case.agrees(other(case.sampled(case.teacher), case.sampled(case.student)))


@against("trl.experimental.sdpo.loss_utils:compute_sampled_token_self_distillation_loss")
def test_gradients_on_fresh_rollouts(other: Any) -> None:
    for options in ({"estimator": "k2"}, {"reference": "current"}, {"reference": "behavior", "clip": None}):
        case = run("sampled_token", FRESH, **options)
        tokens = case.batch.rollouts.tokens[case.mask]
        case.agrees(other(case.student, case.teacher, tokens, distillation_alpha=1.0), values=False)


@pytest.mark.parametrize("scaled", [False, True])
@against("verl.trainer.ppo.core_algos:compute_grpo_outcome_advantage")
def test_the_groups_reward(other: Any, scaled: bool) -> None:
    with_reward, without = (
        run("sampled_token", STALE, **options)
        for options in ({"reward_weight": 1.0, "reward_scaled": scaled}, {"reward_weight": 0.0})
    )
    ours = with_reward.output.metrics["advantage"] - without.output.metrics["advantage"]
    rewards = torch.zeros(with_reward.mask.shape)
    rewards[:, 0] = STALE.correct.float()
    theirs, _ = other(rewards, with_reward.mask, np.array(STALE.prompt_ids.tolist()), norm_adv_by_std_in_grpo=scaled)
    assert theirs.unique().numel() > 3
    # verl adds 1e-6 to the standard deviation
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)
