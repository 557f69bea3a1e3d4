"""The teacher's targets that another objective needs of a recorded step.

A record holds the targets of the run's own objective. Another objective takes what it needs from them: hidden states,
from which the teacher's head computes any support; or a part of the recorded supports. What is missing the teacher
computes again, unless its weights have changed since, or the steps come from a file without a teacher.

Shapes: B rollouts, T response tokens, K support.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies import LanguageModel, Scored, Teacher, check_targets
from opdlab.policies.teacher import targets_of
from opdlab.progress import Progress
from opdlab.replay.record import RecordedBatch
from opdlab.scoring import Head
from opdlab.scoring.tail import first_occurrences
from opdlab.types import Rollouts, Targets, TeacherRequest


class MissingTargetsError(Exception):
    """Error for targets that neither the record has nor the teacher can compute; its text follows "which"."""


class RecordedTeacher(Teacher):
    """A teacher of which only recorded targets are left, and its head if they are hidden states.

    Args:
        vocab_size: the teacher's.
        names: see :attr:`Teacher.names`.
        head: the teacher's, at temperature 1; or None.
    """

    def __init__(self, vocab_size: int, names: tuple[str, ...] = (), head: Head | None = None) -> None:
        self.vocab_size, self.names, self._head = vocab_size, names, head
        self.has_entropy = False
        """True if the run's own gate or objective asks for the teacher's entropy, so that all records have it."""

    def bind(self, student: LanguageModel) -> None:
        """Take the student's tokenizer, with which the teacher's was compared when the run started."""
        self.tokenizer, self.stop_tokens = student.tokenizer, student.stop_tokens

    def to(self, device: torch.device) -> None:
        """Move the head."""
        self._head = None if self._head is None else self._head.on(device)

    def head(self, temperature: float = 1.0) -> Head:
        """Return the frozen head; see :meth:`Teacher.head`."""
        if self._head is None:
            raise UsageError("the file has neither the teacher's hidden states nor its head")
        return replace(self._head, temperature=temperature)

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        """Raise a UsageError for the entropy, unless it is recorded: else it is unknown."""
        del temperature
        require(not request.entropy or self.has_entropy, "the steps come from a file without a teacher")

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Raise a UsageError: nothing can be scored."""
        raise UsageError("the steps come from a file without a teacher")


def with_targets(teacher: Teacher, batch: RecordedBatch, request: TeacherRequest) -> RecordedBatch:
    """Return a recorded micro-batch with the targets of a request.

    Args:
        teacher: computes what the record lacks.
        batch: as recorded.
        request: of the objective.

    Raises:
        MissingTargetsError: the record lacks the snapshot's most likely tokens, or other targets that the teacher
            cannot compute.
    """
    if (reason := unserved(batch, request, teacher)) is not None:
        raise MissingTargetsError(reason)
    if request.entropy:
        batch = with_entropy(teacher, batch, request.vocab_size)
    rollouts, targets = batch.rollouts, narrowed(batch.rollouts, batch.targets, request)
    ids = rollouts.behavior_support_ids
    # Those of the request alone: a gate would find the probability of these tokens in the support.
    given = ids[..., : request.behavior_top_k] if ids is not None and request.behavior_top_k else None
    rollouts = replace(rollouts, behavior_support_ids=given)
    if targets is None and batch.targets.hidden is not None:
        targets = _from_hidden(teacher, rollouts, batch.targets, request)
    if targets is None:
        targets = teacher.score(rollouts, request)
        check_targets(teacher, request, targets)
    return replace(batch, rollouts=rollouts, targets=targets)


def with_entropy(teacher: Teacher, batch: RecordedBatch, vocab_size: int | None) -> RecordedBatch:
    """Return a recorded micro-batch with the teacher's entropy, which it computes if the record lacks it."""
    if batch.targets.entropy is not None:
        return batch
    request = TeacherRequest(entropy=True, vocab_size=vocab_size)
    if batch.targets.hidden is not None:
        found = _from_hidden(teacher, batch.rollouts, batch.targets, request)
    else:
        found = teacher.score(batch.rollouts, request)
    return replace(batch, targets=replace(batch.targets, entropy=found.entropy))


def gives_entropy(teacher: Teacher, temperature: float) -> bool:
    """Return True if a teacher can compute its entropy; a server's protocol may not have it."""
    try:
        teacher.check_request(TeacherRequest(entropy=True), temperature)
    except UsageError:
        return False
    return True


def unserved(batch: RecordedBatch, request: TeacherRequest, teacher: Teacher | None) -> str | None:
    """Return why neither the record nor the teacher has what a request asks for; None if one of them has it.

    Args:
        batch: as recorded.
        request: of an objective.
        teacher: of the replay; None for one that is frozen and not loaded yet.
    """
    ids, missing = batch.rollouts.behavior_support_ids, ""
    if request.behavior_top_k > (0 if ids is None else ids.shape[-1]):
        missing = f"the snapshot's {request.behavior_top_k} most likely tokens"
    elif teacher is not None and (isinstance(teacher, RecordedTeacher) or teacher.follows_student):
        targets = batch.targets
        if request.hidden and targets.hidden is None:
            missing = "the teacher's hidden states"
        elif request.entropy and targets.entropy is None and targets.hidden is None:
            missing = "the teacher's entropy"
        elif targets.hidden is None and narrowed(batch.rollouts, targets, request) is None:
            missing = f"the teacher's {request.top_k} most likely tokens" if request.top_k else "the teacher's logits"
            missing += " with the mass of all others" if request.tail else ""
    if not missing:
        return None
    changed = teacher is not None and teacher.follows_student
    return f"needs {missing}, but the record has {recorded(batch)}" + (
        ", and the teacher has changed since" if changed else ""
    )


