"""What the toy tasks share: problems of three splits that cannot overlap, their source, tokenizers of characters."""

import hashlib
import itertools
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, Protocol, TypeVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdlab.data.prompts import ProblemSource
from opdlab.data.templates import check_fields, fill_fields
from opdlab.errors import require
from opdlab.seeds import checked_seed
from opdlab.types import Part, Problem
from opdlab.verifiers.verifier import BoxedVerifier

Split = Literal["sft", "train", "held_out"]

BOXED = "\\boxed{"
_SPECIAL = ["<pad>", "<eos>", "<unk>"]
# Sixteenths of the space of problems. The split depends only on the problem's text, so the three cannot overlap.
_SPLIT_SIXTEENTHS: dict[Split, range] = {"held_out": range(0, 1), "train": range(1, 5), "sft": range(5, 16)}


class ToyProblem(Protocol):
    """A problem of a toy task."""

    @property
    def prompt(self) -> str:
        """Return the text of the problem in the prompt."""

    @property
    def answer(self) -> str:
        """Return the gold answer."""

    def trace(self, error_rate: float = 0.0, rng: random.Random | None = None) -> str:
        """Return the exact solution, or one in which a share of the results is random.

        Args:
            error_rate: probability, 0 to 1, that a line's result is replaced (later lines continue from it).
            rng: source of the errors; required if ``error_rate`` is above 0.
        """


P = TypeVar("P", bound=ToyProblem)


def split_of(prompt: str) -> Split:
    """Return the split of a problem's text."""
    sixteenth = hashlib.sha256(prompt.encode()).digest()[0] % 16
    return next(name for name, share in _SPLIT_SIXTEENTHS.items() if sixteenth in share)


def endless(draw: Callable[[], P], split: Split) -> Iterator[P]:
    """Yield the drawn problems that are in a split, without end."""
    while True:
        problem = draw()
        if split_of(problem.prompt) == split:
            yield problem


class ToyProblems(ProblemSource):
    r"""Source of problems of one split of a toy task.

    Args:
        num_problems: number of problems.
        split: ``train`` or ``held_out``; disjoint from each other and from the training data of the shipped models.
        seed: selects the stream of problems.
        teacher_text: the problem as the teacher sees it in training, a text with the fields ``{problem}``,
            ``{answer}`` and ``{solution}``, such as ``"{solution}\n{problem}"``; null for the problem.
    """

    title: ClassVar[str]
    """Of the task, for messages."""

    def __init__(
        self, num_problems: int = 2048, split: Split = "train", seed: int = 0, teacher_text: str | None = None
    ) -> None:
        super().__init__(verifier=BoxedVerifier(at_end=True))
        if teacher_text is not None:
            check_fields(teacher_text, "teacher_text")
        require(num_problems >= 1, f"num_problems is {num_problems}, but must be at least 1")
        self.num_problems, self.seed = num_problems, checked_seed(seed)
        self.split: Split = split
        self.teacher_text = teacher_text
        self._problems: dict[str | None, list[Problem]] = {}  # by the field of the demonstrations

    @staticmethod
    @abstractmethod
    def stream(split: Split, seed: int) -> Iterator[ToyProblem]:
        """Yield an endless stream of problems of one split, the same for the same seed."""

    @property
    def name(self) -> str:
        """Return the name with the split."""
        return f"{self.title} ({self.split})"

    def problems(self) -> list[Problem]:
        """See :meth:`ProblemSource.problems`."""
        if self.demonstration_field not in self._problems:
            taken = itertools.islice(self.stream(self.split, self.seed), self.num_problems)
            name = f"{self.split}-{self.seed}"
            problems = [self._problem(f"{name}-{i}", problem) for i, problem in enumerate(taken)]
            self._problems[self.demonstration_field] = problems
        return self._problems[self.demonstration_field]

    def _problem(self, name: str, problem: ToyProblem) -> Problem:
        fields = {"problem": problem.prompt, "answer": problem.answer, "solution": problem.trace()}

        def value(field: str) -> str:
            known = ", ".join(fields)
            require(field in fields, f"{self.name} has no field '{field}'; its fields: {known}; give one of them")
            return fields[field]

        text = None if self.teacher_text is None else fill_fields(self.teacher_text, value)
        given = () if self.demonstration_field is None else (Part(value(self.demonstration_field)),)
        return Problem(name, problem.prompt, problem.answer, teacher_text=text, demonstration=given)


def character_tokenizer(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    r"""Return a tokenizer of single characters, with ``\boxed{`` as one token, and three special tokens before them."""
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *characters, BOXED])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
