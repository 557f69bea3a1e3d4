r"""String programs: no arithmetic, lines of equal length, and longer answers than those of the chains.

A problem is a string of nine letters and seventeen lettered operations on it::

    prompt    bdahcfege A< B~ C^ …\n
    response  A<: dahcfegeb\nB~: adchefegb\n…\boxed{…}<eos>

Operations: ``<`` and ``>`` move the string by one letter to the left or right, and the letter that falls off comes back
at the other end; ``~`` swaps the letters of each pair (the last one stays); ``^`` replaces each letter by the next one
of a to h, and h by a.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from opdlab.toy.task import BOXED, Split, ToyProblems, character_tokenizer, endless, split_of

NUM_LETTERS, NUM_OPERATIONS = 9, 17
_LETTERS, _LABELS, _OPERATORS = "abcdefgh", "ABCDEFGHIJKLMNOPQ", "<>~^"


@dataclass(frozen=True)
class StringProblem:
    r"""A program on a string.

    Args:
        start: nine letters of a to h.
        operations: each ``<``, ``>``, ``~`` or ``^``.

    Example:
        >>> problem = StringProblem("bdahcfege", "<~")
        >>> problem.prompt
        'bdahcfege A< B~\n'
        >>> problem.trace()
        'A<: dahcfegeb\nB~: adchefegb\n\\boxed{adchefegb}'
    """

    start: str
    operations: str

    @property
    def prompt(self) -> str:
        """Return the text of the problem in the prompt."""
        return f"{self.start} {' '.join(map(''.join, zip(_LABELS, self.operations, strict=False)))}\n"

    @property
    def answer(self) -> str:
        """Return the gold answer."""
        value = self.start
        for operation in self.operations:
            value = _apply(value, operation)
        return value

    @property
    def split(self) -> Split:
        """Return the split of the problem's text."""
        return split_of(self.prompt)

    def trace(self, error_rate: float = 0.0, rng: random.Random | None = None) -> str:
        """See :meth:`opdlab.toy.task.ToyProblem.trace`; a replaced result has one random letter."""
        lines, value = [], self.start
        for label, operation in zip(_LABELS, self.operations, strict=False):
            value = _apply(value, operation)
            if rng is not None and rng.random() < error_rate:
                place = rng.randrange(len(value))
                value = value[:place] + rng.choice(_LETTERS) + value[place + 1 :]
            lines.append(f"{label}{operation}: {value}\n")
        return "".join(lines) + f"{BOXED}{value}}}"


def _apply(value: str, operation: str) -> str:
    if operation == "<":
        return value[1:] + value[:1]
    if operation == ">":
        return value[-1:] + value[:-1]
    if operation == "~":
        pairs = [value[place : place + 2][::-1] for place in range(0, len(value), 2)]
        return "".join(pairs)
    return value.translate(str.maketrans(_LETTERS, _LETTERS[1:] + _LETTERS[:1]))


def string_problems(split: Split, seed: int) -> Iterator[StringProblem]:
    """Return an endless stream of problems of one split, the same for the same seed.

    Args:
        split: ``sft`` (made the shipped models), ``train`` (prompts for distillation) or ``held_out`` (evaluation).
        seed: selects the stream.

    Example:
        >>> first = next(string_problems("held_out", seed=0))
        >>> first.split, len(first.operations)
        ('held_out', 17)
    """
    rng = random.Random(f"strings-{split}-{seed}")

    def draw() -> StringProblem:
        operations = "".join(rng.choices(_OPERATORS, k=NUM_OPERATIONS))
        return StringProblem("".join(rng.choices(_LETTERS, k=NUM_LETTERS)), operations)

    return endless(draw, split)


class StringProblems(ToyProblems):
    """Source of string programs; see :class:`opdlab.toy.task.ToyProblems` for the arguments."""

    title = "toy strings"
    stream = staticmethod(string_problems)


def string_tokenizer() -> PreTrainedTokenizerFast:
    r"""Return the 37-token tokenizer: single characters, and ``\boxed{`` as one token.

    Example:
        >>> tokenizer = string_tokenizer()
        >>> len(tokenizer), tokenizer.decode(tokenizer("A<: dah\\boxed{dah}")["input_ids"])
        (37, 'A<: dah\\boxed{dah}')
    """
    return character_tokenizer([*_LETTERS, *_LABELS, *_OPERATORS, ":", " ", "\n", "}"])
