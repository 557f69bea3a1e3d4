"""The trace of a training step: its tensors, position by position, for callbacks to look at.

Shapes: B rollouts, T response tokens, N valid positions, H hidden size. Log-probabilities are in nats.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.gating import GateInputs, Gates
from opdlab.objectives import Objective
from opdlab.policies.language_model import Scored
from opdlab.rollouts import Rollouts, Targets


@dataclass(frozen=True)
class StepTrace:
    """Inputs and outputs of gate and objective for a micro-batch, detached, on the module's device.

    Args:
        rollouts: B of them.
        reuse_epoch: passes over the rollouts' pool before this one.
        step: optimizer steps taken before this one.
        inputs: of the gate: drift, teacher's log-probabilities, position losses.
        gates: output of the gate.
        loss_shares: [B, T]: factor of a position's loss, besides its weight, in the optimizer batch's loss:
            1 over the number of tokens for ``token_mean``. 0 where the mask is 0.
        values: [B, T] each, by name: ``entropy``, and further values of the objective.
        gradient_norms: see :func:`hidden_gradient_norms`; None where no callback asked for it.
    """

    rollouts: Rollouts
    reuse_epoch: int
    step: int
    inputs: GateInputs
    gates: Gates
    loss_shares: Tensor
    values: dict[str, Tensor]
    gradient_norms: Tensor | None = None

    @property
    def age(self) -> Tensor:
        """Optimizer steps since the sampling snapshot took the student's weights, of each rollout; [B] long."""
        return self.step - self.rollouts.snapshot_step


def hidden_gradient_norms(objective: Objective, scored: Scored, rollouts: Rollouts, targets: Targets) -> Tensor:
    """Return the norm of the gradient of each position's loss at the student's last hidden state there.

    A position's loss depends on the hidden state of that position alone, so all of them come from one backward pass
    through the head, and none through the model. Neither graph nor gradients of the step under way are touched.

    Args:
        objective: whose losses.
        scored: the student's hidden states, N valid positions.
        rollouts: B rollouts of T tokens.
        targets: the teacher's.

    Returns:
        [B, T] float32 (float64 for a float64 model), nats per unit of hidden state; 0 where the mask is 0.
    """
    hidden = scored.hidden.detach().requires_grad_()
    probe = replace(scored, hidden=hidden, head=scored.head.detached())
    with torch.enable_grad():
        total = objective.position_losses(probe, rollouts, targets).losses.sum()
    (gradient,) = torch.autograd.grad(total, hidden)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return scored.padded(torch.linalg.vector_norm(gradient, dim=-1, dtype=wide))
