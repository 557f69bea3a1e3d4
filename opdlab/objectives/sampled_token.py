"""Sampled-token on-policy distillation."""

import inspect
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.objectives.base import Objective, PositionLosses, register_objective
from opdlab.objectives.divergences import require_choice
from opdlab.objectives.functional import (
    Estimator,
    Reference,
    Shape,
    clip_binds,
    group_reward,
    policy_gradient_loss,
    sampled_token_divergence,
    support_divergence,
    teacher_advantage,
)
from opdlab.policies.language_model import Scored
from opdlab.scoring import TokenStatistics
from opdlab.types import Rollouts, Targets, TeacherRequest

Baseline = Literal["none", "support_kl"]


@register_objective("sampled_token")
class SampledTokenOPD(Objective):
    """PPO objective on the teacher's log-ratio of the sampled token, or a direct estimate of a divergence.

    With estimator ``policy_gradient``, ``A = shape(logq, logpi_ref) + baseline + reward_weight * R``, and the loss is
    :func:`~opdlab.objectives.functional.policy_gradient_loss`. The other estimators are those of
    :func:`~opdlab.objectives.functional.sampled_token_divergence`; the other options then have no effect, and are
    refused.

    Args:
        reference: ``behavior`` fixes the teacher's advantage for the rollout, ``current`` recomputes it at each step.
        clip: eps of the PPO clip; null disables clipping.
        dual_clip: bound c on the loss of negative advantages; null disables it.
        advantage_clamp: bound of shape ``clamp``, nats; given with shape ``identity``, it selects ``clamp``.
        estimator: ``policy_gradient``, or directly ``k2``, ``k3``, ``abs`` or ``nll``.
        shape: ``identity``, ``clamp``, ``signed_log`` or ``power``; see
            :func:`~opdlab.objectives.functional.teacher_advantage`.
        power: alpha of shape ``power``.
        baseline: ``support_kl`` adds the reverse KL of the current student from the teacher, on the teacher's top K and
            one bucket for all other tokens, detached: it is minus the mean of the log-ratio, so that fewer signs are
            equal by chance.
        k: size of the support of ``support_kl``.
        reward_weight: weight of the verifier's reward, see :func:`~opdlab.objectives.functional.group_reward`; 0 for
            none. It needs a verifier and at least two sampled responses to a prompt, beside demonstrations.
        reward_scaled: divide the reward by its standard deviation among the samples of a prompt.

    Raises:
        UsageError: an option is out of range, or has no effect beside the others.

    Reference:
        Baseline: Oh et al., arXiv 2605.07865, over the whole vocabulary or the student's top K. Here it is the
        teacher's top K, whose logits are at hand, and the bucket keeps the value a lower bound of the reverse KL.
    """

    def __init__(
        self,
        reference: Reference = "behavior",
        clip: float | None = 0.2,
        dual_clip: float | None = 3.0,
        advantage_clamp: float | None = None,
        estimator: Estimator | Literal["policy_gradient"] = "policy_gradient",
        shape: Shape = "identity",
        power: float = 1.0,
        baseline: Baseline = "none",
        k: int = 32,
        reward_weight: float = 0.0,
        reward_scaled: bool = False,
    ) -> None:
        require_choice("estimator", estimator, ("policy_gradient", *get_args(Estimator)))
        require_choice("baseline", baseline, get_args(Baseline))
        require(k >= 1, f"k is {k}, but must be at least 1")
        require(
            0 <= reward_weight < float("inf"), f"reward_weight is {reward_weight}, but must be at least 0 and finite"
        )
        self.reference: Reference = reference
        self.clip, self.dual_clip, self.advantage_clamp = clip, dual_clip, advantage_clamp
        self.estimator, self.power, self.baseline, self.k = estimator, power, baseline, k
        self.shape: Shape = shape
        self.reward_weight, self.reward_scaled = reward_weight, reward_scaled
        empty = torch.zeros(0)
        self._teacher_advantage(empty, empty, empty)  # these two check the other options
        policy_gradient_loss(empty, empty, empty, clip=clip, dual_clip=dual_clip)
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        require(
            self.shape != "clamp" or self.advantage_clamp is not None,
            "shape is clamp, which needs a bound: give advantage_clamp",
        )
        defaults = {p.name: p.default for p in inspect.signature(SampledTokenOPD).parameters.values()}
        for name, cause in self._idle().items():
            # A value that equals the default may come from a saved configuration, which lists all of them.
            value = getattr(self, name)
            harmless = value == defaults[name] or (name == "dual_clip" and value is None)
            require(harmless, f"{name} is {value}, which has no effect with {cause}: leave it out")

    def _idle(self) -> dict[str, str]:
        """Return the options without effect, each with the option that makes it so."""
        if self.estimator != "policy_gradient":
            names = inspect.signature(SampledTokenOPD).parameters.keys() - {"estimator"}
            return dict.fromkeys(names, f"estimator {self.estimator}")
        shape, baseline = f"shape {self.shape}", f"baseline {self.baseline}"
        idle = {
            "dual_clip": "clip null" if self.clip is None else "",
            "advantage_clamp": shape if self.shape in ("signed_log", "power") else "",
            "power": shape if self.shape != "power" else "",
            "k": baseline if self.baseline == "none" else "",
            "reward_scaled": "reward_weight 0" if not self.reward_weight else "",
        }
        return {name: cause for name, cause in idle.items() if cause}

    @property
    def unused_options(self) -> set[str]:
        """Return the options that have no effect; see :attr:`Objective.unused_options`."""
        return set(self._idle())

    @property
    def inapplicable_laws(self) -> dict[str, str]:
        """Return the laws that do not apply; see :attr:`Objective.inapplicable_laws`."""
        laws = ("zero_loss_at_equality", "zero_gradient_at_equality")
        if self.reward_weight:
            return dict.fromkeys(laws, "the verifier's reward is added to the teacher's advantage")
        if self.estimator == "nll":
            return dict.fromkeys(laws, "the likelihood rises further where the student equals the teacher")
        if self.estimator == "abs":
            return {laws[1]: "the absolute value has a kink at equality, where rounding decides the sign"}
        return {}

    @property
    def request(self) -> TeacherRequest:
        """Return the required teacher outputs: the support's logits and tail for ``support_kl``."""
        return TeacherRequest(top_k=self.k, tail=True) if self.baseline == "support_kl" else TeacherRequest()

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the fields of the rollouts that the reward reads."""
        return ("correct", "group_accuracy", "group_size") if self.reward_weight else ()

    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; see :meth:`Objective.position_losses`."""
        baseline, statistics = (
            support_kl(student, targets) if self.baseline == "support_kl" else (None, student.statistics())
        )
        logprobs = student.padded(statistics.logprobs)
        metrics: dict[str, Tensor] = {}
        if self.estimator == "policy_gradient":
            advantage = self._advantage(logprobs, baseline, rollouts, targets, metrics)
            losses = policy_gradient_loss(
                logprobs, rollouts.behavior_logprobs, advantage, clip=self.clip, dual_clip=self.dual_clip
            )
            metrics["advantage"] = advantage
            if self.clip is not None:
                binds = clip_binds(logprobs, rollouts.behavior_logprobs, advantage, self.clip, self.dual_clip)
                metrics["clip_share"] = binds.float()
        else:
            losses = sampled_token_divergence(logprobs, targets.logprobs, estimator=self.estimator)
        entropy = student.padded(statistics.entropy)
        return PositionLosses(losses, logprobs.detach(), entropy, metrics, divergence=baseline)

    def _teacher_advantage(self, logprobs: Tensor, behavior_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        clamps = self.shape == "identity" and self.advantage_clamp is not None
        options: dict[str, Any] = {"shape": "clamp" if clamps else self.shape, "clamp": self.advantage_clamp}
        return teacher_advantage(
            logprobs, behavior_logprobs, teacher_logprobs, self.reference, power=self.power, **options
        )

    def _advantage(
        self,
        logprobs: Tensor,
        baseline: Tensor | None,
        rollouts: Rollouts,
        targets: Targets,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Return the advantage, [B, T], and add the metrics of its parts."""
        advantage = self._teacher_advantage(logprobs, rollouts.behavior_logprobs, targets.logprobs)
        if baseline is not None:
            metrics["baseline"] = baseline
            advantage = advantage + baseline
        if self.reward_weight:
            reward = self.reward_weight * self._reward(rollouts)
            whole = (reward.abs() + advantage.abs()).clamp(min=torch.finfo(reward.dtype).tiny)
            metrics["reward_share"] = reward.abs() / whole
            advantage = advantage + reward
        return advantage

    def _reward(self, rollouts: Rollouts) -> Tensor:
        """Return the reward of each position, [B, T]."""
        correct, accuracy, size = rollouts.correct, rollouts.group_accuracy, rollouts.group_size
        if correct is None or accuracy is None or size is None:
            raise UsageError(
                f"reward_weight is {self.reward_weight}, but the rollouts have no verdicts: give the training problems "
                "a verifier, or set reward_weight to 0"
            )
        if rollouts.demonstration is not None:
            correct = correct.masked_fill(rollouts.demonstration, -1)
        reward = group_reward(correct, accuracy, size, scaled=self.reward_scaled)
        return reward[:, None] * rollouts.mask  # [B] -> [B, T]


def support_kl(student: Scored, targets: Targets) -> tuple[Tensor, TokenStatistics]:
    """Return the student's reverse KL on the teacher's support with one bucket for all other tokens.

    Args:
        student: its scores.
        targets: with a support and its tail.

    Returns:
        The divergence, [B, T] nats, detached; and the statistics of the sampled tokens from the same pass.
    """
    assert targets.support_ids is not None
    assert targets.support_logits is not None
    assert targets.log_normalizer is not None
    assert targets.log_tail is not None
    *_, logits, log_tail, statistics = student.support_tail(targets.support_ids)
    divergence = support_divergence(
        logits.detach(),
        student.picked(targets.support_logits),
        divergence="reverse_kl",
        tail="bucket",
        student_log_normalizer=statistics.log_normalizer.detach(),
        teacher_log_normalizer=student.picked(targets.log_normalizer),
        student_log_tail=log_tail.detach(),
        teacher_log_tail=student.picked(targets.log_tail),
    )
    return student.padded(divergence), statistics
