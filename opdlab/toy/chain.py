r"""Chains of modular arithmetic: small enough to distil in seconds, long enough for several blocks and spans.

A problem is a start number and eleven lettered operations, all modulo 100::

    prompt    86 a+7 b*9 c-1 …\n
    response  a+7: 86+7=93\nb*9: 93*9=37\n…\boxed{25}<eos>

A tiny model can learn the task because each step repeats the operation (``a+7:``) before the arithmetic.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from opdlab.toy.task import BOXED, Split, ToyProblems, character_tokenizer, endless, split_of

NUM_OPERATIONS = 11
MODULUS = 100
_OPERATORS = "+-*"
_LETTERS = "abcdefghijklmnop"


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
        return split_of(self.prompt)

    def trace(self, error_rate: float = 0.0, rng: random.Random | None = None) -> str:
        """See :meth:`opdlab.toy.task.ToyProblem.trace`; a replaced result is a random number."""
        lines, value = [], self.start
        for letter, (op, n) in zip(_LETTERS, self.operations, strict=False):
            result = _apply(value, op, n)
            if rng is not None and rng.random() < error_rate:
                result = rng.randrange(MODULUS)
            lines.append(f"{letter}{op}{n}: {value}{op}{n}={result}\n")
            value = result
        return "".join(lines) + f"{BOXED}{value}}}"


def _apply(value: int, operator: str, operand: int) -> int:
    if operator == "+":
        return (value + operand) % MODULUS
    return (value - operand if operator == "-" else value * operand) % MODULUS


def chain_problems(split: Split, seed: int) -> Iterator[ChainProblem]:
    """Return an endless stream of problems of one split, the same for the same seed.

    Args:
        split: ``sft`` (made the shipped models), ``train`` (prompts for distillation) or ``held_out`` (evaluation).
        seed: selects the stream.

    Example:
        >>> first = next(chain_problems("held_out", seed=0))
        >>> first.split, len(first.operations)
        ('held_out', 11)
    """
    rng = random.Random(f"{split}-{seed}")

    def draw() -> ChainProblem:
        operations = tuple((rng.choice(_OPERATORS), rng.randrange(10)) for _ in range(NUM_OPERATIONS))
        return ChainProblem(rng.randrange(MODULUS), operations)

    return endless(draw, split)


class ChainProblems(ToyProblems):
    """Source of chains; see :class:`opdlab.toy.task.ToyProblems` for the arguments."""

    title = "toy chains"
    stream = staticmethod(chain_problems)


def chain_tokenizer() -> PreTrainedTokenizerFast:
    r"""Return the 38-token tokenizer: single characters, and ``\boxed{`` as one token.

    Example:
        >>> tokenizer = chain_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("a+7: 86\\boxed{25}")["input_ids"])
        (38, 'a+7: 86\\boxed{25}')
    """
    return character_tokenizer([*"0123456789", *_LETTERS, *_OPERATORS, ":", "=", " ", "\n", "}"])
