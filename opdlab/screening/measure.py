"""All measurements of a pair, as plain numbers."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from opdlab.policies import LanguageModel
from opdlab.policies.context import ContextLength
from opdlab.progress import Progress, SilentProgress
from opdlab.rollouts.collector import with_teachers
from opdlab.screening.answers import SHARES, Answers, Compared, Lengths, answer, compare, continuations, lengths
from opdlab.screening.gap import Gap, measure_gap, requests
from opdlab.screening.pair import (
    MIN_PROMPTS,
    ConfiguredRun,
    Maybe,
    Missing,
    Pair,
    ScreenConfig,
    Titled,
    ask,
    choose_prompts,
)
from opdlab.screening.probes import (
    Alignment,
    FirstToken,
    measure_alignment,
    measure_first_token,
    measure_padding,
    measure_temperature,
)
from opdlab.screening.texts import (
    Stops,
    Templates,
    Tokens,
    measure_stops,
    measure_templates,
    measure_tokens,
    own_prompts,
)
from opdlab.types import Prompt, Rollouts, Targets

_PROBED = 16  # answers that alignment, temperature and padding are measured on
_GREEDY = 1e-6  # top_p that leaves the most likely token alone
_CONTINUED = 2  # answers of a prompt from which both models go on


@dataclass(frozen=True)
class Speed:
    """Seconds, measured: they differ from one call to the next.

    Args:
        sampled: tokens that the student samples in a second.
        student_scored: response tokens that the student scores in a second, with their prompts.
        teacher_scored: response tokens that the teacher scores in a second, with their prompts.
    """

    sampled: float
    student_scored: float
    teacher_scored: float


@dataclass(frozen=True)
class Measurements:
    """What was measured; :class:`~opdlab.screening.pair.Missing` says why something was not.

    Args:
        tokens: the vocabularies.
        stops: the stop tokens.
        context: tokens of the longest prompt with the longest answer, and positions, by model; or why not.
        padding: see :func:`~opdlab.screening.probes.measure_padding`, nats.
        templates: the prompts.
        first_token: the first token of the student's answers.
        alignment: positions of the teacher's scores.
        temperature: the compared temperature, and the mean difference of the logits.
        gap: differences on the student's answers.
        lengths: of the answers to the training prompts, by model.
        accuracy: of both models, by set of problems.
        prefixes: of both models going on from the student's answers, by share; or why not.
        run: the configured run.
        speed: of sampling and scoring.
    """

    tokens: Tokens
    stops: Maybe[Stops]
    context: Maybe[Mapping[str, tuple[int, int]]]
    padding: Maybe[float]
    templates: Maybe[Templates]
    first_token: Maybe[FirstToken]
    alignment: Maybe[Alignment]
    temperature: Maybe[tuple[float, float]]
    gap: Maybe[Gap]
    lengths: Mapping[str, Lengths]
    accuracy: Mapping[str, Maybe[Compared]]
    prefixes: Maybe[Mapping[str, Compared]]
    run: Maybe[ConfiguredRun]
    speed: Maybe[Speed]


@dataclass
class _Seconds:
    """Seconds of parts of the work, by name."""

    of: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.of[name] = time.perf_counter() - started


def measure(pair: Pair, config: ScreenConfig, progress: Progress | None = None) -> Measurements:
    """Return the measurements of a pair.

    Both models answer some problems of each set; all that compares distributions is measured on the student's answers
    to the training problems.

    Args:
        pair: student, teacher and problems.
        config: options.
        progress: shows progress bars.
    """
    progress, seconds = progress or SilentProgress(), _Seconds()
    model, student = pair.teacher_model(), pair.student
    context = _context(pair, config.max_new_tokens)
    chosen = {
        name: choose_prompts(each.prompts, config.num_prompts, config.seed, name)
        for name, each in pair.problems.items()
    }
    answers, of_teacher = _answers(pair, model, config, chosen, progress)
    own = answers[pair.training]
    rollouts = _as_teacher_sees(pair, own)
    k = min(config.k, student.vocab_size - 1)
    with seconds.timed("teacher"):
        shown = Titled(progress, "the student's answers")
        targets = ask(pair.teacher, rollouts, requests(k, student.vocab_size), shown)
    gap: Maybe[Gap] = (
        Missing(targets.reason) if isinstance(targets, Missing) else _gap(pair, own, targets, config, seconds)
    )
    probed = rollouts.rows(torch.arange(min(_PROBED, len(rollouts))))
    return Measurements(
        tokens=measure_tokens(pair),
        stops=measure_stops(pair),
        context=context or Missing("the models have no context length"),
        padding=measure_padding(pair.teacher, student, probed, student.vocab_size),
        templates=measure_templates(pair, own.prompts),
        first_token=_first_token(pair, own, rollouts, k),
        alignment=_alignment(pair, model, config, own, rollouts, progress),
        temperature=measure_temperature(pair.teacher, probed, k, student.vocab_size),
        gap=gap,
        lengths={
            "student": lengths(own),
            **({} if pair.training not in of_teacher else {"teacher": lengths(of_teacher[pair.training])}),
        },
        accuracy=_accuracy(pair, answers, of_teacher, model),
        prefixes=_prefixes(pair, model, config, answers, progress),
        run=pair.run or Missing("there is no configuration: give one with -c"),
        speed=_speed(own, seconds),
    )


def _context(pair: Pair, new_tokens: int) -> dict[str, tuple[int, int]]:
    """Return the tokens that each model reads at most, and its positions; refuse what one cannot read."""
    found: dict[str, tuple[int, int]] = {}
    contexts: list[tuple[str | None, ContextLength | None]] = [(None, pair.student.context)]
    for teacher, context in [*contexts, *pair.teacher.contexts().items()]:
        if context is None:
            continue
        name = "student" if teacher is None else f"teacher {teacher}".rstrip()
        for key, problems in pair.problems.items():
            facts = problems.facts
            longest = facts.longest if teacher is None else facts.longest_of_teacher(teacher)
            if context.fixed:
                context.check(f"the {name}", longest, "max_new_tokens", new_tokens, key)
            found[name] = (max(longest + new_tokens, found.get(name, (0, 0))[0]), context.tokens)
    return found


def _answers(
    pair: Pair,
    model: Maybe[LanguageModel],
    config: ScreenConfig,
    chosen: Mapping[str, list[Prompt]],
    progress: Progress,
) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """Return the student's and the teacher's answers to the chosen problems, by set."""
    found: tuple[dict[str, Answers], dict[str, Answers]] = ({}, {})
    for name, prompts in chosen.items():
        for number, each in enumerate((pair.student, model)):
            if isinstance(each, Missing):
                continue
            whose = ("student", "teacher")[number]
            found[number][name] = answer(
                *(each, prompts, pair.problems[name].verifier, config.sampling, config.seed, name, whose),
                of_teacher=number > 0,
                progress=Titled(progress, f"{whose}, {name}"),
            )
    return found


def _as_teacher_sees(pair: Pair, answers: Answers) -> Rollouts:
    pad_id = int(pair.student.tokenizer.pad_token_id or 0)
    return with_teachers(answers.rollouts, answers.prompts, pair.teacher.names, pad_id).as_teacher_sees()


def _gap(pair: Pair, answers: Answers, targets: Targets, config: ScreenConfig, seconds: _Seconds) -> Gap:
    with seconds.timed("student"):
        return measure_gap(pair.student, answers.rollouts, targets, config.batch_size)


def _first_token(pair: Pair, answers: Answers, rollouts: Rollouts, k: int) -> Maybe[FirstToken]:
    own, each = own_prompts(pair, answers.prompts), len(rollouts) // len(answers.prompts)
    repeated = None if own is None or isinstance(own, Missing) else [tokens for tokens in own for _ in range(each)]
    shown = replace(
        answers.rollouts, teacher_prompt_tokens=rollouts.prompt_tokens, teacher_prompt_mask=rollouts.prompt_mask
    )
    return measure_first_token(
        pair.teacher, pair.student, replace(shown, teacher_ids=rollouts.teacher_ids), repeated, k
    )


def _alignment(
    pair: Pair,
    model: Maybe[LanguageModel],
    config: ScreenConfig,
    answers: Answers,
    rollouts: Rollouts,
    progress: Progress,
) -> Maybe[Alignment]:
    """Measure on the teacher's own greedy answers, or on the student's if the teacher samples none."""
    k, vocab_size = min(config.k, pair.student.vocab_size - 1), pair.student.vocab_size
    if isinstance(model, Missing):
        return measure_alignment(pair.teacher, rollouts, "student", k, vocab_size)
    sampling = replace(config.sampling, num_samples=1, temperature=1.0, top_p=_GREEDY)
    shown = Titled(progress, "teacher, greedy")
    greedy = answer(
        *(model, answers.prompts[:_PROBED], None, sampling, config.seed, "greedy"), of_teacher=True, progress=shown
    )
    return measure_alignment(pair.teacher, _as_teacher_sees(pair, greedy), "teacher", k, vocab_size)


def _unjudged(pair: Pair, answers: Mapping[str, Answers], name: str) -> Missing | None:
    """Return why answers to a set of problems say nothing of the models; None if they do."""
    if answers[name].correct is None:
        key = "data.train" if name == pair.training else f"data.benchmarks.{name}"
        given = "" if pair.run is None else f" ({key}.verifier)"
        return Missing(f"prompts have no answers, or no verifier is given for them{given}")
    if len(answers[name].prompts) < MIN_PROMPTS:
        return Missing(f"there is one problem only: two models are compared on at least {MIN_PROMPTS}")
    return None


def _accuracy(
    pair: Pair, answers: Mapping[str, Answers], of_teacher: Mapping[str, Answers], model: Maybe[LanguageModel]
) -> dict[str, Maybe[Compared]]:
    found: dict[str, Maybe[Compared]] = {}
    for name, own in answers.items():
        if (reason := _unjudged(pair, answers, name)) is not None:
            found[name] = reason
        elif isinstance(model, Missing):
            found[name] = model
        else:
            other = of_teacher[name].correct
            assert own.correct is not None
            assert other is not None
            found[name] = compare(own.correct, other)
    return found


def _prefixes(
    pair: Pair, model: Maybe[LanguageModel], config: ScreenConfig, answers: Mapping[str, Answers], progress: Progress
) -> Maybe[dict[str, Compared]]:
    """Let both models go on from the student's answers to the first set of problems that can be judged."""
    reasons = {name: _unjudged(pair, answers, name) for name in answers}
    name = next((name for name, reason in reasons.items() if reason is None), None)
    if name is None:
        return reasons[pair.training] or Missing("")
    if isinstance(model, Missing):
        return model
    verifier = pair.problems[name].verifier
    assert verifier is not None
    own = answers[name]
    count = len(own.prompts)
    first = torch.arange(len(own.rollouts)).view(count, -1)[:, :_CONTINUED].flatten()
    begun = replace(own, rollouts=own.rollouts.rows(first))
    return {
        f"{share:.0%}": continuations(
            *((pair.student, model), begun, verifier, config.sampling, share, config.seed, name),
            progress=[Titled(progress, f"{whose} from {share:.0%}") for whose in ("student", "teacher")],
        )
        for share in SHARES
    }


def _speed(answers: Answers, seconds: _Seconds) -> Maybe[Speed]:
    tokens = float(answers.rollouts.mask.sum())
    if "student" not in seconds.of:
        return Missing("the student's answers were not scored")
    return Speed(*(tokens / each for each in (answers.seconds, seconds.of["student"], seconds.of["teacher"])))
