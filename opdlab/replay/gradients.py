"""Gradients of one optimizer step under many weightings of its positions.

The gradient ``g(w) = sum_n c_n w_n dl_n/dtheta`` is linear in the weights w. So one forward pass serves all gates, a
gate costs a backward pass, and gates whose weights are multiples of each other, or mixtures with no gating at all, as
``residual`` is, share one. Only inner products are kept of a gate's gradient.

Shapes: V gates, N valid positions of the step, P trained parameters, D reference gradients.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.module import OPDModule, ScoredBatch
from opdlab.objectives import reduce_losses
from opdlab.rollouts import Minibatch

# Weights are float32 numbers around 1: differences below this are rounding.
_ROUNDING = 1e-6

Autocast = Callable[[], AbstractContextManager[None]]


class StepGradients:
    """Losses and gradients of an optimizer step, through the module's own account of a micro-batch.

    The graph of a step of one micro-batch is kept; with more, each gradient runs the student anew, so that memory stays
    that of training.

    Args:
        module: with the student's weights from before the step.
        batches: the step's micro-batches, on the module's device.
        shares: of each, see :func:`opdlab.objectives.loss_shares`.
        step: optimizer steps taken before.
        autocast: context of the forward pass.
    """

    def __init__(
        self, module: OPDModule, batches: Sequence[Minibatch], shares: Sequence[Tensor], step: int, autocast: Autocast
    ) -> None:
        self._module, self._batches, self._shares, self._step = module, batches, shares, step
        self._autocast = autocast
        self._parameters = [p for p in module.student.parameters() if p.requires_grad]
        self._account: ScoredBatch | None = None
        accounts = [self._run(place) for place in range(len(batches))]
        self.inputs = [account.inputs for account in accounts]
        """What a gate may look at, of each micro-batch."""
        if len(accounts) == 1:
            self._account = accounts[0]

    def _run(self, place: int) -> ScoredBatch:
        if self._account is not None:
            return self._account
        batch = self._batches[place]
        with torch.enable_grad(), self._autocast():
            account = self._module.score_batch(batch, self._step)
        if batch.keep_behavior is not None:  # they are filled in now
            self._batches = [replace(b, keep_behavior=None) if b is batch else b for b in self._batches]
        return account

    def losses(self, weights: Sequence[Tensor]) -> list[float]:
        """Each micro-batch's part of the step's loss, by the same sums as in training, nats."""
        losses = [each.position_losses for each in self.inputs]
        return [
            float(reduce_losses(loss, weight, share))
            for loss, weight, share in zip(losses, weights, self._shares, strict=True)
            if loss is not None
        ]

    def gradient(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Of the step's loss, all trained parameters one after the other, before any clipping.

        Args:
            weights: [B, T] of each micro-batch; all 1 by default.

        Returns:
            [P] float32.
        """
        total: Tensor | None = None
        for place, share in enumerate(self._shares):
            account = self._run(place)
            weight = torch.ones_like(share) if weights is None else weights[place]
            loss = reduce_losses(account.positions.losses, weight, share)
            parts = torch.autograd.grad(
                loss, self._parameters, retain_graph=self._account is not None, allow_unused=True, materialize_grads=True
            )
            flat = torch.cat([part.flatten().float() for part in parts])
            total = flat if total is None else total + flat
        assert total is not None
        return total


@dataclass(frozen=True)
class WeightClasses:
    """Weightings grouped by what their gradients follow from: ``w = offset + slope * w[representative]``.

    Args:
        representative: [V] long; -1 where the weights are all the same.
        slope: [V] float64.
        offset: [V] float64.
    """

    representative: Tensor
    slope: Tensor
    offset: Tensor

    @property
    def representatives(self) -> list[int]:
        """Those whose gradients are needed, besides the ungated one."""
        return [int(v) for v in self.representative.unique() if v >= 0]


def weight_classes(weights: Tensor) -> WeightClasses:
    """Group weightings, up to rounding.

    Args:
        weights: [V, N].

    Example:
        >>> weights = torch.tensor([[1.0, 1.0], [0.5, 1.5], [0.75, 1.25], [0.2, 0.6]])
        >>> classes = weight_classes(weights)
        >>> classes.representative.tolist(), [round(x, 4) for x in classes.slope.tolist()]
        ([-1, 1, 1, 1], [0.0, 1.0, 0.5, 0.4])
    """
    wide = weights.double()
    mean = wide.mean(1)
    centred = wide - mean[:, None]
    reach = centred.abs().amax(1)
    representative = torch.full((len(weights),), -1)
    slope, squares = torch.zeros_like(mean), centred.square().sum(1)
    kept: list[int] = []
    # The widest first, so that no slope is above 1 and no rounding is made larger.
    for v in squares.argsort(descending=True, stable=True).tolist():
        if reach[v] <= _ROUNDING:
            continue
        others = torch.tensor(kept, dtype=torch.long, device=weights.device)
        slopes = centred[others] @ centred[v] / squares[others]
        misfit = (centred[v] - slopes[:, None] * centred[others]).abs().amax(1)
        nearest = int(misfit.argmin()) if kept else -1
        if kept and misfit[nearest] <= _ROUNDING:
            representative[v], slope[v] = kept[nearest], slopes[nearest]
        else:
            representative[v], slope[v] = v, 1.0
            kept.append(v)
    offset = mean - torch.where(representative >= 0, slope * mean[representative], 0.0)
    return WeightClasses(representative, slope, offset)


@dataclass(frozen=True)
class Products:
    """Inner products of V gates' gradients; float64, on the host.

    Args:
        squares: [V], of each with itself.
        references: [V, D], with each reference; the first reference is the ungated gradient.
    """

    squares: Tensor
    references: Tensor


def gradient_products(gradients: StepGradients, weights: Sequence[Tensor], others: Tensor) -> Products:
    """Inner products of every gate's gradient with the ungated one and with others.

    Args:
        gradients: of the step.
        weights: of each micro-batch, [V, B, T].
        others: [D - 1, P].
    """
    ungated = gradients.gradient()
    references = torch.cat([ungated[None], others])
    valid = [inputs.mask.bool() for inputs in gradients.inputs]
    flat = torch.cat([weight[:, mask] for weight, mask in zip(weights, valid, strict=True)], dim=1)
    classes = weight_classes(flat)
    own = torch.zeros(len(flat), dtype=torch.float64)  # squares of representatives
    found = torch.zeros(len(flat), len(references), dtype=torch.float64)
    for v in classes.representatives:
        gradient = gradients.gradient([weight[v] for weight in weights])
        own[v] = float(torch.dot(gradient, gradient))
        found[v] = torch.mv(references, gradient).double().cpu()
    base = torch.mv(references, ungated).double().cpu()  # of weights that are 1 everywhere
    place = classes.representative.clamp(min=0).cpu()
    slope, offset = classes.slope.cpu(), classes.offset.cpu()
    squares = offset**2 * base[0] + 2 * offset * slope * found[place, 0] + slope**2 * own[place]
    return Products(squares.clamp(min=0), offset[:, None] * base + slope[:, None] * found[place])
