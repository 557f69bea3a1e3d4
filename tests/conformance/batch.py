"""One batch for all comparisons of objectives, in float64, and the comparison of values and gradients.

Shapes: B rollouts, T response tokens, N valid positions, V vocabulary, H hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.objectives import Objective, PositionLosses, build_objective
from opdlab.testing.objective_batch import Batch, States, make_batch

FRESH = States.random(num_tokens=9, vocab_size=24, seed=3)
FRESH = replace(FRESH, behavior=FRESH.student)
"""Rollouts that the student itself has just sampled."""
_NOISE = torch.randn(FRESH.student.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
STALE = replace(FRESH, behavior=FRESH.student + 0.5 * _NOISE)
"""The same rollouts, from a snapshot that the student has left: ratios on either side of every clip."""


@dataclass(frozen=True)
class Case:
    """An objective's losses on a batch, and what another implementation takes instead of it.

    Args:
        objective: after its setup.
        batch: what it has read; hidden states and the head's weight are the leaves of all gradients.
        output: of :meth:`Objective.position_losses`.
        states: from which the batch is made.
    """

    objective: Objective
    batch: Batch
    output: PositionLosses
    states: States

    @property
    def mask(self) -> Tensor:
        """[B, T] bool."""
        return self.batch.rollouts.mask

    @property
    def losses(self) -> Tensor:
        """The objective's losses of the valid positions, [N]."""
        return self.output.losses[self.mask]

    @property
    def leaves(self) -> list[Tensor]:
        """The student's hidden states, [N, H], and its head's weight, [V, H]."""
        return [self.batch.scored.hidden, self.batch.scored.head.weight]

    @property
    def student(self) -> Tensor:
        """The student's logits at the sampling temperature, [N, V], with a gradient to the leaves."""
        hidden, weight = self.leaves
        return hidden @ weight.T / self.batch.rollouts.temperature

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits, [N, V]."""
        hidden = self.states.teacher[self.mask]
        return hidden @ self.states.teacher_weight.T / self.batch.rollouts.temperature

    @property
    def behavior(self) -> Tensor:
        """The logits of the snapshot that sampled, [N, V]."""
        # make_batch trains the very tensor of the states where the dtype is theirs.
        weight = self.states.weight.detach()
        return self.states.behavior[self.mask] @ weight.T / self.batch.rollouts.temperature

    def sampled(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the sampled tokens, [N, V] -> [N]."""
        return logits.log_softmax(-1).gather(-1, self.batch.rollouts.tokens[self.mask][:, None]).squeeze(-1)

    def padded(self, values: Tensor) -> Tensor:
        """Values of the valid positions in their places, [N] -> [B, T]; 0 elsewhere."""
        return torch.zeros(self.mask.shape, dtype=values.dtype).masked_scatter(self.mask, values)

    def agrees(self, theirs: Tensor, *, rtol: float = 1e-9, atol: float = 1e-11, values: bool = True) -> None:
        """Compare losses, [N] or their mean, and the gradients of both at the leaves.

        ``values`` False compares the gradients alone.
        """
        ours = self.losses if theirs.dim() else self.losses.mean()
        assert float(self.losses.detach().abs().mean()) > 1e-3
        if values:
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)
        factors = (
            torch.linspace(-1, 2, len(ours), dtype=ours.dtype) if theirs.dim() else torch.ones((), dtype=ours.dtype)
        )
        for mine, other in zip(
            torch.autograd.grad((ours * factors).sum(), self.leaves, retain_graph=True),
            torch.autograd.grad((theirs * factors).sum(), self.leaves, retain_graph=True),
            strict=True,
        ):
            assert mine.abs().max() > 1e-4
            torch.testing.assert_close(mine, other.to(mine.dtype), rtol=rtol, atol=atol)


def run(name: str, states: States = STALE, **options: object) -> Case:
    """Build an objective by its name, and compute its losses on a batch in float64."""
    objective = build_objective(name, **options)
    batch = make_batch(states, objective.request, objective.needs, torch.float64)
    objective.setup(batch.student, batch.teacher)
    output = objective.position_losses(batch.scored, batch.rollouts, batch.targets)
    return Case(objective, batch, output, states)
