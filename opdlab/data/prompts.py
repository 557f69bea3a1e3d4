"""Sources of problems, and their tokenized prompts."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from typing import Literal

from transformers import PreTrainedTokenizerBase

from opdlab.data.facts import PromptFacts
from opdlab.data.stores import OnDemand, ProblemStore, SpooledStore, chunks, stored
from opdlab.data.templates import DefaultTemplate, Template
from opdlab.data.unknown import UnknownText, UnknownTexts
from opdlab.errors import UsageError, require
from opdlab.types import Message, Problem, Prompt
from opdlab.verifiers.verifier import Verifier


class ProblemSource(ABC):
    """Source of problems, with the templates of their prompts and the verifier of their answers.

    Args:
        template: turns a problem into a prompt; by default that of :meth:`default_template`, or the data module's.
        verifier: checks answers; None without gold answers.
        teacher_template: turns a problem into the prompt that the teacher sees, in training; None if it is
            ``template``. Either way the teacher's prompt is made of :attr:`Problem.teacher_text` if there is one.
    """

    def __init__(
        self,
        template: Template | None = None,
        verifier: Verifier | None = None,
        teacher_template: Template | None = None,
    ) -> None:
        self.has_own_template = template is not None
        self.template: Template = template or self.default_template()
        self.verifier, self.teacher_template = verifier, teacher_template
        self.problem_field: str | None = None
        """Field of the problems, for messages; None for a source without fields."""
        self.demonstration_field: str | None = None
        """Field of the demonstrations, which the data module sets; a source without fields ignores it."""
        self.window: int | None = None
        """Prompts that are read and shuffled together, of a source that is read while training goes on; else None."""

    def default_template(self) -> Template:
        """Return the template of a source that is given none."""
        return DefaultTemplate()

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """Return the problems, read or generated, the same ones in the same order at each call.

        Sources that read files read them lazily, during iteration.
        """

    def store(self) -> ProblemStore:
        """Return the problems such that each can be read again by a key.

        A source whose :meth:`problems` are a list keeps that list. Of other sources the problems are copied to a
        temporary file; a source that can find a row again should override this.
        """
        problems = self.problems()
        return stored(problems) if isinstance(problems, Sequence) else SpooledStore(self.problems)

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name used in messages: a path, a data set's name."""

    def places(self) -> Iterator[tuple[str, Problem]]:
        """Yield the problems with the places of their rows, for messages, such as ``row 3``."""
        return ((f"row {number}", problem) for number, problem in enumerate(self.problems(), 1))

    def place(self, problem: Problem) -> str:
        """Return the place of a problem, for a message; the source is read again."""
        return next((place for place, each in self.places() if each == problem), "a row")


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts of a source, and the number of dropped ones.

    Args:
        prompts: prompts in the order of the source.
        num_too_long: number of problems dropped because their prompt has more tokens than allowed.
        verifier: verifier of the source.
        num_teacher_too_long: number of other problems dropped because the teacher's prompt has too many tokens.
        unknown: texts of the prompts with characters that the tokenizer does not know.
        facts: of all prompts.
    """

    prompts: Sequence[Prompt]
    num_too_long: int
    verifier: Verifier | None
    num_teacher_too_long: int = 0
    unknown: tuple[UnknownText, ...] = ()
    facts: PromptFacts = field(default_factory=PromptFacts)

    def __len__(self) -> int:
        return len(self.prompts)


def prompt_set(
    source: ProblemSource,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    problems: Iterable[Problem] | None = None,
    max_teacher_prompt_tokens: int | None = None,
) -> PromptSet:
    """Return the tokenized prompts of a source, read in chunks; dropped problems are not kept in memory.

    Args:
        source: source of the problems.
        tokenizer: the student's.
        max_prompt_tokens: longer prompts are dropped and counted; truncation would change the problem.
        problems: the problems of the source to use; all by default. Of problems that are read on demand, such as those
            that :func:`opdlab.data.cleaning.clean` returns, the prompts are made on demand too, and are not held.
        max_teacher_prompt_tokens: the same for the teacher's prompts; None to make none, as for a benchmark.

    Raises:
        UsageError: the source or a prompt is empty, a verifier has no gold answer, or every prompt is too long.
    """
    recipe = Recipe(source, tokenizer, max_prompt_tokens, max_teacher_prompt_tokens)
    held: list[Prompt] = []
    keys = array("Q")
    too_long: list[int] = []  # token counts
    teacher_too_long: list[int] = []
    unknown, facts = UnknownTexts(tokenizer), PromptFacts()
    for prompt in recipe.prompts(source.problems() if problems is None else problems):
        if (which := recipe.too_long(prompt)) == "prompt":
            too_long.append(len(prompt.tokens))
        elif which == "teacher":
            teacher_too_long.append(len(prompt.teacher_tokens or ()))
        else:
            if isinstance(problems, OnDemand):
                keys.append(problems.keys[prompt.index])
            else:
                held.append(replace(prompt, index=len(held)))
            look_for_unknown(prompt, unknown)
            facts.look(prompt)
    require(
        bool(facts.count or too_long or teacher_too_long), f"{source.name} holds no problems: give a source with one"
    )
    for key, limit, lengths, kind in (
        ("max_teacher_prompt_tokens", max_teacher_prompt_tokens, teacher_too_long, "prompt that the teacher sees"),
        ("max_prompt_tokens", max_prompt_tokens, too_long, "prompt"),
    ):
        require(
            bool(facts.count) or not lengths,
            f"data.{key} is {limit}, but every {kind} of {source.name} is longer (the shortest has "
            f"{min(lengths, default=0)} tokens): raise it",
        )
    prompts: Sequence[Prompt] = tuple(held)
    if isinstance(problems, OnDemand):
        read = problems.make
        prompts = OnDemand(keys, lambda some, positions: recipe.made(read(some, positions), positions))
    return PromptSet(prompts, len(too_long), source.verifier, len(teacher_too_long), unknown.found, facts)


@dataclass(frozen=True)
class Recipe:
    """How the prompts of a source are made.

    Args:
        source: of the problems.
        tokenizer: the student's.
        max_prompt_tokens: see :func:`prompt_set`.
        max_teacher_prompt_tokens: see there.
    """

    source: ProblemSource
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_teacher_prompt_tokens: int | None

    def too_long(self, prompt: Prompt) -> Literal["prompt", "teacher"] | None:
        """Return which prompt has too many tokens, if any.

        Raises:
            UsageError: the verifier has no gold answer.
        """
        problem, seen, limit = prompt.problem, prompt.teacher_tokens, self.max_teacher_prompt_tokens
        if self.source.verifier is not None and not (problem.answer or "").strip():
            raise UsageError(
                f"{self.source.place(problem)} of {self.source.name} (id '{problem.id}') has no gold answer, which the "
                "source's verifier needs: give it one, or set verifier to null"
            )
        if len(prompt.tokens) > self.max_prompt_tokens:
            return "prompt"
        return "teacher" if seen is not None and limit is not None and len(seen) > limit else None

    def prompts(self, problems: Iterable[Problem]) -> Iterator[Prompt]:
        """Yield the prompt of each problem; its index is the problem's position."""
        position = 0
        for chunk in chunks(problems):
            yield from self.made(chunk, range(position, position + len(chunk)))
            position += len(chunk)

    def made(self, problems: Sequence[Problem], positions: Sequence[int]) -> list[Prompt]:
        """Return the prompts of problems, with the given indices.

        Raises:
            UsageError: a prompt is empty.
        """
        tokenized = _tokenized(problems, self.source.template, self.tokenizer)
        of_teacher: Sequence[tuple[int, ...] | None] = [None] * len(problems)
        if self.max_teacher_prompt_tokens is not None:
            of_teacher = _teacher_tokens(problems, self.source, self.tokenizer)
        for problem, *given in zip(problems, tokenized, of_teacher, strict=True):
            if () in given:
                whose = "" if given[0] == () else " for the teacher"
                raise UsageError(
                    f"{self.source.place(problem)} of {self.source.name} (id '{problem.id}') is an empty "
                    f"prompt{whose}: leave it out, or give a template"
                )
        rows = zip(positions, problems, tokenized, of_teacher, strict=True)
        return [Prompt(*row, *_demonstration(row[1], self.tokenizer)) for row in rows]


