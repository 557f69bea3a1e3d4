"""Probes of how the teacher scores: positions, temperature, padding, and the first token of an answer.

Shapes: B rollouts, P prompt tokens, T response tokens, K support. Log-probabilities are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.policies import LanguageModel, Teacher
from opdlab.screening.gap import requests
from opdlab.screening.pair import Maybe, Missing, ask
from opdlab.types import Rollouts, Targets, TeacherRequest, left_padded

_PADDING = 8  # columns
_BATCH = 32  # rollouts scored at a time
_OTHER_TEMPERATURE = 0.7  # compared with 1 if the run's temperature is 1


@dataclass(frozen=True)
class Alignment:
    """The teacher's mean log-probabilities of answers, as scored and against shifted tokens.

    Args:
        whose: whose answers these are: ``teacher``, greedy ones, or ``student``.
        here: of each token at its own position.
        before: of the token before it there. For tokens outside the support that of all of them together, an upper
            bound.
        after: of the token after it there.
        mismatch: mean absolute difference between the log-probability of a token as such, and that of the same token in
            the support.
    """

    whose: str
    here: float
    before: float
    after: float
    mismatch: float

    @property
    def margin(self) -> float:
        """Return by how much the tokens fit better at their own positions than shifted."""
        return self.here - max(self.before, self.after)


@dataclass(frozen=True)
class FirstToken:
    """The first token of the student's answers, as the teacher sees it; means over answers.

    Args:
        rank: median of its rank among the teacher's most likely tokens, from 1; K + 1 beyond the support.
        logprob: the teacher's.
        student_logprob: the student's.
        own_rank: the rank after the prompt that the teacher's own chat template makes, or None without one.
        own_logprob: the log-probability there, or None.
        support: K.
    """

    rank: float
    logprob: float
    student_logprob: float
    own_rank: float | None
    own_logprob: float | None
    support: int


def measure_alignment(teacher: Teacher, rollouts: Rollouts, whose: str, k: int, vocab_size: int) -> Maybe[Alignment]:
    """Return how the teacher's log-probabilities fit the tokens at their own and at shifted positions.

    Args:
        teacher: scores the rollouts.
        rollouts: answers, with the prompts that the teacher sees.
        whose: ``teacher`` or ``student``.
        k: size of the support.
        vocab_size: of the student.
    """
    # At temperature 1 every kind of teacher knows its probabilities.
    rollouts = replace(rollouts, temperature=1.0)
    targets = ask(teacher, rollouts, requests(k, vocab_size)[:2])
    if isinstance(targets, Missing):
        return targets
    tokens, mask, known = rollouts.tokens, rollouts.mask.bool(), targets.logprobs
    here, inside = _support_logprobs(targets, tokens)
    both = mask[:, 1:] & mask[:, :-1]
    if not bool(both.any()):
        return Missing("no answer has two tokens")
    before, _ = _support_logprobs(targets, tokens.roll(1, 1))
    after, _ = _support_logprobs(targets, tokens.roll(-1, 1))
    certain = inside & mask
    return Alignment(
        whose=whose,
        here=float(here[mask].mean()),
        before=float(before[:, 1:][both].mean()),
        after=float(after[:, :-1][both].mean()),
        mismatch=float((known - here)[certain].abs().mean()) if bool(certain.any()) else 0.0,
    )


def _support_logprobs(targets: Targets, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens from the support, and whether they are in it, [B, T] each."""
    assert targets.support_ids is not None
    assert targets.support_logits is not None
    assert targets.log_normalizer is not None
    assert targets.log_tail is not None
    match = targets.support_ids.long() == tokens[..., None]
    inside = match.any(-1)
    logits = targets.support_logits.masked_fill(~match, 0.0).sum(-1)
    return torch.where(inside, logits, targets.log_tail) - targets.log_normalizer, inside


