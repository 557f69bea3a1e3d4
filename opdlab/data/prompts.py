"""Sources of problems, and their tokenized prompts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from opdlab.data.templates import RawTemplate, Template
from opdlab.errors import UsageError, require
from opdlab.types import Problem, Prompt
from opdlab.verifiers.verifier import Verifier

_CHUNK = 1024  # problems per tokenizer call


class ProblemSource(ABC):
    """Source of problems, with the template of their prompts and the verifier of their answers.

    Args:
        template: turns a problem into a prompt.
        verifier: checks answers; None without gold answers.
    """

    def __init__(self, template: Template | None = None, verifier: Verifier | None = None) -> None:
        self.template: Template = template or RawTemplate()
        self.verifier = verifier

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """Return the problems, read or generated, the same ones in the same order at each call.

        Sources that read files read them lazily, during iteration.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name used in messages: a path, a data set's name."""


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts of a source, and the number of dropped ones.

    Args:
        prompts: prompts in the order of the source.
        num_too_long: number of problems dropped because their prompt has more tokens than allowed.
        verifier: verifier of the source.
    """

    prompts: tuple[Prompt, ...]
    num_too_long: int
    verifier: Verifier | None

    def __len__(self) -> int:
        return len(self.prompts)


def prompt_set(
    source: ProblemSource,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    problems: Iterable[Problem] | None = None,
) -> PromptSet:
    """Return the tokenized prompts of a source, read in chunks; dropped problems are not kept in memory.

    Args:
        source: source of the problems.
        tokenizer: the student's.
        max_prompt_tokens: longer prompts are dropped and counted; truncation would change the problem.
        problems: the problems of the source to use; all by default.

    Raises:
        UsageError: the source or a prompt is empty, a verifier has no gold answer, or every prompt is too long.
    """
    bos = tokenizer.bos_token_id
    remaining = iter(source.problems() if problems is None else problems)
    prompts: list[Prompt] = []
    too_long: list[int] = []  # token counts
    while chunk := list(islice(remaining, _CHUNK)):
        tokenized = source.template.tokenize([problem.text for problem in chunk], tokenizer)
        for problem, given in zip(chunk, tokenized, strict=True):
            # A template or a text may begin with the token that the tokenizer puts first anyway.
            tokens = given[1:] if bos is not None and list(given[:2]) == [bos, bos] else given
            if not tokens:
                raise UsageError(
                    f"problem '{problem.id}' of {source.name} is an empty prompt: leave it out, or give a template"
                )
            if source.verifier is not None and not (problem.answer or "").strip():
                raise UsageError(
                    f"problem '{problem.id}' of {source.name} has no gold answer, which the source's verifier needs: "
                    "give it one, or set verifier to null"
                )
            if len(tokens) > max_prompt_tokens:
                too_long.append(len(tokens))
            else:
                prompts.append(Prompt(len(prompts), problem, tuple(tokens)))
    require(bool(prompts or too_long), f"{source.name} holds no problems: give a source with at least one")
    if not prompts:
        raise UsageError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, but every prompt of {source.name} is longer (the shortest "
            f"has {min(too_long)} tokens): raise it"
        )
    return PromptSet(tuple(prompts), len(too_long), source.verifier)