def look_for_unknown(prompt: Prompt, unknown: UnknownTexts) -> None:
    """Look for characters that the tokenizer does not know in all that becomes tokens."""
    problem = prompt.problem
    turns = [turn.content for turn in problem.messages] or [problem.text]
    unknown.look("prompts", problem, turns, prompt.tokens)
    if prompt.teacher_tokens is not None:
        seen = turns if problem.teacher_text is None else [*turns[:-1], problem.teacher_text]
        unknown.look("prompts that the teacher sees", problem, seen, prompt.teacher_tokens)
    if prompt.demonstration is not None:
        unknown.look("demonstrations", problem, [part.text for part in problem.demonstration], prompt.demonstration)


def _tokenized(
    problems: Sequence[Problem], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...]]:
    """Return the token ids of the prompt of each problem, plain text or chat."""
    texts = [problem.text for problem in problems if not problem.messages]
    chats = [problem.messages for problem in problems if problem.messages]
    plain = iter(template.tokenize(texts, tokenizer) if texts else ())
    turns = iter(template.tokenize_chats(chats, tokenizer) if chats else ())
    bos, tokenized = tokenizer.bos_token_id, []
    for problem in problems:
        given = tuple(next(turns if problem.messages else plain))
        # A template or a text may begin with the token that the tokenizer puts first anyway.
        tokenized.append(given[1:] if bos is not None and given[:2] == (bos, bos) else given)
    return tokenized


def _teacher_tokens(
    problems: Sequence[Problem], source: ProblemSource, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, ...] | None]:
    """Return the token ids of the prompt that the teacher sees for each problem; None where it is the student's."""
    has_own = [source.teacher_template is not None or each.teacher_text is not None for each in problems]
    seen = []
    for problem in compress(problems, has_own):
        text = problem.text if problem.teacher_text is None else problem.teacher_text
        turns = problem.messages
        if turns:
            turns = (*turns[:-1], Message(turns[-1].role, text))
        seen.append(replace(problem, text=text, messages=turns))
    tokenized = iter(_tokenized(seen, source.teacher_template or source.template, tokenizer))
    return [next(tokenized) if own else None for own in has_own]


def _demonstration(
    problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...] | None, tuple[bool, ...]]:
    """Return the token ids of the given response, None if there is none, and which of them count in the loss."""
    if not problem.demonstration:
        return None, ()
    parts = [tokenizer(part.text, add_special_tokens=False)["input_ids"] for part in problem.demonstration]
    loss = [[part.loss] * len(ids) for part, ids in zip(problem.demonstration, parts, strict=True)]
    return tuple(chain.from_iterable(parts)), tuple(chain.from_iterable(loss))
