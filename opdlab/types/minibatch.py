"""Minibatches of rollouts and targets, and the columns that they need.

Shapes: B rollouts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.types.rollouts import Rollouts
from opdlab.types.targets import Targets


@dataclass(frozen=True)
class Minibatch:
    """The input of a training step: a micro-batch, and the sizes of its optimizer batch.

    With several processes, each has a part of every micro-batch; all fields but ``pool_metrics`` are of its parts.

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
        pool_metrics: metrics of the whole buffer's sampling and scoring, by name.
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
    of_sampler = rollouts.sampler_logprobs
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
        sampler_logprobs=None if of_sampler is None else of_sampler[:, :length],
    )
    return cut, targets.map(lambda tensor: tensor[:, :length])
