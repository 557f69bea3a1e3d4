"""Position losses as pure functions of tensors.

Shapes: B rollouts, T response tokens, K support. Log-probabilities are in nats.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.objectives.divergences import (
    MAX_LOG_RATIO,
    Divergence,
    Estimator,
    Tail,
    full_divergence,
    require_choice,
    sampled_token_divergence,
    support_divergence,
)

__all__ = [
    "Correction",
    "Divergence",
    "Estimator",
    "Reference",
    "Shape",
    "Tail",
    "clip_binds",
    "full_divergence",
    "group_reward",
    "policy_gradient_loss",
    "sampled_token_divergence",
    "sampled_token_loss",
    "sampler_correction",
    "support_divergence",
    "teacher_advantage",
    "teacher_topk_loss",
]

Reference = Literal["behavior", "current"]
Shape = Literal["identity", "clamp", "signed_log", "power"]
Correction = Literal["none", "tis", "icepop"]


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

    :func:`policy_gradient_loss` of :func:`teacher_advantage`: ``A = logq - logpi_ref`` (detached),
    ``ratio = exp(logpi - logpi_b)``, ``l = -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)``, and ``l <= -c * A`` if
    ``A < 0``.

    Args:
        logprobs: [B, T] under the student, nats; the only argument that takes a gradient.
        behavior_logprobs: [B, T] under the behavior policy, nats.
        teacher_logprobs: [B, T] under the teacher, nats.
        reference: see :func:`teacher_advantage`.
        clip: see :func:`policy_gradient_loss`.
        dual_clip: see :func:`policy_gradient_loss`.
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
        ``verl/trainer/ppo/core_algos.py`` of hhh675597/revisiting_opd, the code base of arXiv 2606.24084.
    """
    shape: Shape = "identity" if advantage_clamp is None else "clamp"
    advantage = teacher_advantage(
        logprobs, behavior_logprobs, teacher_logprobs, reference, shape=shape, clamp=advantage_clamp
    )
    return policy_gradient_loss(logprobs, behavior_logprobs, advantage, clip=clip, dual_clip=dual_clip)


def teacher_advantage(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    teacher_logprobs: Tensor,
    reference: Reference,
    *,
    shape: Shape = "identity",
    clamp: float | None = None,
    power: float = 1.0,
) -> Tensor:
    """Return the teacher's part of the sampled tokens' advantage, detached.

    With ``x = logq - logpi_ref``: ``identity`` is ``x``, ``clamp`` bounds it, ``signed_log`` is
    ``sign(x) log(1 + |x|)``, and ``power`` is ``q^alpha - pi_ref^alpha``, which lies between -1 and 1.

    Args:
        logprobs: [B, T], nats; of the student.
        behavior_logprobs: [B, T], nats; of the behavior policy.
        teacher_logprobs: [B, T], nats.
        reference: the policy of ``logpi_ref``: ``behavior`` fixes the advantage for the rollout (the paper's code
            base), ``current`` recomputes it at each step.
        shape: see above.
        clamp: bound of shape ``clamp``, above 0, nats; None for none.
        power: alpha of shape ``power``, above 0.

    Returns:
        [B, T]: nats for ``identity`` and ``clamp``.

    Raises:
        UsageError: an option is unknown or out of range.

    Example:
        >>> pair = (torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-0.5]))
        >>> for shape in ("identity", "clamp", "signed_log", "power"):
        ...     print(shape, teacher_advantage(*pair, "behavior", shape=shape, clamp=1.0))
        identity tensor([1.5000])
        clamp tensor([1.])
        signed_log tensor([0.9163])
        power tensor([0.4712])

    Reference:
        Clamp and signed logarithm: Wang et al., arXiv 2607.13399. Power: Zhao et al., arXiv 2606.17199.
    """
    require_choice("reference", reference, get_args(Reference))
    require_choice("shape", shape, get_args(Shape))
    require(clamp is None or clamp > 0, f"advantage_clamp is {clamp}, but must be above 0, or null for none")
    require(
        0 < power < float("inf"),
        f"power is {power}, but must be above 0 and finite; near 0, it is the log-ratio scaled by power",
    )
    minuend = behavior_logprobs if reference == "behavior" else logprobs
    if shape == "power":
        return ((power * teacher_logprobs).exp() - (power * minuend).exp()).detach()
    ratio = (teacher_logprobs - minuend).detach()
    if shape == "signed_log":
        return ratio.sign() * ratio.abs().log1p()
    return ratio.clamp(-clamp, clamp) if shape == "clamp" and clamp is not None else ratio


