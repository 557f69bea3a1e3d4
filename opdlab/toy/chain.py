r"""Chains of modular arithmetic: small enough to distil in seconds, long enough for several blocks and spans.

A problem is a start number and eleven lettered operations, all modulo 100::

    prompt    86 a+7 b*9 c-1 …\n
    response  a+7: 86+7=93\nb*9: 93*9=37\n…\boxed{25}<eos>

A tiny model can learn the task because each step repeats the operation (``a+7:``) before the arithmetic.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdlab.data.prompts import ProblemSource
from opdlab.data.templates import check_fields, fill_fields
from opdlab.errors import require
from opdlab.types import Part, Problem
from opdlab.verifiers.verifier import BoxedVerifier

Split = Literal["sft", "train", "held_out"]

NUM_OPERATIONS = 11
MODULUS = 100
_OPERATORS = "+-*"
_LETTERS = "abcdefghijklmnop"
_SPECIAL = ["<pad>", "<eos>", "<unk>"]
# Sixteenths of the space of problems. The split depends only on the problem's text, so the three cannot overlap.
_SPLIT_SIXTEENTHS: dict[Split, range] = {"held_out": range(0, 1), "train": range(1, 5), "sft": range(5, 16)}


@dataclass(frozen=True)
class ChainProblem:
    r"""A chain of operations.

    Args:
        start: the first number, 0 to 99.
        operations: pairs of an operator (``+``, ``-`` or ``*``) and a one-digit operand.

    Example:
        >>> problem = ChainProblem(86, (("+", 7), ("*", 9)))
        >>> problem.prompt
        '86 a+7 b*9\n'
        >>> problem.trace()
        'a+7: 86+7=93\nb*9: 93*9=37\n\\boxed{37}'
    """

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """Return the text of the problem in the prompt."""
        steps = [f"{letter}{op}{n}" for letter, (op, n) in zip(_LETTERS, self.operations, strict=False)]
        return f"{self.start} {' '.join(steps)}\n"

    @property
    def answer(self) -> str:
        """Return the gold answer."""
        value = self.start
        for op, n in self.operations:
            value = _apply(value, op, n)
        return str(value)

    @property
    def split(self) -> Split:
        """Return the split of the problem's text."""
        sixteenth = hashlib.sha256(self.prompt.encode()).digest()[0] % 16
        return next(name for name, share in _SPLIT_SIXTEENTHS.items() if sixteenth in share)

    def trace(self, error_rate: float = 0.0, rng: random.Random | None = None) -> str:
        """Return the exact solution, or one in which a share of the results is random.

        Args:
            error_rate: probability, 0 to 1, that a random number replaces a result (later steps continue from it).
            rng: source of the errors; required if ``error_rate`` is above 0.
        """
        lines, value = [], self.start
        for letter, (op, n) in zip(_LETTERS, self.operations, strict=False):
            result = _apply(value, op, n)
            if rng is not None and rng.random() < error_rate:
                result = rng.randrange(MODULUS)
            lines.append(f"{letter}{op}{n}: {value}{op}{n}={result}\n")
            value = result
        return "".join(lines) + f"\\boxed{{{value}}}"


def _apply(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return (value + operand) % MODULUS
    return (value - operand if operator == "-" else value * operand) % MODULUS


def chain_problems(split: Split, seed: int) -> Iterator[ChainProblem]:
    """Yield an endless stream of problems of one split, the same for the same seed.

    Args:
        split: ``sft`` (made the shipped models), ``train`` (prompts for distillation) or ``held_out`` (evaluation).
        seed: selects the stream.

    Example:
        >>> first = next(chain_problems("held_out", seed=0))
        >>> first.split, len(first.operations)
        ('held_out', 11)
    """
    rng = random.Random(f"{split}-{seed}")
    while True:
        operations = tuple((rng.choice(_OPERATORS), rng.randrange(10)) for _ in range(NUM_OPERATIONS))
        problem = ChainProblem(rng.randrange(MODULUS), operations)
        if problem.split == split:
            yield problem


class ChainProblems(ProblemSource):
    r"""Source of problems of one split.

    Args:
        num_problems: number of problems.
        split: ``train`` or ``held_out``; disjoint from each other and from the training data of the shipped models.
        seed: selects the stream of problems.
        teacher_text: the problem as the teacher sees it in training, a text with the fields ``{problem}``,
            ``{answer}`` and ``{solution}``, such as ``"{solution}\n{problem}"``; null for the problem.
    """

    def __init__(
        self, num_problems: int = 2048, split: Split = "train", seed: int = 0, teacher_text: str | None = None
    ) -> None:
        super().__init__(verifier=BoxedVerifier(at_end=True))
        if teacher_text is not None:
            check_fields(teacher_text, "teacher_text")
        require(num_problems >= 1, f"num_problems is {num_problems}, but must be at least 1")
        self.num_problems = num_problems
        self.split: Split = split
        self.seed, self.teacher_text = seed, teacher_text
        self._problems: dict[str | None, list[Problem]] = {}  # by the field of the demonstrations

    @property
    def name(self) -> str:
        """Return the name with the split."""
        return f"toy chains ({self.split})"

    def problems(self) -> list[Problem]:
        """See :meth:`ProblemSource.problems`."""
        if self.demonstration_field not in self._problems:
            chains = itertools.islice(chain_problems(self.split, self.seed), self.num_problems)
            name = f"{self.split}-{self.seed}"
            problems = [self._problem(f"{name}-{i}", chain) for i, chain in enumerate(chains)]
            self._problems[self.demonstration_field] = problems
        return self._problems[self.demonstration_field]

    def _problem(self, name: str, chain: ChainProblem) -> Problem:
        fields = {"problem": chain.prompt, "answer": chain.answer, "solution": chain.trace()}

        def value(field: str) -> str:
            require(field in fields, f"{self.name} has no field '{field}'; its fields: {', '.join(fields)}")
            return fields[field]

        text = None if self.teacher_text is None else fill_fields(self.teacher_text, value)
        given = () if self.demonstration_field is None else (Part(value(self.demonstration_field)),)
        return Problem(name, chain.prompt, chain.answer, teacher_text=text, demonstration=given)


def chain_tokenizer() -> PreTrainedTokenizerFast:
    r"""Return the 38-token tokenizer: single characters, and ``\boxed{`` as one token.

    Example:
        >>> tokenizer = chain_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("a+7: 86\\boxed{25}")["input_ids"])
        (38, 'a+7: 86\\boxed{25}')
    """
    characters = [*"0123456789", *_LETTERS, *_OPERATORS, ":", "=", " ", "\n", "}", "\\boxed{"]
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *characters])}
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
