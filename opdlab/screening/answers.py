"""Sampled answers, judged: those of both models, and how both go on from the beginnings of the student's.

Shapes: P prompts, n samples of each, B = P * n rollouts, T response tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.diagnostics.collapse import repeated_ngrams
from opdlab.metrics.functional import moments, pass_at_k, standard_error, weighted_mean
from opdlab.policies import LanguageModel, SamplingConfig, TransformersSampler, sample_rollouts
from opdlab.policies.context import ContextLength
from opdlab.progress import Progress
from opdlab.seeds import derive_streams
from opdlab.types import Prompt, Rollouts, StopReason
from opdlab.verifiers import Verifier

SHARES = (0.25, 0.5, 0.75)
"""Parts of the student's answers from which both models go on."""


@dataclass(frozen=True)
class Answers:
    """Answers of a model.

    Args:
        prompts: P problems.
        rollouts: B answers, in host memory; those of a prompt in consecutive rows.
        correct: [P, n] bool: verdicts; None without a verifier.
        seconds: time of sampling.
    """

    prompts: Sequence[Prompt]
    rollouts: Rollouts
    correct: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of a model's answers.

    Args:
        mean: tokens.
        truncated: share of answers that reached the allowed number of tokens.
        repeated: share of 4-grams that repeat an earlier one of their answer.
    """

    mean: float
    truncated: float
    repeated: float


@dataclass(frozen=True)
class Compared:
    """Share of correct answers of both models to the same problems.

    Args:
        student: pass@1.
        teacher: pass@1.
        difference: the teacher's less the student's.
        error: its standard error, paired and clustered by problem; NaN for one problem.
        student_any: pass@n.
        teacher_any: pass@n.
        num_samples: n.
        num_problems: P.
    """

    student: float
    teacher: float
    difference: float
    error: float
    student_any: float
    teacher_any: float
    num_samples: int
    num_problems: int


def answer(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    verifier: Verifier | None,
    sampling: SamplingConfig,
    *parts: int | str,
    of_teacher: bool = False,
    progress: Progress,
) -> Answers:
    """Return sampled answers to prompts, with verdicts if there is a verifier.

    Args:
        model: to sample from, at its own device.
        prompts: P prompts.
        verifier: or None.
        sampling: options of the answers.
        *parts: determine the random streams.
        of_teacher: sample after the prompts that the teacher sees.
        progress: shows a progress bar.
    """
    seen = [(prompt.teacher_tokens if of_teacher else None) or prompt.tokens for prompt in prompts]
    started = time.perf_counter()
    rollouts = _sampled(model, prompts, seen, sampling, *parts, progress=progress)
    seconds = time.perf_counter() - started
    correct = None
    if verifier is not None:
        correct = _verdicts(verifier, model.responses(rollouts), prompts, sampling.num_samples)
    return Answers(prompts, rollouts, correct, seconds)


@torch.no_grad()
def _sampled(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    seen: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *parts: int | str,
    progress: Progress,
) -> Rollouts:
    sampler, indices = TransformersSampler(), [prompt.index for prompt in prompts]
    sampler.refresh(model, 0)
    streams = derive_streams("screen", *parts, keys=indices, num_samples=sampling.num_samples)
    return sample_rollouts(sampler, model, seen, streams, sampling, progress=progress, prompt_ids=indices)


def _verdicts(verifier: Verifier, texts: Sequence[str], prompts: Sequence[Prompt], each: int) -> Tensor:
    golds = [prompt.problem.answer or "" for prompt in prompts for _ in range(each)]
    return torch.tensor([verdict.correct for verdict in verifier.verify(texts, golds)]).view(len(prompts), each)


def lengths(answers: Answers) -> Lengths:
    """Return lengths, truncation and repetition of answers."""
    rollouts = answers.rollouts
    repeats, grams = repeated_ngrams(rollouts.tokens, rollouts.mask)
    truncated = (rollouts.stop_reasons == StopReason.LENGTH).float().mean()
    mean = rollouts.num_tokens.float().mean()
    return Lengths(float(mean), float(truncated), float(repeats / grams.clamp(min=1)))


def compare(student: Tensor, teacher: Tensor) -> Compared:
    """Return the accuracies of two models on the same problems.

    Args:
        student: [P, n] bool, verdicts.
        teacher: the same.

    Example:
        >>> right, wrong = torch.tensor([[True, True]]), torch.tensor([[False, False]])
        >>> found = compare(torch.cat([right, wrong, wrong]), torch.cat([right, right, wrong]))
        >>> round(found.student, 3), round(found.teacher, 3), round(found.error, 3)
        (0.333, 0.667, 0.333)
    """
    count, each = student.shape
    difference = teacher.double().mean(1) - student.double().mean(1)
    sums = moments(difference, torch.ones(count))
    whole = [float(pass_at_k(side.sum(1), each, each).mean()) for side in (student, teacher)]
    return Compared(
        student=float(student.double().mean()),
        teacher=float(teacher.double().mean()),
        difference=float(weighted_mean(sums)),
        error=float(standard_error(sums, torch.tensor(count))),
        student_any=whole[0],
        teacher_any=whole[1],
        num_samples=each,
        num_problems=count,
    )


def continuations(
    models: Sequence[LanguageModel],
    answers: Answers,
    verifier: Verifier,
    sampling: SamplingConfig,
    share: float,
    *parts: int | str,
    progress: Sequence[Progress],
) -> Compared:
    """Return how often both models get the right answer when they go on from a part of the student's answers.

    One continuation is sampled of each answer's beginning, with the same random numbers for both models.

    Args:
        models: student and teacher.
        answers: the student's.
        verifier: judges the beginning and the continuation as one text.
        sampling: options of the answers.
        share: of an answer's tokens that is given, above 0 and below 1.
        *parts: determine the random streams.
        progress: a display for each model.
    """
    rollouts, each = answers.rollouts, len(answers.rollouts) // len(answers.prompts)
    kept = (rollouts.num_tokens * share).long().tolist()  # less than all, so that no stop token is among them
    begun = [row[:count] for row, count in zip(rollouts.tokens.tolist(), kept, strict=True)]
    prompts = [prompt for prompt in answers.prompts for _ in range(each)]
    verdicts = []
    for number, model in enumerate(models):
        of_teacher = number > 0
        seen = [
            [*((prompt.teacher_tokens if of_teacher else None) or prompt.tokens), *tokens]
            for prompt, tokens in zip(prompts, begun, strict=True)
        ]
        whole = list(begun)
        for rows, longest in _groups(kept, list(map(len, seen)), sampling.max_new_tokens, model.context):
            one, own = replace(sampling, num_samples=1, max_new_tokens=longest), [prompts[row] for row in rows]
            told = [seen[row] for row in rows]
            ended = _sampled(model, own, told, one, "continued", f"{share}", *parts, progress=progress[number])
            for row, rest, count in zip(rows, ended.tokens.tolist(), ended.num_tokens.tolist(), strict=True):
                # An answer may not become longer than one that is sampled at once.
                whole[row] = [*begun[row], *rest[:count]][: sampling.max_new_tokens]
        texts = model.tokenizer.batch_decode(whole, skip_special_tokens=True)
        verdicts.append(_verdicts(verifier, texts, prompts, 1).view(len(answers.prompts), each))
    return compare(*verdicts)


def _groups(
    kept: Sequence[int], lengths: Sequence[int], new_tokens: int, context: ContextLength | None
) -> Iterator[tuple[list[int], int]]:
    """Yield rows that go on together, and how many tokens they get: all at once, if the model's positions allow it.

    Rows that go on together get as many tokens as the one that needs most.

    Args:
        kept: tokens of an answer that are given, of each row.
        lengths: tokens before a row's continuation.
        new_tokens: most tokens of an answer.
        context: of the model.
    """
    group: list[int] = []
    for row in sorted(range(len(kept)), key=kept.__getitem__):  # the first one of a group needs most
        reach = lengths[row] + new_tokens - kept[group[0]] if group else 0
        if context is not None and context.fixed and reach > context.tokens:
            yield sorted(group), new_tokens - kept[group[0]]
            group = []
        group.append(row)
    yield sorted(group), max(1, new_tokens - kept[group[0]])
