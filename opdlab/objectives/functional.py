"""Position losses as pure functions of tensors.

Shapes: B rollouts, T response tokens, K support. Log-probabilities are in nats.
"""

from typing import Literal

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.objectives.divergences import (
    Divergence,
    Estimator,
    Tail,
    full_divergence,
    sampled_token_divergence,
    support_divergence,
)

__all__ = [
    "Divergence",
    "Estimator",
    "Reference",
    "Tail",
    "clip_binds",
    "full_divergence",
    "sampled_token_divergence",
    "sampled_token_loss",
    "support_divergence",
    "teacher_advantage",
    "teacher_topk_loss",
]

Reference = Literal["behavior", "current"]

# exp(20) is 5e8. A larger ratio carries no information, and without a bound one token could overflow the batch. The
# paper's code base applies this bound to the importance weight of its KL term, not to its policy loss.
_MAX_LOG_RATIO = 20.0


def sampled_token_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    reference: Reference = "behavior",
    clip: float | None = 0.2,
    dual_clip: float | None = 3.0,
    advantage_clamp: float | None = None,
) -> Tensor:
    """Return the PPO surrogate loss with the teacher's log-ratio as advantage.

    ``A = logq - logpi_ref`` (detached), ``ratio = exp(logpi - logpi_b)``,
    ``l = -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)``, and ``l <= -c * A`` if ``A < 0``.

    Args:
        logprobs: [B, T] under the student, nats; the only argument that takes a gradient.
        behavior_logprobs: [B, T] under the behavior policy, nats.
        teacher_logprobs: [B, T] under the teacher, nats.
        reference: the policy of ``logpi_ref``: ``behavior`` fixes the advantage for the rollout (the paper's code
            base), ``current`` recomputes it at each step.
        clip: eps; None disables clipping and dual clipping.
        dual_clip: c, above 1, bounds the loss of negative advantages; None disables it.
        advantage_clamp: bound on ``|A|``, nats, or None.

    Returns:
        [B, T].

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> behavior, teacher = torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, -2.0])
        >>> sampled_token_loss(behavior, behavior, teacher)
        tensor([-0.5000,  1.0000])

    Reference:
        Dual clip: Ye et al., arXiv 1912.09729. Advantage: ``verl/trainer/ppo/core_algos.py`` of
        hhh675597/revisiting_opd, the code base of arXiv 2606.24084.
    """
    require(reference in ("behavior", "current"), f"reference is '{reference}', but must be behavior or current")
    require(clip is None or 0 < clip < 1, f"clip is {clip}, but must lie between 0 and 1, or be null for none")
    require(dual_clip is None or dual_clip > 1, f"dual_clip is {dual_clip}, but must be above 1, or be null for none")
    advantage = teacher_advantage(logprobs, behavior_logprobs, teacher_logprobs, reference)
    if advantage_clamp is not None:
        advantage = advantage.clamp(-advantage_clamp, advantage_clamp)
    ratio = (logprobs - behavior_logprobs.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    loss = -ratio * advantage
    if clip is None:
        return loss
    loss = torch.maximum(loss, -ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def teacher_advantage(
    logprobs: Tensor, behavior_logprobs: Tensor, teacher_logprobs: Tensor, reference: Reference
) -> Tensor:
    """Return the advantage ``logq - logpi_ref`` of the sampled tokens, detached.

    Args:
        logprobs: [B, T], nats; of the student.
        behavior_logprobs: [B, T], nats; of the behavior policy.
        teacher_logprobs: [B, T], nats.
        reference: ``logpi_ref`` is the behavior policy's or the current student's.

    Returns:
        [B, T], nats.

    Example:
        >>> teacher_advantage(torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-0.5]), "behavior")
        tensor([1.5000])
    """
    minuend = behavior_logprobs if reference == "behavior" else logprobs
    return (teacher_logprobs - minuend).detach()


def teacher_topk_loss(student_support_logits: Tensor, teacher_support_logits: Tensor) -> Tensor:
    """Return the reverse KL on the teacher's top-K tokens, with both distributions renormalised there (LSM).

    ``p = softmax(student)``, ``q = softmax(teacher)``, ``l = sum_k p_k * (log p_k - log q_k)``.

    Args:
        student_support_logits: [..., K], the student's logits of the support; takes the gradient.
        teacher_support_logits: [..., K], the teacher's logits; detached.

    Returns:
        [...], nats, at least 0 up to rounding.

    Raises:
        UsageError: K is 1, for which the loss is always zero.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> teacher_topk_loss(logits, torch.zeros(2, 2))
        tensor([0.1109, 0.0000])

    Reference:
        Fu et al., arXiv 2603.25562.
    """
    return support_divergence(
        student_support_logits, teacher_support_logits, divergence="reverse_kl", tail="renormalize"
    )


def clip_binds(logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return the positions, [B, T] bool, at which the PPO clip binds and which receive no gradient."""
    ratio = (logprobs.detach() - behavior_logprobs).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantage < 0))
