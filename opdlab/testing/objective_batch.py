"""Batches for the tester of objectives: random hidden states and heads, and all that a teacher can be asked for.

Shapes: B rollouts, T response tokens, P prompt tokens, N valid positions, V vocabulary, H and G hidden sizes of student
and teacher, K support.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.policies.language_model import Scored
from opdlab.policies.teacher import Teacher
from opdlab.progress import Progress
from opdlab.scoring import Head
from opdlab.types import Rollouts, Targets, TeacherRequest, id_dtype

_HIDDEN, _TEACHER_HIDDEN, _PROMPT = 8, 6, 3
_TEMPERATURE = 0.8


@dataclass(frozen=True)
class StandInStudent:
    """What :meth:`Objective.setup` receives as the student: a vocabulary and a head, without a model."""

    vocab_size: int
    of_temperature_one: Head

    def head(self, temperature: float = 1.0) -> Head:
        """Return the head."""
        return replace(self.of_temperature_one, temperature=temperature)


class StandInTeacher(Teacher):
    """A teacher that is only a head; the targets of a batch come from its hidden states, see :func:`make_batch`."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self.vocab_size = len(head.weight)

    def head(self, temperature: float = 1.0) -> Head:
        """Return the head."""
        return replace(self._head, temperature=temperature)

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Raise a UsageError."""
        raise UsageError("ObjectiveTester gives targets to position_losses: do not call the teacher's score")


@dataclass(frozen=True)
class States:
    """Hidden states and heads from which a batch is made, float64 in full, [B, T, …].

    Args:
        mask: [B, T] bool.
        tokens: [B, T] long.
        student: [B, T, H].
        behavior: [B, T, H], of the snapshot, which has the student's head.
        teacher: [B, T, G].
        weight: [V, H], the student's head.
        teacher_weight: [V, G].
        prompt_ids: [B] long: two prompts with several rollouts each.
        correct: [B] int8, verdicts.
        group_accuracy: [B], see :class:`opdlab.types.Rollouts`.
        group_size: [B] long.
        width: P.
    """

    mask: Tensor
    tokens: Tensor
    student: Tensor
    behavior: Tensor
    teacher: Tensor
    weight: Tensor
    teacher_weight: Tensor
    prompt_ids: Tensor
    correct: Tensor
    group_accuracy: Tensor
    group_size: Tensor
    width: int = _PROMPT

    @staticmethod
    def random(num_tokens: int, vocab_size: int, seed: int) -> "States":
        """Return states of five rollouts: full, short, with holes in the mask, of one token, and empty."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (5, num_tokens)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[1, num_tokens // 2 :] = False
        mask[2, ::3] = False
        mask[3, 1:] = False
        mask[4] = False
        student = normal(*shape, _HIDDEN)
        return States(
            mask=mask,
            tokens=torch.randint(vocab_size, shape, generator=generator).masked_fill(~mask, 0),
            student=student,
            behavior=student + 0.2 * normal(*shape, _HIDDEN),
            teacher=normal(*shape, _TEACHER_HIDDEN),
            weight=normal(vocab_size, _HIDDEN) / 2,
            teacher_weight=normal(vocab_size, _TEACHER_HIDDEN) / 2,
            prompt_ids=torch.tensor([4, 4, 4, 9, 9]),
            correct=torch.tensor([1, 0, 0, 1, 0], dtype=torch.int8),
            group_accuracy=torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]),
            group_size=torch.tensor([3, 3, 3, 2, 2]),
        )

    def equal(self) -> "States":
        """Return states in which student, snapshot and teacher are the same."""
        return replace(self, behavior=self.student, teacher=self.student, teacher_weight=self.weight)

    def scaled(self, factor: float) -> "States":
        """Return states whose logits are ``factor`` times as large."""
        changed = {name: factor * getattr(self, name) for name in ("student", "behavior", "teacher")}
        return replace(self, **changed)

    def rows(self, index: Tensor) -> "States":
        """Return the selected rollouts."""
        shared = ("weight", "teacher_weight", "width")
        changed = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in shared}
        return replace(self, **changed)

    def padded(self, columns: int) -> "States":
        """Return states with more columns of padding, right of responses and left of prompts."""
        pad = torch.nn.functional.pad
        flat = {name: pad(getattr(self, name), (0, columns)) for name in ("mask", "tokens")}
        deep = {name: pad(getattr(self, name), (0, 0, 0, columns)) for name in ("student", "behavior", "teacher")}
        return replace(self, **flat, **deep, width=self.width + columns)

    def first_token(self) -> "States":
        """Return the states of the first position of each response."""
        changed: dict[str, Any] = {
            name: getattr(self, name)[:, :1] for name in ("mask", "tokens", "student", "behavior", "teacher")
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch:
    """A scored batch with targets.

    Args:
        scored: the student's scores; hidden states [N, H] and the head's weight take a gradient.
        rollouts: with the optional fields that the objective needs.
        targets: with the fields that the objective requests.
        student: for :meth:`Objective.setup`.
        teacher: for :meth:`Objective.setup`.
        reference: the student's log-probabilities over the vocabulary, [N, V] float64.
    """

    scored: Scored
    rollouts: Rollouts
    targets: Targets
    student: Any
    teacher: StandInTeacher
    reference: Tensor


def make_batch(states: States, request: TeacherRequest, needs: tuple[str, ...], dtype: torch.dtype) -> Batch:
    """Return the batch of hidden states, with what an objective asks for and nothing else.

    Args:
        states: see :class:`States`.
        request: the objective's.
        needs: the objective's.
        dtype: of all floating-point tensors.
    """
    mask, tokens, rows = states.mask, states.tokens, len(states.mask)
    weight = states.weight.to(dtype).requires_grad_()
    head = Head(weight, temperature=_TEMPERATURE)
    scored = Scored.of(states.student[mask].to(dtype).requires_grad_(), head, mask, tokens[mask])
    logprobs = [
        (hidden @ matrix.T / _TEMPERATURE).log_softmax(-1)
        for hidden, matrix in (
            (states.student, states.weight),
            (states.behavior, states.weight),
            (states.teacher, states.teacher_weight),
        )
    ]
    student, behavior, teacher = logprobs  # [B, T, V] each

    def sampled(of: Tensor) -> Tensor:
        return of.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0).to(dtype)

    zeros = torch.zeros(rows, dtype=torch.long)
    judged: dict[str, Any] = {}
    if {"correct", "group_accuracy", "group_size"} & set(needs):
        judged = {name: getattr(states, name) for name in ("correct", "group_accuracy", "group_size")}
    k = request.behavior_top_k
    top = behavior.topk(k).indices.masked_fill(~mask.unsqueeze(-1), 0).to(id_dtype(len(states.weight))) if k else None
    rollouts = Rollouts(
        prompt_tokens=torch.zeros(rows, states.width, dtype=torch.long),
        prompt_mask=(torch.arange(states.width) >= states.width - 2).expand(rows, states.width),
        tokens=tokens,
        mask=mask,
        behavior_logprobs=sampled(behavior),
        stop_reasons=zeros,
        rollout_ids=torch.arange(rows),
        prompt_ids=states.prompt_ids,
        sampled_at_step=zeros,
        snapshot_step=zeros,
        temperature=_TEMPERATURE,
        behavior_support_ids=top,
        **judged,
    )
    # Raw logits rather than log-probabilities, so that an objective that takes one for the other is found out.
    logits = states.teacher @ states.teacher_weight.T / _TEMPERATURE
    targets = make_targets(request, logits, teacher, rollouts, sampled(teacher), states.teacher, dtype)
    return Batch(
        scored,
        rollouts,
        targets,
        StandInStudent(len(states.weight), Head(weight)),
        StandInTeacher(Head(states.teacher_weight.to(dtype))),
        student[mask],
    )


