"""Verifiers decide whether a response answers a problem."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MAX_EXTRACTED = 200
_BOXED = "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # with what a backslash escapes: \{ is a brace on paper, not in TeX
_DEPTHS = {"{": 1, "}": -1}


@dataclass(frozen=True)
class Verdict:
    """The outcome for one response.

    Args:
        correct: whether the answer counts as correct.
        extracted: the answer that was found in the response, or None. Verifiers give answers that they take for equal
            the same text as far as they can, so that a majority vote can count them; at most 200 characters.
        reason: why, in a word or two: ``equal``, ``different``, ``no answer``, ``time limit``, …
    """

    correct: bool
    extracted: str | None
    reason: str


class Verifier(ABC):
    """Compares responses with gold answers. Responses are untrusted text: never evaluate them in this process."""

    @abstractmethod
    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """Return one verdict per response, in order.

        Args:
            responses: decoded responses, special tokens left out.
            golds: the gold answer of each response, same length.
        """

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        """Start on some responses and return at once; the function returned waits for their verdicts.

        A verifier with workers of its own overrides this, so that answers are checked while others are sampled.
        """
        verdicts = self.verify(responses, golds)
        return lambda: verdicts


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{…}`` of ``text``, braces balanced, or None.

    Example:
        >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
        >>> last_boxed(r"cut off at \boxed{12") is None
        True
    """
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    # From the last box on, each character is read once, however many braces a hostile text has.
    depth, first = 1, start + len(_BOXED)
    for match in _BRACES.finditer(text, first):
        depth += _DEPTHS.get(match.group(), 0)
        if depth == 0:
            return text[first : match.start()]
    return None


def bounded_form(text: str) -> str:
    """Return ``text``, or where it is long its beginning and a hash of it all, so that different texts stay apart.

    Lone surrogates, which no file can hold, are escaped.

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
    r"""Correct if the text in the last ``\boxed{…}`` equals the gold answer, apart from white space at the ends.

    Args:
        at_end: the box must also close the response, as it does in the toy world, where anything after it
            means that the model failed to stop.

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
