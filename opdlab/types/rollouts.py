"""Rollouts, the teacher's targets for them, and minibatches of both.

Shapes: B rollouts, P prompt tokens (padded on the left), T response tokens (from column 0, padded on the right),
K support, P' tokens of a prompt as the teacher sees it, G the teacher's hidden size. Log-probabilities are in nats, at
the sampling temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Self

import torch
from torch import Tensor


class StopReason(IntEnum):
    """Reason why a rollout ended."""

    EOS = 0
    """The policy sampled a stop token, which is the last valid token of the response."""
    LENGTH = 1
    """The response reached the allowed number of tokens: truncated."""


class _Rows:
    """Base of dataclasses whose tensors share their first dimension and are sliced and moved together."""

    def map(self, function: Any) -> Self:
        """Return a copy with ``function`` applied to every tensor field."""
        changed = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}  # type: ignore[arg-type]
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with every tensor on the device; Lightning calls this for minibatches."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, index: Tensor) -> Self:
        """Return the selected rows."""
        return self.map(lambda tensor: tensor[index])

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as tensors and plain values, so that a checkpoint loads with ``weights_only=True``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Return the object of a :meth:`state_dict`."""
        return cls(**state)


@dataclass(frozen=True)
class Rollouts(_Rows):
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


def id_dtype(vocab_size: int) -> torch.dtype:
    """Return the smallest integer dtype that holds the ids of a vocabulary.

    Example:
        >>> id_dtype(256), id_dtype(49152), id_dtype(151936)
        (torch.uint8, torch.uint16, torch.int32)
    """
    return next((t for t in (torch.uint8, torch.uint16) if vocab_size - 1 <= torch.iinfo(t).max), torch.int32)


def assign_rows(into: Tensor, rows: Tensor, values: Tensor) -> None:
    """Assign ``into[rows] = values``; uses a view as int16, because torch does not support this for uint16.

    Example:
        >>> ids = torch.zeros(3, 2, dtype=torch.uint16)
        >>> assign_rows(ids, torch.tensor([2]), torch.tensor([[7, 40_000]]))
        >>> ids[2].tolist()
        [7, 40000]
    """
    bits = torch.int16 if into.dtype == torch.uint16 else into.dtype
    into.view(bits)[rows] = values.to(into.dtype).view(bits)


@dataclass(frozen=True)
class Targets(_Rows):
    """The teacher's scores of rollouts, computed once per rollout buffer and never changed.

    Args:
        logprobs: [B, T] float32, nats: of the sampled tokens; 0 at masked positions. NaN if the teacher cannot compute
            them and the request does not require them; then ``support_mass`` is None, see :attr:`known_logprobs`.
        support_ids: [B, T, K]: the tokens on which student and teacher are compared, or None if none are requested: the
            teacher's most likely ones, most likely first; or the behavior policy's; or both, the teacher's first. The
            dtype is the smallest that holds every id (:func:`id_dtype`); many operations do not support it, so call
            ``.long()``.
        support_logits: [B, T, K] float32: their logits at the sampling temperature, or None.
        support_mass: [B, T] float32: the teacher's probability of the support, 0 to 1, or None.
        entropy: [B, T] float32, nats: of the teacher's next-token distribution, or None if it is not requested.
        support_valid: [B, T, K] bool: False at an id that stands in the support a second time; None if ids are unique.
        log_normalizer: [B, T] float32: log-sum-exp of the teacher's logits over the vocabulary, or None.
        log_tail: [B, T] float32: log-sum-exp of its logits outside the support, or None.
        hidden: [B, T, G]: the teacher's last hidden states, from which its head makes the logits, or None.

    Example:
        A support of two tokens at each of the three positions of one rollout.

        >>> targets = Targets(
        ...     logprobs=torch.tensor([[-0.2, -1.9, -0.4]]),
        ...     support_ids=torch.tensor([[[7, 4], [8, 3], [1, 2]]], dtype=torch.uint8),
        ...     support_logits=torch.tensor([[[3.1, 0.4], [1.0, 0.9], [2.2, 0.1]]]),
        ...     support_mass=torch.tensor([[0.97, 0.71, 0.92]]),
        ... )
        >>> targets.support_logits.shape
        torch.Size([1, 3, 2])
    """

    logprobs: Tensor
    support_ids: Tensor | None = None
    support_logits: Tensor | None = None
    support_mass: Tensor | None = None
    entropy: Tensor | None = None
    support_valid: Tensor | None = None
    log_normalizer: Tensor | None = None
    log_tail: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def known_logprobs(self) -> Tensor | None:
        """Return ``logprobs``; None if the teacher knows probabilities only relative to others of the support.

        Example:
            >>> ratios = Targets(torch.full((1, 1), torch.nan), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
            >>> ratios.known_logprobs, Targets(torch.zeros(1, 1)).known_logprobs
            (None, tensor([[0.]]))
        """
        return None if self.support_logits is not None and self.support_mass is None else self.logprobs


