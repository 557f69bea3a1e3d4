"""What student and teacher know of text: tokens, stop tokens, padding, chat templates, thinking markers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opdlab.data.templates import ChatTemplate, RawTemplate, Template
from opdlab.errors import UsageError, first_line
from opdlab.policies import Teacher
from opdlab.screening.pair import Maybe, Missing, Pair
from opdlab.types import Message, Prompt

_MARKER = re.compile(r"</?[\w|]*(?:think|thought|reason)[\w|]*>", re.IGNORECASE)
_SHOWN = 60  # characters of a prompt


@dataclass(frozen=True)
class Stops:
    """The tokens that end an answer.

    Args:
        student: texts of the student's.
        teacher: texts of the teacher's.
        unheard: texts of the teacher's at which the student does not stop.
        unlike: texts of the student's at which the teacher does not stop, and of those that a tokenizer has but its
            generation config leaves out.
    """

    student: Sequence[str]
    teacher: Sequence[str]
    unheard: Sequence[str]
    unlike: Sequence[str]


@dataclass(frozen=True)
class Tokens:
    """The vocabularies.

    Args:
        student: number of tokens of the student's tokenizer.
        shared: tokens that both models can give.
        unknown: share of the training prompts with characters that the tokenizer does not know.
        padding: text of the padding token.
    """

    student: int
    shared: int
    unknown: float
    padding: str


@dataclass(frozen=True)
class Templates:
    """The run's prompts, beside those of the teacher's own chat template.

    Args:
        student: True if the student's tokenizer has a chat template.
        teacher: True if the teacher's has one.
        differing: share of the prompts that the teacher's own template makes differently; None without one.
        run_end: the end of a prompt of the run.
        own_end: the end of the same problem's prompt by the teacher's own template, or None.
        run_markers: thinking markers at the end of the run's prompt.
        own_markers: those at the end of the teacher's own.
    """

    student: bool
    teacher: bool
    differing: float | None
    run_end: str
    own_end: str | None
    run_markers: Sequence[str]
    own_markers: Sequence[str]


def measure_tokens(pair: Pair) -> Tokens:
    """Return the sizes of the vocabularies, and how many training prompts have unknown characters."""
    tokenizer, problems = pair.student.tokenizer, pair.problems[pair.training]
    unknown = sum(each.count for each in problems.unknown if each.kind != "demonstrations")
    return Tokens(
        student=len(tokenizer.get_vocab()),
        shared=pair.student.vocab_size,
        unknown=min(1.0, unknown / len(problems)),
        padding=str(tokenizer.pad_token),
    )


def measure_stops(pair: Pair) -> Maybe[Stops]:
    """Return the stop tokens of both models."""
    ours, theirs = pair.student.stop_tokens, pair.teacher.stop_tokens
    if theirs is None:
        return Missing(f"{type(pair.teacher).__name__} does not tell its stop tokens")
    left_out = {index for side in (ours, theirs) if side.configured for index in side.of_tokenizer - side.configured}

    def texts(ids: "frozenset[int] | set[int]") -> list[str]:
        return [str(pair.student.tokenizer.convert_ids_to_tokens(index)) for index in sorted(ids)]

    return Stops(
        texts(ours.ids), texts(theirs.ids), texts(theirs.ids - ours.ids), texts((ours.ids - theirs.ids) | left_out)
    )


def knows_templates(teacher: Teacher, student: PreTrainedTokenizerBase) -> bool:
    """True if the teacher's tokenizer is its own: a served teacher gets token ids, and has the student's tokenizer."""
    return teacher.tokenizer is not student or bool(teacher.local_models())


def own_prompts(pair: Pair, prompts: Sequence[Prompt]) -> Maybe[list[list[int]] | None]:
    """Return the prompts that the teacher's own chat template makes; None if its tokenizer has none.

    Options of the run's template stay: a system message, thinking, and the text before or behind a problem.

    Args:
        pair: the pair.
        prompts: of the training problems.
    """
    tokenizer = pair.teacher.tokenizer
    if not knows_templates(pair.teacher, pair.student.tokenizer):
        return Missing(f"{type(pair.teacher).__name__} gets tokens, and its own chat template is not known here")
    if not tokenizer.chat_template:
        return None
    template = pair.template
    prefix, suffix = (template.prefix, template.suffix) if isinstance(template, RawTemplate) else ("", "")
    chats = [
        prompt.problem.messages or (Message("user", f"{prefix}{prompt.problem.text}{suffix}"),) for prompt in prompts
    ]
    try:
        return _chat(template).tokenize_chats(chats, tokenizer)
    except UsageError as error:
        return Missing(f"the teacher's chat template fails: {first_line(error)}")


def _chat(template: Template) -> ChatTemplate:
    return template if isinstance(template, ChatTemplate) else ChatTemplate()


def measure_templates(pair: Pair, prompts: Sequence[Prompt]) -> Maybe[Templates]:
    """Return how the run's prompts differ from those that the teacher's own chat template makes.

    Args:
        pair: the pair.
        prompts: some training prompts, at least one.
    """
    own = own_prompts(pair, prompts)
    if isinstance(own, Missing):
        return own
    seen = [prompt.teacher_tokens or prompt.tokens for prompt in prompts]
    differing = None
    if own is not None:
        unequal = [tuple(given) != tuple(made) for given, made in zip(seen, own, strict=True)]
        differing = sum(unequal) / len(prompts)
    text = (prompts[0].problem.messages or (Message("user", prompts[0].problem.text),))[-1].content.strip()
    run_end = _end(pair.student.tokenizer, seen[0], text)
    own_end = None if own is None else _end(pair.teacher.tokenizer, own[0], text)
    return Templates(
        student=bool(pair.student.tokenizer.chat_template),
        teacher=own is not None,
        differing=differing,
        run_end=run_end[-_SHOWN:],
        own_end=None if own_end is None else own_end[-_SHOWN:],
        run_markers=_MARKER.findall(run_end),
        own_markers=_MARKER.findall(own_end or ""),
    )


def _end(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str) -> str:
    """Return what follows the text of a problem in its prompt; the whole prompt if the text is not found."""
    return str(tokenizer.decode(list(tokens))).rpartition(text)[2]
