"""Sampled-token on-policy distillation."""

import torch

from opdlab.errors import require
from opdlab.objectives.base import Objective, PositionLosses, register_objective
from opdlab.objectives.functional import Reference, clip_binds, sampled_token_loss, teacher_advantage
from opdlab.policies.language_model import Scored
from opdlab.types import Rollouts, Targets


@register_objective("sampled_token")
class SampledTokenOPD(Objective):
    """PPO objective on the teacher's log-ratio of the sampled token; see :func:`sampled_token_loss` for the formula.

    Args:
        reference: ``behavior`` fixes the advantage for the rollout, ``current`` recomputes it at each step.
        clip: eps of the PPO clip; null disables clipping.
        dual_clip: bound c on the loss of negative advantages; null disables it.
        advantage_clamp: bound on the advantage, nats, or null.

    Raises:
        UsageError: an option is out of range.
    """

    def __init__(
        self,
        reference: Reference = "behavior",
        clip: float | None = 0.2,
        dual_clip: float | None = 3.0,
        advantage_clamp: float | None = None,
    ) -> None:
        require(
            advantage_clamp is None or advantage_clamp > 0,
            f"advantage_clamp is {advantage_clamp}, but must be above 0, or null for none",
        )
        empty = torch.zeros(0)
        sampled_token_loss(empty, empty, empty, reference=reference, clip=clip, dual_clip=dual_clip)  # checks options
        self.reference: Reference = reference
        self.clip, self.dual_clip, self.advantage_clamp = clip, dual_clip, advantage_clamp

    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; see :meth:`Objective.position_losses`."""
        statistics = student.statistics()
        logprobs = student.padded(statistics.logprobs)
        losses = sampled_token_loss(
            logprobs,
            rollouts.behavior_logprobs,
            targets.logprobs,
            reference=self.reference,
            clip=self.clip,
            dual_clip=self.dual_clip,
            advantage_clamp=self.advantage_clamp,
        )
        advantage = teacher_advantage(logprobs, rollouts.behavior_logprobs, targets.logprobs, self.reference)
        metrics = {"advantage": advantage}
        if self.clip is not None:
            metrics["clip_share"] = clip_binds(logprobs, rollouts.behavior_logprobs, advantage, self.clip).float()
        return PositionLosses(losses, logprobs.detach(), student.padded(statistics.entropy), metrics)
