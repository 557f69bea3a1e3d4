"""Problems, and the prompts that they become."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from opdlab.data.templates import RawTemplate, Template
from opdlab.errors import UsageError, require
from opdlab.types import Problem, Prompt
from opdlab.verifiers.verifier import Verifier

__all__ = ["Problem", "ProblemSource", "Prompt", "PromptSet", "prompt_set"]

_CHUNK = 1024  # problems tokenized at a time


class ProblemSource(ABC):
    """Where problems come from, how they are put to the model, and how answers are checked.

    Args:
        template: turns a problem into a prompt.
        verifier: checks answers; None where there is nothing to check against.
    """

    def __init__(self, template: Template | None = None, verifier: Verifier | None = None) -> None:
        self.template: Template = template or RawTemplate()
        self.verifier = verifier

    @abstractmethod
    def problems(self) -> Iterable[Problem]:
        """Read or make the problems, the same ones in the same order at each call.

        What comes from a file is read while it is iterated over, and no further.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call the source: a path, a data set's name."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts ready to be sampled from, and how many were dropped on the way.

    Args:
        prompts: in the order of the source.
        num_too_long: problems left out because their prompt has more than the allowed number of tokens.
        verifier: of the source.
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
    """Tokenize a source, some problems at a time; those that are left out are not kept in memory.

    Args:
        source: where the problems come from.
        tokenizer: the student's.
        max_prompt_tokens: a longer prompt is left out and counted; never cut, which would change the problem.
        problems: those of the source that are used; all by default.

    Raises:
        UsageError: the source or a prompt is empty, or every prompt is too long.
    """
    remaining = iter(source.problems() if problems is None else problems)
    prompts: list[Prompt] = []
    too_long: list[int] = []  # lengths
    while chunk := list(islice(remaining, _CHUNK)):
        tokenized = source.template.tokenize([problem.text for problem in chunk], tokenizer)
        for problem, tokens in zip(chunk, tokenized, strict=True):
            if not tokens:
                raise UsageError(
                    f"problem '{problem.id}' of {source.name} is an empty prompt: leave it out, or give a template"
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
