"""Interface of verifiers, and the verifier of boxed answers."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MAX_EXTRACTED = 200
_BOX_OR_BRACE = re.compile(r"\\+(?:(?P<box>(?:boxed|fbox)\s*+\{)|(?P<escaped>[{}]))?|[{}]")
# What may stand between boxes that give one answer together: punctuation, "and", "or", and "x =", or a short phrase
# with "and" or "or" that does not correct what stands before it.
_BETWEEN = re.compile(
    r"(?!.*\b(?:but|wait|no|not|actually|after|instead|rather|correct|wrong|mistake|then|should)\b)"
    r"(?=.*\b(?:and|or)\b)[^.!?\n]{0,40}+|(?:[\s$,;.&*}]|\\[()\[\],;:! ]|\\\\|\\q?quad|and|or|\\text\s*\{"
    r"|[\u548c\u6216\u4e0e\u3001\uff0c\u3002]|[a-zA-Z](?:_\{?[0-9a-zA-Z]\}?)?\s*=)*+"
)


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


@dataclass(frozen=True)
class Box:
    r"""A ``\boxed{…}`` or ``\fbox{…}``.

    Args:
        text: the text in the box.
        start: position of the box in the response.
        end: position after the closing brace.
    """

    text: str
    start: int
    end: int


def boxes(text: str) -> list[Box] | None:
    r"""Return the boxes that give the answer together; an empty list without a box; None if the last one is not closed.

    These are the last box, and those before it with only ``and`` or the like between them.

    Example:
        >>> [box.text for box in boxes(r"first \boxed{0}, but no: \boxed{1} and \fbox{\frac{1}{2}}")]
        ['1', '\\frac{1}{2}']
        >>> boxes("12"), boxes(r"\boxed{1}, cut off at \boxed{12")
        ([], None)
    """
    # Linear time, so that hostile text with many braces is cheap.
    opened: list[tuple[int, int] | None] = []  # of each open brace: start of the box and of its text, or None
    found: list[Box] = []
    last = -1
    for match in _BOX_OR_BRACE.finditer(text):
        if match["box"]:
            last = match.start()
            opened.append((last, match.end()))
        elif (match["escaped"] and match.group().count("\\") % 2) or match.group().endswith("\\"):
            continue  # \{ is printed, and groups nothing
        elif match.group().endswith("{"):
            opened.append(None)
        elif opened and (box := opened.pop()):
            found.append(Box(text[box[1] : match.start()], box[0], match.end()))
    if last < 0:
        return []
    found.sort(key=lambda box: box.start)
    if not found or found[-1].start != last:
        return None
    together = [found.pop()]
    for box in reversed(found):
        if box.end > together[0].start or not _BETWEEN.fullmatch(text, box.end, together[0].start):
            break
        together.insert(0, box)
    return together


def last_boxed(text: str) -> str | None:
    r"""Return the text in the last box, or None if there is none or it is not closed.

    Example:
        >>> last_boxed(r"so \boxed{1} or rather \boxed {\frac{1}{2}}")
        '\\frac{1}{2}'
        >>> last_boxed(r"cut off at \boxed{12") is None
        True
    """
    found = boxes(text)
    return found[-1].text if found else None


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
        found = boxes(response)
        if not found:
            return Verdict(False, None, "no answer")
        answer = found[-1].text
        if self.at_end and response[found[-1].end :].strip():
            return Verdict(False, bounded_form(answer.strip()), "text after the answer")
        equal = answer.strip() == gold.strip()
        return Verdict(equal, bounded_form(answer.strip()), "equal" if equal else "different")
