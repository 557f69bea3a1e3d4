r"""Verifiers for answers that are plain text or plain numbers: fast, exact, in this process."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from opdlab.errors import UsageError, require
from opdlab.verifiers.quantities import parse_quantity
from opdlab.verifiers.spelling import normalized
from opdlab.verifiers.verifier import Verdict, Verifier, bounded_form, boxes, last_boxed

# Without a box only this many characters at the end are searched for a number.
_TAIL_CHARACTERS = 2000


class ExactMatchVerifier(Verifier):
    r"""Verifier that accepts an answer with the same text as the gold answer.

    ``extracted`` is the compared text.

    Args:
        boxed: the answer is the text in the last ``\boxed{…}``; otherwise it is the whole response.
        collapse_whitespace: any run of white space counts as one space; white space at the ends is ignored.
        ignore_case: ``East`` equals ``east``.

    Example:
        >>> verifier = ExactMatchVerifier(ignore_case=True)
        >>> [verdict.correct for verdict in verifier.verify([r"\boxed{North  East}", "north east"], ["north east"] * 2)]
        [True, False]
    """

    def __init__(self, boxed: bool = True, collapse_whitespace: bool = True, ignore_case: bool = False) -> None:
        self.boxed = boxed
        self.collapse_whitespace = collapse_whitespace
        self.ignore_case = ignore_case

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return [self._verdict(response, gold) for response, gold in zip(responses, golds, strict=True)]

    def _verdict(self, response: str, gold: str) -> Verdict:
        answer = last_boxed(response) if self.boxed else response
        if answer is None:
            return Verdict(False, None, "no answer")
        answer = self._normalised(answer)
        equal = answer == self._normalised(gold)
        return Verdict(equal, bounded_form(answer), "equal" if equal else "different")

    def _normalised(self, text: str) -> str:
        text = " ".join(text.split()) if self.collapse_whitespace else text
        return text.casefold() if self.ignore_case else text


class NumericVerifier(Verifier):
    r"""Verifier that accepts an answer whose last number equals the gold number within a tolerance.

    :func:`~opdlab.verifiers.quantities.parse_quantity` reads the gold answer and the text in the last ``\boxed{…}`` as
    a whole. If that is words, or without a box, the last number counts. Such numbers are integers, decimals, fractions
    (``3/4``, ``\frac{3}{4}``), thousands with commas, and ``1.2e5``. They are compared as exact fractions, and
    ``extracted`` is that fraction. Units and words are ignored, and 50 % is 50;
    :class:`~opdlab.verifiers.MathVerifier` is stricter.

    Args:
        relative_tolerance: as a share of the gold value, at least 0.
        absolute_tolerance: at least 0; the larger of the two tolerances is used.

    Raises:
        UsageError: a tolerance is out of range; on verifying, a gold answer is not a number.

    Example:
        >>> NumericVerifier().verify(["3 dozen make 36.0 eggs"], ["36"])[0]
        Verdict(correct=True, extracted='36', reason='equal')
        >>> NumericVerifier(relative_tolerance=0.01).verify([r"\boxed{3.14}"], ["3.1416"])[0].correct
        True
    """

    def __init__(self, relative_tolerance: float = 0.0, absolute_tolerance: float = 0.0) -> None:
        for key, value in (("relative_tolerance", relative_tolerance), ("absolute_tolerance", absolute_tolerance)):
            require(
                value >= 0 and math.isfinite(value),
                f"verifier.{key} is {value}, but must be at least 0 and finite: use 0 for exact equality",
            )
        self.relative_tolerance = relative_tolerance
        self.absolute_tolerance = absolute_tolerance

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return [self._verdict(response, gold) for response, gold in zip(responses, golds, strict=True)]

    def _verdict(self, response: str, gold: str) -> Verdict:
        wanted = _plain_number(gold)
        if wanted is None:
            raise UsageError(
                f"the gold answer {gold[:80]!r} is not a number that NumericVerifier can read: correct it, or use "
                "opdlab.verifiers.MathVerifier or ExactMatchVerifier"
            )
        found = boxes(response)
        if found is None:  # an open box is no answer
            return Verdict(False, None, "no answer")
        value = _plain_number(found[-1].text) if found else None
        if value is None:
            token = ""
            if found and "\\" in normalized(found[-1].text):  # a number in unread LaTeX is no answer
                return Verdict(False, None, "no answer")
            for match in _LAST_NUMBER.finditer(normalized((found[-1].text if found else response)[-_TAIL_CHARACTERS:])):
                token = match.group()
            if not token:
                return Verdict(False, None, "no answer")
            if (quantity := parse_quantity(token)) is None:
                return Verdict(False, bounded_form(token), "number out of range")
            value = quantity.value
        tolerance = max(Fraction(self.absolute_tolerance), Fraction(self.relative_tolerance) * abs(wanted))
        equal = abs(value - wanted) <= tolerance
        return Verdict(equal, bounded_form(str(value)), "equal" if equal else "different")


# Possessive quantifiers bound the work: each character is read at most a few times in any text.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_LAST_NUMBER = re.compile(
    r"(?<![\^_])(?<![\^_]\{)(?:(?<![0-9a-zA-Z)}])[+-])?"
    rf"(?:\\frac\s*+\{{-?[0-9]++\}}\s*+\{{[0-9]++\}}|[0-9]++/[0-9]++|{_DIGITS}?\.[0-9]++(?:[eE][+-]?[0-9]++)?"
    rf"|{_DIGITS}(?:[eE][+-]?[0-9]++)?)"
    r"(?![a-zA-Z](?![a-zA-Z])|[\^_!]|[./,][0-9])"  # 4t and 4! are no numbers
)
_ASSIGNMENT = re.compile(r"[a-zA-Z] *= *(?!.*=)")


def _plain_number(text: str) -> Fraction | None:
    text = normalized(text[-_TAIL_CHARACTERS:])
    match = _ASSIGNMENT.match(text)
    quantity = parse_quantity(text[match.end() :] if match else text)
    return None if quantity is None else quantity.value
