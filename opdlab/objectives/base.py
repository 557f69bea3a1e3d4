"""Common parts of all objectives: the interface, its registry, and the reduction of position losses to a scalar.

Shapes: B rollouts, T response tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from opdlab.policies.language_model import LanguageModel, Scored
from opdlab.policies.teacher import Teacher
from opdlab.registry import Registry
from opdlab.types import Rollouts, Targets, TeacherRequest

Reduction = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True)
class PositionLosses:
    """Per-token losses and statistics of a micro-batch.

    Args:
        losses: [B, T], differentiable; 0 at masked positions.
        logprobs: [B, T], nats: of the sampled tokens under the student, detached.
        entropy: [B, T], nats: of the student, detached.
        metrics: further metrics by log name, each [B, T], detached; their mean over valid positions is logged.
        divergence: [B, T], nats, detached: of the student from the teacher, if the objective computes one, or None.
    """

    losses: Tensor
    logprobs: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    divergence: Tensor | None = None


class Objective(ABC):
    """Base of all objectives: computes position losses and states the required teacher outputs.

    An objective takes logits of the teacher's support from :meth:`Scored.support_statistics`, and log-probabilities
    from :meth:`Scored.statistics`. Each of these runs one pass over the head and caches its result.
    """

    @property
    def request(self) -> TeacherRequest:
        """Return the required teacher outputs; by default only the sampled tokens' log-probabilities."""
        return TeacherRequest()

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the fields of :class:`~opdlab.types.Rollouts` that may be None and that the objective reads.

        A run without them is refused at its start: ``correct`` needs a verifier, ``group_accuracy`` and ``group_size``
        also several samples of each prompt.
        """
        return ()

    @property
    def unused_options(self) -> set[str]:
        """Return the options that have no effect; repr and logged hyperparameters omit them."""
        return set()

    @property
    def inapplicable_laws(self) -> dict[str, str]:
        """Return the laws of :class:`opdlab.testing.ObjectiveTester` that do not apply, each with the reason."""
        return {}

    def setup(self, student: LanguageModel, teacher: Teacher) -> None:
        """Prepare the objective for these two models, once before training; does nothing by default."""
        del student, teacher

    def own_logprobs(self, student: Scored, rollouts: Rollouts, targets: Targets) -> Tensor:
        """Return the student's log-probabilities of the sampled tokens, [B, T] nats, detached.

        They come from the same pass over the head as :meth:`position_losses`, so that both are equal bit for bit.
        """
        del rollouts
        return student.own_logprobs(targets)

    @abstractmethod
    def position_losses(self, student: Scored, rollouts: Rollouts, targets: Targets) -> PositionLosses:
        """Return the loss of every position; all tensors are on the student's device."""

    def __repr__(self) -> str:
        options = {name: value for name, value in vars(self).items() if name[0] != "_"}
        shown = [f"{name}={value!r}" for name, value in options.items() if name not in self.unused_options]
        return f"{type(self).__name__}({', '.join(shown)})"


def loss_shares(mask: Tensor, *, reduction: Reduction, num_tokens: float, num_rollouts: float) -> Tensor:
    """Return the factor of each position's weighted loss in the loss of an optimizer batch.

    ``token_mean``: ``1 / num_tokens``. ``sequence_mean``: ``1 / (rollout length * num_rollouts)``; the paper's code
    base is equivalent to this when run with micro-batches of one rollout.

    Args:
        mask: [B, T] bool, of a micro-batch.
        reduction: see above.
        num_tokens: valid positions in the whole optimizer batch.
        num_rollouts: rollouts with a valid position in the whole optimizer batch.

    Returns:
        [B, T] float32, 0 at masked positions; the sum over all micro-batches is 1.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> loss_shares(mask, reduction="token_mean", num_tokens=4, num_rollouts=2)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.0000]])
        >>> loss_shares(mask, reduction="sequence_mean", num_tokens=4, num_rollouts=2)
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]])
    """
    if reduction == "token_mean":
        return mask.float() / max(num_tokens, 1)
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * max(num_rollouts, 1))


def reduce_losses(losses: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """Return the micro-batch's part of the optimizer batch's loss, ``sum(w * l * share)``.

    Args:
        losses: [B, T].
        weights: [B, T], the gate's.
        shares: [B, T], see :func:`loss_shares`; positions with share 0 are ignored.

    Returns:
        A scalar; the sum over the micro-batches is the optimizer batch's loss.

    Example:
        >>> import torch
        >>> shares = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
        >>> reduce_losses(torch.tensor([[1.0, 3.0], [torch.nan, 0.0]]), torch.ones(2, 2), shares)
        tensor(2.)
    """
    return (weights * losses * shares).masked_fill(shares == 0, 0.0).sum()


_REGISTRY: Registry[Objective] = Registry("objective", Objective, "opdlab.objectives", "opdlab.objectives")  # type: ignore[type-abstract]


def objective_registry() -> Registry[Objective]:
    """Return the registry of objectives, for the command line."""
    return _REGISTRY


register_objective = _REGISTRY.register
"""Class decorator that registers an objective under a name; see :meth:`opdlab.registry.Registry.register`."""


def objective_names() -> list[str]:
    """Return the names of all registered objectives, built-in and installed.

    Example:
        >>> {"sampled_token", "teacher_topk"} <= set(objective_names())
        True
    """
    return _REGISTRY.names()


def build_objective(name: str, **options: Any) -> Objective:
    """Return a new objective by its registered name.

    Args:
        name: see :func:`objective_names`.
        options: keyword arguments of the objective's class.

    Raises:
        UsageError: no such objective (the nearest name is given), or an option is unknown or out of range.

    Example:
        >>> build_objective("teacher_topk", k=8).request.top_k
        8
        >>> build_objective("teacher_topk", size=8)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: objective 'teacher_topk' has no option 'size'; its options: k
    """
    return _REGISTRY.build(name, **options)
