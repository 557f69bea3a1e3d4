"""Gradients of one optimizer step under many weightings of its positions.

The gradient ``g(w) = sum_n c_n w_n dl_n/dtheta`` is linear in the weights w. So one forward pass serves all gates, and
a gate whose weights are a linear combination of others' needs no backward pass of its own: its inner products combine
theirs. Most of hundreds of gates on drift are nearly such combinations. The error of a combination is bounded by a
tolerance, measured at the last hidden states, where the gradients of different positions are independent.

Shapes: V gates, N valid positions of the step, P trained parameters, D reference gradients, R gates of the basis.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.diagnostics import hidden_gradient_norms
from opdlab.gating import GateInputs
from opdlab.module import OPDModule
from opdlab.objectives import reduce_losses
from opdlab.replay.record import RecordedBatch
from opdlab.seeds import derive_seed
from opdlab.training import ScoredBatch, score_batch
from opdlab.types import Minibatch

# Size of a kept gradient. A larger model's is sketched; its inner products have an error of about
# 1 / sqrt(2^22) = 0.05% of the product of the norms.
SKETCH_SIZE = 1 << 22
# Gradients are float32 numbers, so the remainder after removing the shared part must not be too small: below this
# it is rounding.
LEAST_TOLERANCE = 1e-3
_PIECE = 1 << 16  # columns converted to float64 at a time
_NOTHING = 1e-30  # a gate this small has no significant digits left, and makes no step

Autocast = Callable[[], AbstractContextManager[None]]


class StepGradients:
    """Losses and gradients of an optimizer step, computed by the module's own loss of a micro-batch.

    The graph of a step of one micro-batch is kept; with more, each gradient runs the student again, so that memory
    equals that of training.

    Args:
        module: with the student's weights from before the step.
        batches: the step's micro-batches.
        step: optimizer steps taken before.
        autocast: context of the forward pass.
        reuse_epoch: passes over the buffer before this one.
        behavior_known: False if the student's own log-probabilities are the behavior policy's.
    """

    def __init__(
        self,
        module: OPDModule,
        batches: Sequence[RecordedBatch],
        step: int,
        autocast: Autocast,
        *,
        reuse_epoch: int = 0,
        behavior_known: bool = True,
    ) -> None:
        num_tokens = torch.cat([batch.rollouts.num_tokens for batch in batches])
        self._batches = [
            Minibatch(
                batch.rollouts,
                batch.targets,
                rows=torch.arange(len(batch.rollouts)),
                num_tokens=int(num_tokens.sum()),
                num_rollouts=int((num_tokens > 0).sum()),
                micro_batches=tuple((each.rollouts, each.targets) for each in batches),
                position=position,
                reuse_epoch=reuse_epoch,
                pool_metrics={},
                behavior_known=behavior_known,
            )
            for position, batch in enumerate(batches)
        ]
        self._module, self._step, self._autocast = module, step, autocast
        self._shares = [batch.shares.to(module.device) for batch in batches]
        self._parameters = [p for p in module.student.parameters() if p.requires_grad]
        self._kept: ScoredBatch | None = None
        self.inputs: list[GateInputs] = []
        """Inputs of the gate, for each micro-batch."""
        self.importance: list[Tensor] = []
        """[B, T] of each micro-batch: norm of each position's part of the ungated gradient at the hidden states."""
        for batch, share in zip(self._batches, self._shares, strict=True):
            minibatch = batch.to(module.device)
            scored = self._score(minibatch)
            with autocast():
                norms = hidden_gradient_norms(module.objective, scored.scored, scored.rollouts, minibatch.targets)
            self.inputs.append(scored.inputs)
            self.importance.append(norms * share)
            if len(batches) == 1:
                self._kept = scored

    def _score(self, batch: Minibatch) -> ScoredBatch:
        if self._kept is not None:
            return self._kept
        with torch.enable_grad(), self._autocast():
            on_device = batch.to(self._module.device)  # one at a time, as in training
            return score_batch(self._module.student, self._module.objective, on_device, self._step)

    def losses(self, weights: Sequence[Tensor]) -> list[float]:
        """Return each micro-batch's part of the step's loss, by the same sums as in training, nats."""
        losses = [each.position_losses for each in self.inputs]
        return [
            float(reduce_losses(loss, weight, share))
            for loss, weight, share in zip(losses, weights, self._shares, strict=True)
            if loss is not None
        ]

    def gradient(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Return the gradient of the step's loss, all trained parameters concatenated, before clipping.

        Args:
            weights: [B, T] of each micro-batch; all 1 by default.

        Returns:
            [P] float32, or its sketch, see :func:`sketch`.
        """
        total = torch.zeros((), device=self._module.device)
        for place, (batch, share) in enumerate(zip(self._batches, self._shares, strict=True)):
            weight = torch.ones_like(share) if weights is None else weights[place]
            parts = torch.autograd.grad(
                reduce_losses(self._score(batch).positions.losses, weight, share),
                self._parameters,
                retain_graph=self._kept is not None,
                allow_unused=True,
                materialize_grads=True,
            )
            total = total + sketch(parts)
        return total


def sketch(parts: Sequence[Tensor], size: int = SKETCH_SIZE) -> Tensor:
    """Return the concatenated parts of a gradient; for a long one its count sketch, which preserves inner products.

    Every number gets a random sign and is added to one entry of the sketch, the same for every gradient.

    Args:
        parts: of the gradient, P numbers in all.
        size: of the sketch.

    Returns:
        [min(P, size)] float32.

    Reference:
        Charikar, Chen & Farach-Colton, "Finding frequent items in data streams", 2002; for inner products: Weinberger
        et al., "Feature hashing for large scale multitask learning", arXiv 0902.2206. Here neighbours stay neighbours,
        which saves drawing indices.
    """
    if sum(part.numel() for part in parts) <= size:
        return torch.cat([part.flatten().float() for part in parts])
    device = parts[0].device
    generator = torch.Generator(device).manual_seed(derive_seed("sketch", size))
    total = torch.zeros(size, device=device)
    for piece in (piece for part in parts for piece in torch.split(part.flatten(), size)):
        signs = torch.randint(0, 2, piece.shape, generator=generator, device=device, dtype=torch.int8) * 2 - 1
        start = int(torch.randint(size, (), generator=generator, device=device))
        signed = piece.float() * signs
        fits = min(len(piece), size - start)
        total[start : start + fits] += signed[:fits]
        total[: len(piece) - fits] += signed[fits:]
    return total


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T`` of [M, P] and [D, P] on the host, in float64: float32 loses four digits on long rows."""
    parts = zip(a.split(_PIECE, dim=1), b.split(_PIECE, dim=1), strict=True)  # type: ignore[no-untyped-call]
    total = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for ours, theirs in parts:
        total += ours.double() @ theirs.double().T
    return total.cpu()


@dataclass(frozen=True)
class Mixtures:
    """Weightings as linear combinations of a basis: ``w[v] = sum_r coefficients[v, r] * w[basis[r]]``, nearly.

    Args:
        basis: R rows.
        coefficients: [V, R] float64.
    """

    basis: list[int]
    coefficients: Tensor


def mixtures(weights: Tensor, importance: Tensor, tolerance: float) -> Mixtures:
    """Return a basis: row 0, then the row with the largest error, until all errors are within the tolerance.

    This is Gram-Schmidt with pivoting. A weighting whose weights are all 0, or below 1e-30, has coefficients of 0.

    Args:
        weights: [V, N].
        importance: [N], how much an error in a position's weight counts.
        tolerance: largest error of a weighting, ``|importance * error| / |importance * w|``, at least
            :data:`LEAST_TOLERANCE`; or 0, for a basis of all of them.

    Example:
        >>> weights = torch.tensor([[1.0, 1.0], [0.5, 1.5], [0.75, 1.25]])
        >>> found = mixtures(weights, torch.ones(2), tolerance=0.01)
        >>> found.basis, [round(c, 4) for c in found.coefficients[2].tolist()]
        ([0, 1], [0.5, 0.5])
    """
    rows = weights.double() * importance.double()
    norms = rows.norm(dim=1).masked_fill(weights.amax(1) < _NOTHING, 0.0)
    if tolerance == 0:
        there = norms.nonzero().view(-1).tolist()
        return Mixtures(there, torch.eye(len(weights), dtype=torch.float64, device=weights.device)[:, there])
    units = (rows / norms[:, None]).masked_fill(norms[:, None] == 0, 0.0)
    left, directions, basis = units.clone(), [], []
    v = 0
    while (error := left.norm(dim=1))[v] > tolerance:
        direction = left[v] / error[v]
        for _ in range(2):  # twice, because rounding leaves a part that is not orthogonal
            left -= (left @ direction)[:, None] * direction
        basis.append(v)
        directions.append(direction)
        v = int(left.norm(dim=1).argmax())
    if not basis:
        return Mixtures([], rows.new_zeros(len(rows), 0))
    onto = units @ torch.stack(directions).T  # [V, R], lower triangular in the rows of the basis
    scaled = torch.linalg.solve_triangular(onto[basis].tril(), onto, upper=False, left=False)
    return Mixtures(basis, scaled * norms[:, None] / norms[basis])


@dataclass(frozen=True)
class Products:
    """Inner products of V gates' gradients; float64, on the host.

    Args:
        squares: [V], of each gradient with itself.
        references: [V, D], with each reference gradient; the first one is the ungated gradient.
        num_backward: number of computed gradients.
    """

    squares: Tensor
    references: Tensor
    num_backward: int


def gradient_products(
    gradients: StepGradients, weights: Sequence[Tensor], others: Tensor, tolerance: float
) -> Products:
    """Return the inner products of every gate's gradient with itself, with the ungated one and with others.

    Args:
        gradients: of the step.
        weights: of each micro-batch, [V, B, T]; all 1 for the first gate.
        others: [D - 1, P], or their sketches.
        tolerance: see :func:`mixtures`.
    """
    valid = [inputs.mask.bool() for inputs in gradients.inputs]
    flat = torch.cat([weight[:, mask] for weight, mask in zip(weights, valid, strict=True)], dim=1)
    importance = torch.cat([each[mask] for each, mask in zip(gradients.importance, valid, strict=True)])
    mixed = mixtures(flat, importance, tolerance)
    count, references = len(mixed.basis), torch.zeros(len(flat), 1 + len(others), dtype=torch.float64)
    if not count:  # the gradient is zero for every gate
        return Products(torch.zeros(len(flat), dtype=torch.float64), references, 0)
    # Scaled, so that the squares of a gate with tiny weights do not underflow.
    scales = flat[mixed.basis].amax(1)
    basis = others.new_zeros(count, others.shape[1])
    for place, (v, scale) in enumerate(zip(mixed.basis, scales, strict=True)):
        basis[place] = gradients.gradient([weight[v] / scale for weight in weights])
    coefficients = (mixed.coefficients * scales).cpu()
    ungated = basis[:1] * scales[0]  # row 0 is the first of the basis
    references = coefficients @ inner_products(basis, torch.cat([ungated, others]))
    squares = ((coefficients @ inner_products(basis, basis)) * coefficients).sum(1)
    return Products(squares.clamp(min=0), references, count)