@dataclass(frozen=True)
class TeacherRequest:
    """The required teacher outputs.

    Args:
        top_k: K, number of the teacher's most likely tokens whose ids and logits are required; 0 for none.
        vocab_size: number of tokens shared with the student, over which the teacher's distribution is taken; None for
            all tokens of the teacher.
        entropy: True if the entropy of the teacher's distribution is required.
        behavior_top_k: number of the behavior policy's most likely tokens, :attr:`Rollouts.behavior_support_ids`, whose
            logits under the teacher are required; 0 for none. With ``top_k`` too, the support is the union.
        tail: True if ``log_normalizer`` and, with a support, ``log_tail`` are required.
        hidden: True if the hidden states are required.
        logprobs: True if the log-probabilities of the sampled tokens and the mass of the support are required; False if
            they are only logged, so that a teacher that cannot compute them may leave them out.

    Example:
        >>> TeacherRequest(top_k=32).top_k
        32
    """

    top_k: int = 0
    vocab_size: int | None = None
    entropy: bool = False
    behavior_top_k: int = 0
    tail: bool = False
    hidden: bool = False
    logprobs: bool = True


@dataclass(frozen=True)
class Minibatch:
    """The input of a training step: a micro-batch, and the sizes of its optimizer batch.

    Args:
        rollouts: the B rollouts of this micro-batch.
        targets: the teacher's targets for them.
        rows: [B] long, in host memory: the rollouts' rows in the buffer.
        num_tokens: valid response tokens in the optimizer batch, the denominator of ``token_mean``.
        num_rollouts: rollouts with a valid token in the optimizer batch, the denominator of ``sequence_mean``.
        micro_batches: all micro-batches of the optimizer batch in order, this one included; the gate normalises over
            all of them. They stay in host memory until they are needed.
        position: index of this micro-batch in ``micro_batches``.
        reuse_epoch: passes over the buffer before this one.
        pool_metrics: metrics of the buffer's sampling and scoring, by name.
        behavior_known: False if the behavior log-probabilities of the optimizer batch are not computed yet. Then the
            student still equals the behavior policy, and the training step's log-probabilities are used.

    Example:
        >>> zeros, mask = torch.zeros(1).long(), torch.tensor([[True, True]])
        >>> rollouts = Rollouts(*2 * (torch.tensor([[7, 1]]), mask), torch.tensor([[-0.1, -0.5]]), *5 * (zeros,))
        >>> targets = Targets(torch.tensor([[-0.2, -0.4]]))
        >>> batch = Minibatch(rollouts, targets, torch.tensor([3]), 2, 1, ((rollouts, targets),), 0, 0, {})
        >>> len(batch), batch.rows, batch.behavior_known
        (1, tensor([3]), True)
    """

    rollouts: Rollouts
    targets: Targets
    rows: Tensor
    num_tokens: int
    num_rollouts: int
    micro_batches: tuple[tuple[Rollouts, Targets], ...]
    position: int
    reuse_epoch: int
    pool_metrics: dict[str, float]
    behavior_known: bool = True

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Minibatch":
        """Return the micro-batch on a device; ``micro_batches`` stay in host memory."""
        return replace(
            self,
            rollouts=self.rollouts.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )

    def __len__(self) -> int:
        return len(self.rollouts)


def trimmed(rollouts: Rollouts, targets: Targets) -> tuple[Rollouts, Targets]:
    """Return the rows without columns that are padding in all rows: left of prompts, right of responses.

    Example:
        >>> zeros, mask = torch.zeros(1).long(), torch.tensor([[True, False]])
        >>> rollouts = Rollouts(*2 * (torch.tensor([[1, 0]]), mask), torch.tensor([[-0.5, 0.0]]), *5 * (zeros,))
        >>> cut, targets = trimmed(rollouts, Targets(torch.tensor([[-0.4, 0.0]])))
        >>> cut.tokens.shape, targets.logprobs.shape
        (torch.Size([1, 1]), torch.Size([1, 1]))
    """
    skip = int(rollouts.prompt_mask.any(0).int().argmax()) if rollouts.prompt_mask.numel() else 0
    used = rollouts.mask.any(0)
    length = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
    support, of_teacher = rollouts.behavior_support_ids, rollouts.teacher_prompt_mask
    if of_teacher is not None and rollouts.teacher_prompt_tokens is not None:
        left = int(of_teacher.any(0).int().argmax()) if of_teacher.numel() else 0
        rollouts = replace(
            rollouts,
            teacher_prompt_tokens=rollouts.teacher_prompt_tokens[:, left:],
            teacher_prompt_mask=of_teacher[:, left:],
        )
    cut = replace(
        rollouts,
        behavior_support_ids=None if support is None else support[:, :length],
        prompt_tokens=rollouts.prompt_tokens[:, skip:],
        prompt_mask=rollouts.prompt_mask[:, skip:],
        tokens=rollouts.tokens[:, :length],
        mask=rollouts.mask[:, :length],
        behavior_logprobs=rollouts.behavior_logprobs[:, :length],
        loss_mask=None if rollouts.loss_mask is None else rollouts.loss_mask[:, :length],
    )
    return cut, targets.map(lambda tensor: tensor[:, :length])