def recorded(batch: RecordedBatch) -> str:
    """Return in words what a record has of the teacher's distribution."""
    targets = batch.targets
    num_given, num_top = _num_columns(batch.rollouts, targets)
    parts = ["the teacher's hidden states"] if targets.hidden is not None else []
    parts += [f"the teacher's {num_top} most likely tokens"] if num_top else []
    parts += [f"the snapshot's {num_given}" + ("" if num_top else " most likely tokens")] if num_given else []
    if not parts:
        return "the sampled tokens' log-probabilities alone"
    tail = f" with{'out' if targets.log_tail is None else ''} the mass of all others"
    return " and ".join(parts) + (tail if num_top + num_given else "")


def _num_columns(rollouts: Rollouts, targets: Targets) -> tuple[int, int]:
    """Return how many tokens of a support are the snapshot's, which come last, and how many the teacher's."""
    ids, given = targets.support_ids, rollouts.behavior_support_ids
    if ids is None:
        return 0, 0
    num_given = 0 if given is None else given.shape[-1]
    return num_given, ids.shape[-1] - num_given


def narrowed(rollouts: Rollouts, targets: Targets, request: TeacherRequest) -> Targets | None:
    """Return what a request needs of recorded targets, or None if they do not have all of it.

    The first k of K most likely tokens are the k most likely ones; the others join the tail. The overlap of
    supports, of which a buffer measures a sample when it is collected, is left out.

    Args:
        rollouts: of the targets, as recorded.
        targets: as recorded.
        request: of the objective; whether the targets have the entropy is not looked at.

    Example:
        >>> zeros, mask = torch.zeros(1).long(), torch.tensor([[True]])
        >>> rollouts = Rollouts(*2 * (torch.tensor([[7]]), mask), torch.tensor([[-0.5]]), *5 * (zeros,))
        >>> logits = torch.tensor([[[2.0, 1.0, 0.0]]])
        >>> recorded = Targets(torch.zeros(1, 1), torch.tensor([[[7, 4, 5]]]), logits, torch.ones(1, 1))
        >>> found = narrowed(rollouts, recorded, TeacherRequest(top_k=2))
        >>> found.support_ids, found.support_mass
        (tensor([[[7, 4]]]), tensor([[0.9100]]))
    """
    lacks = [request.tail and targets.log_normalizer is None, request.hidden and targets.hidden is None]
    if any(lacks) or (request.logprobs and targets.known_logprobs is None):
        return None
    targets = replace(targets, hidden=targets.hidden if request.hidden else None)
    num_top, num_given = request.top_k, request.behavior_top_k
    plain = Targets(
        targets.logprobs, entropy=targets.entropy, log_normalizer=targets.log_normalizer, hidden=targets.hidden
    )
    if not num_top + num_given:
        return plain
    has_given, has_top = _num_columns(rollouts, targets)
    ids, logits, mass = targets.support_ids, targets.support_logits, targets.support_mass
    if num_top > has_top or num_given > has_given or ids is None or logits is None:
        return None
    if request.tail and targets.log_tail is None:
        return None

    def chosen(values: Tensor) -> Tensor:
        return torch.cat([values[..., :num_top], values[..., has_top : has_top + num_given]], dim=-1)

    every, kept = ids.int(), chosen(ids.int())
    is_first = torch.ones_like(every).bool() if targets.support_valid is None else targets.support_valid
    valid = first_occurrences(kept.flatten(0, 1)).view(kept.shape)
    inside = chosen(logits).masked_fill(~valid, -torch.inf).logsumexp(-1)
    share = (inside - logits.masked_fill(~is_first, -torch.inf).logsumexp(-1)).exp()
    log_tail = targets.log_tail if request.tail else None
    if log_tail is not None and kept.shape[-1] < every.shape[-1]:
        outside = is_first & ~(every[..., None] == kept[..., None, :]).any(-1)
        log_tail = torch.logaddexp(log_tail, logits.masked_fill(~outside, -torch.inf).logsumexp(-1))
    return replace(
        plain,
        support_ids=kept.to(ids.dtype),
        support_logits=chosen(logits),
        support_mass=None if mass is None else mass * share,
        support_valid=valid if num_top and num_given else None,
        log_tail=log_tail,
    )


def _from_hidden(teacher: Teacher, rollouts: Rollouts, targets: Targets, request: TeacherRequest) -> Targets:
    """Return the targets of a request from recorded hidden states, with the recorded log-probabilities."""
    assert targets.hidden is not None
    head, mask = teacher.head(rollouts.temperature), rollouts.mask.bool()
    device = head.weight.device
    scored = Scored.of(targets.hidden[mask].to(device), head, mask.to(device), rollouts.tokens[mask].to(device))
    vocab_size = min(teacher.vocab_size, request.vocab_size or teacher.vocab_size)
    found = targets_of([(torch.arange(len(rollouts)), scored)], rollouts, replace(request, hidden=False), vocab_size)
    entropy = found.entropy if targets.entropy is None else targets.entropy
    hidden = targets.hidden if request.hidden else None
    return replace(found, logprobs=targets.logprobs, entropy=entropy, hidden=hidden, support_overlap=None)