def make_targets(
    request: TeacherRequest,
    logits: Tensor,
    log_q: Tensor,
    rollouts: Rollouts,
    sampled: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
) -> Targets:
    """Return the targets that a request asks for.

    Args:
        request: the objective's.
        logits: [B, T, V], the teacher's.
        log_q: [B, T, V], their log-softmax.
        rollouts: for the mask, and the ids of the snapshot's support.
        sampled: [B, T], the teacher's log-probabilities of the sampled tokens.
        hidden: [B, T, G], the teacher's.
        dtype: of the floating-point targets.
    """
    blank = ~rollouts.mask.unsqueeze(-1)  # [B, T, 1]
    made: dict[str, Tensor] = {}
    ids = logits.topk(request.top_k).indices
    if request.behavior_top_k:
        assert rollouts.behavior_support_ids is not None
        of_behavior = rollouts.behavior_support_ids.long()
        again = (of_behavior.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1)
        if request.top_k:
            made["support_valid"] = torch.cat([torch.ones_like(ids, dtype=torch.bool), ~again], -1) & ~blank
        ids = torch.cat([ids, of_behavior], -1)
    if ids.shape[-1]:
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
        made["support_ids"] = ids.masked_fill(blank, 0).to(id_dtype(logits.shape[-1]))
        made["support_logits"] = logits.gather(-1, ids)
        made["support_mass"] = 1 - (log_q.exp() * outside).sum(-1)
        if request.tail:
            made["log_tail"] = logits.masked_fill(~outside, -torch.inf).logsumexp(-1)
    if request.tail:
        made["log_normalizer"] = logits.logsumexp(-1)
    if request.entropy:
        made["entropy"] = -(log_q.exp() * log_q).sum(-1)
    if request.hidden:
        made["hidden"] = hidden
    for name, value in made.items():
        if value.is_floating_point():
            made[name] = value.masked_fill(blank if value.dim() == 3 else blank.squeeze(-1), 0.0).to(dtype)
    return Targets(sampled, **made)


_FIELDS = frozenset(f.name for f in fields(Targets))


class WatchedTargets(Targets):
    """Targets that record the names of the fields that are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in _FIELDS:
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)

    @staticmethod
    def of(targets: Targets) -> "WatchedTargets":
        """Return the same targets, of which nothing is read yet."""
        watched = WatchedTargets(**targets.state_dict())
        watched.__dict__["_read"] = set()
        return watched

    @property
    def read(self) -> set[str]:
        """Return the names of the fields that were read."""
        names: set[str] = self.__dict__["_read"]
        return set(names)


def requested(request: TeacherRequest) -> Mapping[str, frozenset[str]]:
    """Return the fields of the targets that each part of a request asks for, by the part's name.

    Example:
        >>> sorted(requested(TeacherRequest(entropy=True)))
        ['entropy', 'logprobs']
    """
    support = frozenset({"support_ids", "support_logits", "support_mass", "support_valid"})
    parts = {
        "logprobs": (True, frozenset({"logprobs"})),
        "top_k": (bool(request.top_k), support),
        "behavior_top_k": (bool(request.behavior_top_k), support),
        "tail": (request.tail, frozenset({"log_normalizer", "log_tail"})),
        "entropy": (request.entropy, frozenset({"entropy"})),
        "hidden": (request.hidden, frozenset({"hidden"})),
    }
    return {name: names for name, (wanted, names) in parts.items() if wanted}
