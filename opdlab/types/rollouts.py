"""Rollouts: sampled responses, with what is known of each.

Shapes: B rollouts, P prompt tokens (padded on the left), T response tokens (from column 0, padded on the right),
K support, P' tokens of a prompt as the teacher sees it. Log-probabilities are in nats, at the sampling temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from opdlab.types.rows import Rows


class StopReason(IntEnum):
    """Reason why a rollout ended."""

    EOS = 0
    """The policy sampled a stop token, which is the last valid token of the response."""
    LENGTH = 1
    """The response reached the allowed number of tokens: truncated."""


@dataclass(frozen=True)
class Rollouts(Rows):
    """Sampled responses, and their log-probabilities under the behavior policy.

    Args:
        prompt_tokens: [B, P] long, padded on the left.
        prompt_mask: [B, P] bool.
        tokens: [B, T] long: the response, its stop token included.
        mask: [B, T] bool: valid response positions.
        behavior_logprobs: [B, T] float32, nats: under the behavior policy, which sampled the rollouts (verl's
            ``old_log_prob``); 0 at masked positions.
        stop_reasons: [B] long, see :class:`StopReason`.
        rollout_ids: [B] long, unique within a run.
        prompt_ids: [B] long, the prompt's row in the prompt set.
        sampled_at_step: [B] long, optimizer steps taken when the rollout was sampled.
        snapshot_step: [B] long, optimizer steps taken at the last refresh of the snapshot that sampled the rollout.
        temperature: temperature of sampling and scoring.
        correct: [B] int8: 1 if the verifier accepts the answer, 0 if it does not, -1 if the answer was not checked; or
            None if the training problems have no verifier.
        group_accuracy: [B] float32: share of correct answers among the judged rollouts of the same prompt that the
            policy sampled for this buffer, this one included; or None.
        group_size: [B] long: number of these rollouts; or None.
        behavior_support_ids: [B, T, K], dtype as :attr:`Targets.support_ids`: the behavior policy's most likely tokens,
            or None if they are not requested.
        teacher_prompt_tokens: [B, P'] long, padded on the left: the prompt that the teacher sees before the response,
            or None if it sees ``prompt_tokens``.
        teacher_prompt_mask: [B, P'] bool, or None.
        teacher_ids: [B] long: index of the rollout's teacher among :attr:`Teacher.names`; None if there is one teacher.
        demonstration: [B] bool: True if the response comes from the data and was not sampled; or None if all were
            sampled.
        loss_mask: [B, T] bool: valid positions that count. The others are conditioned on and count in nothing: earlier
            turns, outputs of tools. None if all count. The collector narrows ``mask`` to it, see
            :func:`opdlab.rollouts.masking.mask_uncounted`.
        sampler_logprobs: [B, T] float32, nats: log-probabilities of the tokens as the engine that sampled them computes
            them, beside ``behavior_logprobs``, which are computed here; NaN for responses from the data, 0 at padding;
            or None if the sampler gives none.

    Example:
        One prompt of two tokens, answered twice: by three tokens of which the last is the stop token, and by one.

        >>> rollouts = Rollouts(
        ...     prompt_tokens=torch.tensor([[5, 9], [5, 9]]),
        ...     prompt_mask=torch.ones(2, 2, dtype=torch.bool),
        ...     tokens=torch.tensor([[7, 3, 1], [1, 0, 0]]),
        ...     mask=torch.tensor([[True, True, True], [True, False, False]]),
        ...     behavior_logprobs=torch.tensor([[-0.1, -2.3, -0.5], [-1.2, 0.0, 0.0]]),
        ...     stop_reasons=torch.tensor([StopReason.EOS, StopReason.EOS]),
        ...     rollout_ids=torch.tensor([0, 1]),
        ...     prompt_ids=torch.tensor([0, 0]),
        ...     sampled_at_step=torch.tensor([8, 8]),
        ...     snapshot_step=torch.tensor([8, 8]),
        ... )
        >>> len(rollouts), rollouts.num_tokens, rollouts.rows(torch.tensor([1])).tokens
        (2, tensor([3, 1]), tensor([[1, 0, 0]]))
    """

    prompt_tokens: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    behavior_logprobs: Tensor
    stop_reasons: Tensor
    rollout_ids: Tensor
    prompt_ids: Tensor
    sampled_at_step: Tensor
    snapshot_step: Tensor
    temperature: float = 1.0
    correct: Tensor | None = None
    group_accuracy: Tensor | None = None
    group_size: Tensor | None = None
    behavior_support_ids: Tensor | None = None
    teacher_prompt_tokens: Tensor | None = None
    teacher_prompt_mask: Tensor | None = None
    teacher_ids: Tensor | None = None
    demonstration: Tensor | None = None
    loss_mask: Tensor | None = None
    sampler_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> Tensor:
        """Return the number of valid response tokens of each rollout, [B]."""
        return self.mask.sum(1)

    def as_teacher_sees(self) -> "Rollouts":
        """Return the rollouts with the teacher's prompts in place of the student's; teachers score these.

        Example:
            >>> zeros, mask = torch.zeros(1).long(), torch.tensor([[True]])
            >>> longer = {"teacher_prompt_tokens": torch.tensor([[5, 6]]), "teacher_prompt_mask": mask.repeat(1, 2)}
            >>> rollouts = Rollouts(*2 * (torch.tensor([[7]]), mask), torch.tensor([[-0.5]]), *5 * (zeros,), **longer)
            >>> rollouts.as_teacher_sees().prompt_tokens
            tensor([[5, 6]])
        """
        if self.teacher_prompt_tokens is None or self.teacher_prompt_mask is None:
            return self
        return replace(
            self,
            prompt_tokens=self.teacher_prompt_tokens,
            prompt_mask=self.teacher_prompt_mask,
            teacher_prompt_tokens=None,
            teacher_prompt_mask=None,
        )


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of prompts, [B, P] long, padded on the left, and their mask, [B, P] bool.

    Example:
        >>> left_padded([[7], [8, 9]], pad_id=0)
        (tensor([[0, 7],
                [8, 9]]), tensor([[False,  True],
                [ True,  True]]))
    """
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return tokens, mask