def policy_gradient_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    *,
    clip: float | None = 0.2,
    dual_clip: float | None = 3.0,
) -> Tensor:
    """Return the PPO surrogate loss of an advantage.

    ``ratio = exp(logpi - logpi_b)``, ``l = -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)``, and ``l <= -c * A`` if
    ``A < 0``.

    Args:
        logprobs: [B, T] under the student, nats; the only argument that takes a gradient.
        behavior_logprobs: [B, T] under the behavior policy, nats.
        advantage: [B, T], detached by the caller.
        clip: eps; None disables clipping and dual clipping.
        dual_clip: c, above 1, bounds the loss of negative advantages; None disables it.

    Returns:
        [B, T].

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> stale = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0])  # ratio e
        >>> policy_gradient_loss(*stale, torch.tensor([1.0, -1.0]))
        tensor([-1.2000,  2.7183])

    Reference:
        Dual clip: Ye et al., arXiv 1912.09729.
    """
    require(clip is None or 0 < clip < 1, f"clip is {clip}, but must lie between 0 and 1, or be null for none")
    require(dual_clip is None or dual_clip > 1, f"dual_clip is {dual_clip}, but must be above 1, or be null for none")
    # The paper's code base applies this bound to the importance weight of its KL term, not to its policy loss.
    ratio = (logprobs - behavior_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = -ratio * advantage
    if clip is None:
        return loss
    loss = torch.maximum(loss, -ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def clip_binds(
    logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, clip: float, dual_clip: float | None = None
) -> Tensor:
    """Return the positions, [B, T] bool, at which :func:`policy_gradient_loss` is constant and gives no gradient.

    Either clip counts, and so does the bound on the ratio; an advantage of 0 does not.

    Example:
        >>> behavior, advantage = torch.full((4,), -5.0), torch.tensor([1.0, 1.0, -1.0, -1.0])
        >>> logprobs = behavior + torch.tensor([0.1, 0.5, 0.5, 2.0])
        >>> clip_binds(logprobs, behavior, advantage, clip=0.2, dual_clip=3.0)
        tensor([False,  True, False,  True])
    """
    log_ratio = logprobs.detach() - behavior_logprobs
    ratio = log_ratio.exp()
    above = log_ratio > MAX_LOG_RATIO if dual_clip is None else ratio > dual_clip
    of_positive = (ratio > 1 + clip) | (log_ratio < -MAX_LOG_RATIO)
    return torch.where(advantage > 0, of_positive, ((ratio < 1 - clip) | above) & (advantage < 0))


def group_reward(correct: Tensor, group_accuracy: Tensor, group_size: Tensor, *, scaled: bool = False) -> Tensor:
    """Return each rollout's verdict less the mean verdict of its prompt's rollouts.

    Args:
        correct: [B]: 1 correct, 0 wrong, -1 not judged.
        group_accuracy: [B], mean verdict of the prompt's rollouts.
        group_size: [B], their number n.
        scaled: divide by their sample standard deviation, ``sqrt(p (1 - p) n / (n - 1))`` for a mean of ``p``.

    Returns:
        [B] float32, between -1 and 1 if not scaled; 0 if all verdicts agree, or the rollout is not judged.

    Example:
        One prompt's three rollouts, of which one is correct, and one that was not judged.

        >>> group = (torch.tensor([1, 0, 0, -1]), torch.full((4,), 1 / 3), torch.full((4,), 3))
        >>> group_reward(*group), group_reward(*group, scaled=True)
        (tensor([ 0.6667, -0.3333, -0.3333,  0.0000]), tensor([ 1.1547, -0.5774, -0.5774,  0.0000]))

    Reference:
        Group normalisation: Shao et al., arXiv 2402.03300.
    """
    mean, n = group_accuracy.float(), group_size.float()
    agree = (correct < 0) | (mean <= 0) | (mean >= 1)
    reward = correct.float() - mean
    if scaled:
        reward = reward / (mean * (1 - mean) * n / (n - 1).clamp(min=1)).clamp(min=1e-9).sqrt()
    return reward.masked_fill(agree, 0.0)


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


def sampler_correction(
    behavior_logprobs: Tensor, sampler_logprobs: Tensor, kind: Correction, *, bound: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Return the factor of each position's loss that corrects for a sampler whose probabilities are a little different.

    The ratio is ``r = exp(logpi_b - logpi_s)``, of the behavior policy as computed here and as its sampler's engine
    computes it. ``none`` gives 1, ``tis`` (truncated importance sampling) ``min(r, bound)``, and ``icepop`` r where
    ``1 / bound <= r <= bound`` and 0 elsewhere.

    Args:
        behavior_logprobs: [B, T], nats.
        sampler_logprobs: [B, T], nats; NaN where no engine sampled the token, and the factor is 1.
        kind: see above.
        bound: largest factor, above 1.

    Returns:
        The factors, [B, T], and True where ``r`` lies outside of what ``kind`` keeps, [B, T] bool.

    Raises:
        UsageError: ``kind`` is unknown.

    Example:
        >>> own, engine = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0, -3.0, -1.0]])
        >>> sampler_correction(own, engine, "tis")
        (tensor([[1.0000, 2.0000, 0.1353]]), tensor([[False,  True, False]]))
        >>> sampler_correction(own, engine, "icepop")
        (tensor([[1., 0., 0.]]), tensor([[False,  True,  True]]))

    Reference:
        Yao et al., *Your efficient RL framework secretly brings you off-policy RL training*, 2025 (truncated importance
        sampling); Ling Team, *Every step evolves*, arXiv 2510.18855 (IcePop).
    """
    require_choice("sampler_correction", kind, get_args(Correction))
    known = ~sampler_logprobs.isnan()
    ratio = (behavior_logprobs - sampler_logprobs).exp().where(known, 1.0)
    if kind == "none":
        return torch.ones_like(ratio), torch.zeros_like(known)
    above = ratio > bound
    if kind == "tis":
        return ratio.clamp(max=bound), above
    outside = above | (ratio < 1 / bound)
    return ratio.masked_fill(outside, 0.0), outside
