"""Interface of verifiers, and the verifier of boxed answers."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MAX_EXTRACTED = 200
_BOXED = "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # skips escaped characters: \{ is printed, and groups nothing
_DEPTHS = {"{": 1, "}": -1}


@dataclass(frozen=True)
class Verdict:
    """Result for one response.

    Args:
        correct: the answer counts as correct.
        extracted: the answer found in the response, or None; at most 200 characters. As far as possible, answers that
            the verifier treats as equal have the same text, so that a majority vote can count them.
        reason: reason in one or two words: ``equal``, ``different``, ``no answer``, ``time limit``, …
    """

    correct: bool
    extracted: str | None
    reason: str


class Verifier(ABC):
    """Interface that compares responses with gold answers.

    Responses are untrusted text: never evaluate them in this process.
    """

    @abstractmethod
    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order.

        Args:
            responses: decoded responses, without special tokens.
            golds: the gold answer of each response, same length.
        """

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        """Start to verify responses, and return a function that waits for their verdicts.

        A verifier with worker processes overrides this, so that answers are checked while others are sampled.
        """
        verdicts = self.verify(responses, golds)
        return lambda: verdicts


def last_boxed(text: str) -> str | None:
    r"""Return the text in the last ``\boxed{…}`` of ``text``, with balanced braces, or None.

    Example:
        >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
        >>> last_boxed(r"cut off at \boxed{12") is None
        True
    """
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    # Linear time in the text after the last box, so that hostile text with many braces is cheap.
    depth, first = 1, start + len(_BOXED)
    for match in _BRACES.finditer(text, first):
        depth += _DEPTHS.get(match.group(), 0)
        if depth == 0:
            return text[first : match.start()]
    return None


def bounded_form(text: str) -> str:
    """Return ``text``; for a long text, its beginning and a hash of the whole, which keeps texts distinct.

    Lone surrogates are escaped, because files cannot store them.

    Example:
        >>> bounded_form("12"), len(bounded_form("7" * 10_000))
        ('12', 200)
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _MAX_EXTRACTED:
        return text
    ending = "...#" + hashlib.sha256(text.encode()).hexdigest()[:16]
    return text[: _MAX_EXTRACTED - len(ending)] + ending


class BoxedVerifier(Verifier):
    r"""Verifier that accepts a last ``\boxed{…}`` equal to the gold answer, ignoring white space at the ends.

    Args:
        at_end: the box must also end the response; in the toy world, text after it means that the model failed to
            stop.

    Example:
        >>> BoxedVerifier().verify([r"so \boxed{25}", r"\boxed{24}", "25"], ["25", "25", "25"])[1]
        Verdict(correct=False, extracted='24', reason='different')
    """

    def __init__(self, at_end: bool = False) -> None:
        self.at_end = at_end

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return [self._verdict(response, gold) for response, gold in zip(responses, golds, strict=True)]

    def _verdict(self, response: str, gold: str) -> Verdict:
        answer = last_boxed(response)
        if answer is None:
            return Verdict(False, None, "no answer")
        if self.at_end and not response.rstrip().endswith(_BOXED + answer + "}"):
            return Verdict(False, bounded_form(answer.strip()), "text after the answer")
        equal = answer.strip() == gold.strip()
        return Verdict(equal, bounded_form(answer.strip()), "equal" if equal else "different")
