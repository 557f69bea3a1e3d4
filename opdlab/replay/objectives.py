"""Other objectives on a recorded step, and the teacher's targets that they need.

A record holds the targets of the run's own objective. Another objective takes what it needs from them: hidden states as
they are, or the first of a larger number of the teacher's most likely tokens. What is missing the teacher computes
again, unless its weights have changed since.

Shapes: B rollouts, T response tokens, K support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.objectives import Objective, objective_registry
from opdlab.policies import Teacher
from opdlab.replay.record import RecordedBatch
from opdlab.replay.variants import plugin_class
from opdlab.types import Rollouts, Targets, TeacherRequest


class MissingTargetsError(Exception):
    """Error for targets that neither the record has nor the teacher can compute; its text follows "which"."""


@dataclass(frozen=True)
class NamedObjective:
    """An objective under which steps are replayed.

    Args:
        name: registered name, or that of the class.
        objective: with its options.
    """

    name: str
    objective: Objective


def objective_class(name: str) -> type[Objective]:
    """Return the objective class of a registered name or class path; see :func:`plugin_class`."""
    return plugin_class("--objectives", name, objective_registry(), Objective)  # type: ignore[type-abstract]


def chosen_objectives(names: Sequence[str], own: Objective) -> list[NamedObjective]:
    """Return the run's own objective, and then the others; one of its class is the run's own, with its options.

    Args:
        names: registered names or class paths. Other classes have their default options.
        own: the run's.
    """
    registry = objective_registry()
    found = [NamedObjective(registry.name_of(type(own)) or type(own).__name__, own)]
    for name in names:
        cls = objective_class(name)
        if cls is not type(own):
            found.append(NamedObjective(name.rpartition(".")[2], cls()))
    return found


def with_targets(teacher: Teacher, batch: RecordedBatch, request: TeacherRequest) -> RecordedBatch:
    """Return a recorded micro-batch with the targets of a request.

    Args:
        teacher: computes what the record lacks.
        batch: as recorded.
        request: of the objective.

    Raises:
        MissingTargetsError: the record lacks the snapshot's most likely tokens, or the teacher has changed.
    """
    rollouts = batch.rollouts
    if request.behavior_top_k:
        ids = rollouts.behavior_support_ids
        if ids is None or ids.shape[-1] < request.behavior_top_k:
            raise MissingTargetsError(
                f"needs the snapshot's {request.behavior_top_k} most likely tokens, which the record does not have"
            )
        rollouts = replace(rollouts, behavior_support_ids=ids[..., : request.behavior_top_k])
    targets = narrowed(rollouts, batch.targets, request)
    if targets is None:
        if teacher.follows_student:
            raise MissingTargetsError("needs targets that the record does not have, and the teacher has changed since")
        targets = teacher.score(rollouts, request)
    return replace(batch, rollouts=rollouts, targets=targets)


def narrowed(rollouts: Rollouts | None, targets: Targets, request: TeacherRequest) -> Targets | None:
    """Return what a request needs of recorded targets, or None if they do not have all of it.

    The first k of K most likely tokens are the k most likely ones; the others join the tail.

    Args:
        rollouts: of the targets; None if the snapshot's most likely tokens are not recorded.
        targets: as recorded.
        request: of the objective.

    Example:
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0]]])
        >>> recorded = Targets(torch.zeros(1, 1), torch.tensor([[[7, 4, 5]]]), logits, torch.ones(1, 1))
        >>> found = narrowed(None, recorded, TeacherRequest(top_k=2))
        >>> found.support_ids, found.support_mass
        (tensor([[[7, 4]]]), tensor([[0.9100]]))
    """
    ids, logits, mass = targets.support_ids, targets.support_logits, targets.support_mass
    lacks = [request.tail and targets.log_normalizer is None, request.hidden and targets.hidden is None]
    lacks += [request.entropy and targets.entropy is None, request.behavior_top_k > 0]
    lacks.append(request.logprobs and targets.known_logprobs is None)
    if any(lacks):
        return None
    if not request.top_k:
        return replace(targets, support_ids=None, support_logits=None, support_mass=None, support_valid=None)
    of_both = rollouts is not None and rollouts.behavior_support_ids is not None
    if of_both or ids is None or logits is None or ids.shape[-1] < request.top_k:
        return None
    if request.tail and targets.log_tail is None:
        return None
    kept, rest = logits[..., : request.top_k], logits[..., request.top_k :]
    share = (kept.logsumexp(-1) - logits.logsumexp(-1)).exp()
    return replace(
        targets,
        support_ids=ids[..., : request.top_k],
        support_logits=kept,
        support_mass=None if mass is None else mass * share,
        log_tail=_joined(targets.log_tail, rest),
    )


def _joined(log_tail: Tensor | None, rest: Tensor) -> Tensor | None:
    """Return the logarithm of the tail's sum with more logits."""
    if log_tail is None or not rest.shape[-1]:
        return log_tail
    return torch.logaddexp(log_tail, rest.logsumexp(-1))
