"""A micro-batch without a model: random hidden states and head, in float64, with an objective's other inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.diagnostics import StepTrace, hidden_gradient_norms
from opdlab.gating import GateInputs, Gates
from opdlab.objectives import Objective, PositionLosses, Reduction, loss_shares
from opdlab.policies import Scored
from opdlab.rollouts import Rollouts, Targets
from opdlab.scoring import Head
from opdlab.training import gate_inputs

VOCABULARY, HIDDEN, SUPPORT = 19, 6, 4


@dataclass(frozen=True)
class MicroBatch:
    """What a training step has in hand once the student has run.

    Args:
        hidden: [N, H], a leaf that takes gradients.
        head: with a weight and a bias that take gradients.
        rollouts: B of them, T columns.
        targets: random.
    """

    hidden: Tensor
    head: Head
    rollouts: Rollouts
    targets: Targets

    @property
    def scored(self) -> Scored:
        mask = self.rollouts.mask
        return Scored.of(self.hidden, self.head, mask, self.rollouts.tokens[mask])

    def losses(self, objective: Objective) -> PositionLosses:
        return objective.position_losses(self.scored, self.rollouts, self.targets)

    def inputs(self, objective: Objective) -> GateInputs:
        return gate_inputs(self.rollouts, self.targets, self.losses(objective))

    def trace(self, objective: Objective, gates: Gates, shares: Tensor, *, step: int = 0, epoch: int = 0) -> StepTrace:
        norms = hidden_gradient_norms(objective, self.scored, self.rollouts, self.targets)
        inputs = self.inputs(objective)
        return StepTrace(self.rollouts, epoch, step, inputs, gates, shares, {}, norms)


def micro_batch(seed: int, lengths: tuple[int, ...] = (5, 9, 0, 7), snapshot_step: int = 0) -> MicroBatch:
    """A micro-batch of rollouts of given lengths; logits are large enough for clips to bind."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(VOCABULARY, (rows, width), generator=generator)
    head = Head(normal(VOCABULARY, HIDDEN).requires_grad_(), normal(VOCABULARY).requires_grad_())
    hidden = normal(int(mask.sum()), HIDDEN).requires_grad_()
    zeros = torch.zeros(rows).long()
    logprobs = Scored.of(hidden, head, mask, tokens[mask]).padded(
        head.tile(hidden.detach(), slice(None)).log_softmax(-1).gather(1, tokens[mask][:, None]).squeeze(1).detach()
    )
    rollouts = Rollouts(
        prompt_tokens=torch.zeros(rows, 1).long(),
        prompt_mask=torch.ones(rows, 1).bool(),
        tokens=tokens,
        mask=mask,
        behavior_logprobs=(logprobs + 0.3 * normal(rows, width)) * mask,
        stop_reasons=zeros,
        rollout_ids=torch.arange(rows),
        prompt_ids=zeros,
        sampled_at_step=zeros + snapshot_step,
        snapshot_step=zeros + snapshot_step,
    )
    support = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:SUPPORT] for _ in range(rows * width)])
    targets = Targets(
        logprobs=(logprobs + normal(rows, width)) * mask,
        support_ids=support.view(rows, width, SUPPORT),
        support_logits=normal(rows, width, SUPPORT),
        support_mass=torch.ones(rows, width),
    )
    return MicroBatch(hidden, head, rollouts, targets)


def batch_shares(parts: list[MicroBatch], reduction: Reduction) -> list[Tensor]:
    """Shares of micro-batches in the optimizer batch that they make up."""
    lengths = torch.cat([part.rollouts.num_tokens for part in parts])
    tokens, rollouts = float(lengths.sum()), float((lengths > 0).sum())
    return [
        loss_shares(part.rollouts.mask, reduction=reduction, num_tokens=tokens, num_rollouts=rollouts) for part in parts
    ]