def measure_temperature(teacher: Teacher, rollouts: Rollouts, k: int, vocab_size: int) -> Maybe[tuple[float, float]]:
    """Return a temperature, and by how much the teacher's logits there, times it, differ from those at 1 in the mean.

    Logits are compared relative to that of the most likely token, since only such differences have a meaning.

    Args:
        teacher: scores the rollouts.
        rollouts: at the run's temperature.
        k: size of the support.
        vocab_size: of the student.
    """
    request = TeacherRequest(top_k=k, vocab_size=vocab_size, logprobs=False)
    other = rollouts.temperature if rollouts.temperature != 1 else _OTHER_TEMPERATURE
    found = []
    for temperature in (1.0, other):
        targets = ask(teacher, replace(rollouts, temperature=temperature), [request])
        if isinstance(targets, Missing):
            return targets
        assert targets.support_ids is not None
        assert targets.support_logits is not None
        logits = targets.support_logits * temperature
        found.append((targets.support_ids.long(), logits - logits[..., :1]))
    (ids, plain), (other_ids, scaled) = found
    same = (ids == other_ids) & rollouts.mask.bool()[..., None]
    return other, float((plain - scaled)[same].abs().mean())


def measure_padding(teacher: Teacher, student: LanguageModel, rollouts: Rollouts, vocab_size: int) -> Maybe[float]:
    """Return the mean change of log-probabilities that more padding before the prompts causes; the larger model's.

    Args:
        teacher: scores the rollouts.
        student: scores them too.
        rollouts: answers, with the prompts that the teacher sees.
        vocab_size: of the student.
    """
    size = len(rollouts), _PADDING
    pad = rollouts.prompt_tokens.new_full(size, int(student.tokenizer.pad_token_id or 0))
    padded = replace(
        rollouts,
        prompt_tokens=torch.cat([pad, rollouts.prompt_tokens], 1),
        prompt_mask=torch.cat([torch.zeros(size, dtype=torch.bool), rollouts.prompt_mask.bool()], 1),
        temperature=1.0,
    )
    plain, mask = replace(rollouts, temperature=1.0), rollouts.mask.bool()
    changes = []
    targets = [ask(teacher, each, [TeacherRequest(vocab_size=vocab_size)]) for each in (plain, padded)]
    for each in targets:
        if isinstance(each, Missing):
            return each
    logprobs = [each.logprobs for each in targets if not isinstance(each, Missing)]
    changes.append((logprobs[0] - logprobs[1])[mask].abs().mean())
    own = [student_logprobs(student, each) for each in (plain, padded)]
    changes.append((own[0] - own[1])[mask].abs().mean())
    return float(torch.stack(changes).max())


@torch.no_grad()
def student_logprobs(student: LanguageModel, rollouts: Rollouts) -> Tensor:
    """Return the student's log-probabilities of responses, [B, T], in host memory."""
    found = torch.zeros(rollouts.mask.shape)
    for rows, scored in student.score_in_chunks(rollouts, _BATCH):
        found[rows] = scored.padded(scored.statistics().logprobs).float().cpu()
    return found


def measure_first_token(
    teacher: Teacher,
    student: LanguageModel,
    rollouts: Rollouts,
    own_prompts: Sequence[Sequence[int]] | None,
    k: int,
) -> Maybe[FirstToken]:
    """Return rank and probability of the first token of the student's answers under the teacher.

    Args:
        teacher: scores it.
        student: scores it after its own prompts.
        rollouts: the student's answers, with teacher prompts if there are any.
        own_prompts: for each rollout the prompt that the teacher's own template makes, or None without one.
        k: size of the support.
    """
    first = replace(
        rollouts,
        **{name: getattr(rollouts, name)[:, :1] for name in ("tokens", "mask", "behavior_logprobs")},
        sampler_logprobs=None,
    )
    found: list[tuple[float, float]] = []
    prompts = [first.as_teacher_sees()]
    if own_prompts is not None:
        tokens, mask = left_padded(own_prompts, int(student.tokenizer.pad_token_id or 0))
        prompts.append(replace(prompts[0], prompt_tokens=tokens, prompt_mask=mask))
    for each in prompts:
        targets = ask(teacher, each, [TeacherRequest(top_k=k, vocab_size=student.vocab_size)])
        if isinstance(targets, Missing):
            return targets
        assert targets.support_ids is not None
        match = targets.support_ids.long()[:, 0] == each.tokens  # [B, K]
        ranks = torch.where(match.any(1), match.float().argmax(1), k) + 1
        found.append((float(ranks.double().median()), float(targets.logprobs[:, 0].mean())))
    logprob = float(student_logprobs(student, first)[:, 0].mean())
    own = found[1] if own_prompts is not None else (None, None)
    rank, of_teacher = found[0]
    return FirstToken(rank, of_teacher, logprob, own[0], own[1], k)
