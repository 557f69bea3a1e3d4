r"""Detect differences between two answers that a computer algebra system ignores.

math-verify drops number bases, units, and ``am``, and reads ``11=10`` as 10. The vetoes here reject such answers with
regular expressions, without evaluating anything.
"""

import re

from opdlab.verifiers.quantities import known_unit, normalized

NUMBERS_SIDE_BY_SIDE = re.compile(r"[+-]?[0-9.]++(?: ++[0-9.]++)++(?: *+/ *+[0-9]++)?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)(?![a-zA-Z])|[{}]")
_WORDS = re.compile(r"no|[a-z]{3,}(?: [a-z]+)*", re.IGNORECASE)
_BASED = re.compile(r"\(?([0-9A-F]*[0-9][0-9A-F]*)\)?_([0-9]+)")
_CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2}|[0-9]{1,2}(?= )) *([ap])\.? *m\.?", re.IGNORECASE)
_TRAILING_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox) *\{([^{}]*)\}((?:\^\{?[0-9]\}?)?)$")
_NUMBER_AND_WORDS = re.compile(r"[+-]?[0-9][0-9.,/ ]*([a-zA-Z][a-zA-Z. ]{2,})")
# Text of a list of equations, or of a relation other than equality.
_NOT_A_CHAIN = re.compile(
    r",(?![0-9]{3})|;|\\\\|\b(?:or|and)\b|\\(?:quad|lor|land|vee|wedge|cup)|[<>!:~]=?|\\n?[lg]?eq?"
)
_LEAD_IN = re.compile(r"\s*(?:(?:so|thus|hence|therefore),? +)?the +(?:final +)?answer +is *:?\s*", re.IGNORECASE)
_LEAD_IN_TEXT = re.compile(rf"\s*\\text *\{{{_LEAD_IN.pattern}\}}\s*", re.IGNORECASE)
_ALL_TEXT = re.compile(r"\s*\\text *\{([^{}]*)\}\s*")


def plain_text(text: str) -> str:
    r"""Return the text without braces and text commands: ``\text{ Evelyn }.`` becomes ``Evelyn``."""
    return " ".join(_TEXT.sub(" ", normalized(text)).split())


def same_text(a: str, b: str) -> bool:
    """True if two answers are the same text. Case is ignored in words, but not in ``AB``, which may be a product.

    Example:
        >>> same_text("True", "true"), same_text("AB", "ab")
        (True, False)
    """
    a, b = plain_text(a), plain_text(b)
    if not a or a.lower() != b.lower():
        return False
    return a == b or (_WORDS.fullmatch(a) is not None and (len(a) > 3 or a[1:] == b[1:]))


def without_lead_in(text: str) -> str:
    r"""Return the text without a leading ``The answer is``.

    Example:
        >>> without_lead_in(r"\text{The answer is }12"), without_lead_in("The answer is 12")
        ('12', '12')
    """
    if match := _LEAD_IN_TEXT.match(text):
        return text[match.end() :]
    inner = match[1] if (match := _ALL_TEXT.fullmatch(text)) else text
    return inner[match.end() :] if (match := _LEAD_IN.match(inner)) else text


def with_base(text: str) -> str | None:
    r"""Return digits and base as ``2516_8``, or None for text that is not a number with a base.

    Example:
        >>> with_base("2516_{8}"), with_base("2516"), with_base("x_1")
        ('2516_8', None, None)
    """
    match = _BASED.fullmatch(re.sub(r"[{} ]", "", normalized(text)))
    return f"{match[1].lstrip('0') or '0'}_{match[2]}" if match else None


def differ(answer: str, gold: str) -> bool:
    r"""True if the notation alone shows that two answers are not equal.

    This holds for numbers side by side (``2 3/4``, which math-verify reads as 5/4), sets against tuples or intervals,
    a base that is missing or differs from the gold one, another time of day, and other words after a number.

    Example:
        >>> pairs = ("2516_9", "2516_8"), ("3:45 am", "3:45 pm"), (r"10\text{ oranges}", r"10\text{ apples}")
        >>> [differ(*pair) for pair in pairs]
        [True, True, True]
    """
    if NUMBERS_SIDE_BY_SIDE.fullmatch(normalized(answer)) or {_brackets(answer), _brackets(gold)} == {"round", "set"}:
        return True
    base = with_base(gold)
    return (base is not None and with_base(answer) != base) or _times_differ(answer, gold) or words_differ(answer, gold)


def chain(text: str) -> list[str]:
    r"""Return the sides of ``a=b=c`` or ``a=b``; empty for a list of equations or an equals sign in braces.

    Example:
        >>> chain("x=11=10"), chain("x=1, y=2"), chain(r"\sum_{n=1}^3 n")
        (['x', '11', '10'], [], [])
    """
    text = normalized(text)
    if "=" not in re.sub(r"\{[^{}]*\}", "", text) or "=" in "".join(re.findall(r"\{[^{}]*\}", text)):
        return []
    return [] if _NOT_A_CHAIN.search(text) else text.split("=")


def _brackets(text: str) -> str | None:
    text = normalized(text)
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    return "round" if text[:1] in ("(", "[") and text[-1:] in (")", "]") else None


def _times_differ(answer: str, gold: str) -> bool:
    if wanted := time_of_day(gold):
        return time_of_day(answer) != wanted
    match = _CLOCK.fullmatch(plain_text(answer))
    return match is not None and match[1] != plain_text(gold)


def time_of_day(text: str) -> str | None:
    """Return a time as ``3:45pm``, or None for text that is not a time with ``am`` or ``pm``.

    Example:
        >>> time_of_day("3:45 P.M."), time_of_day("3:45")
        ('3:45pm', None)
    """
    text = plain_text(text)
    return re.sub("[. ]", "", text).lower() if _CLOCK.fullmatch(text) else None


def words_differ(answer: str, gold: str) -> bool:
    r"""True if different words follow the number, at least one of them in ``\\text``.

    Example:
        >>> words_differ("10 oranges", r"10\text{ apples}"), words_differ("10", r"10\text{ apples}")
        (True, False)
    """
    if not any(_TRAILING_TEXT.search(normalized(text)) for text in (answer, gold)):
        return False
    words = _words_after(answer), _words_after(gold)
    if not all(words):
        return False
    units = known_unit(words[0]), known_unit(words[1])
    if all(units):
        return units[0] != units[1]
    stems = [{word.rstrip("s") for word in text.lower().replace(".", "").split()} for text in words]
    return not stems[0] & stems[1]


def _words_after(text: str) -> str:
    """Return the words after a number or an expression, with their power."""
    text = normalized(text)
    if (match := _TRAILING_TEXT.search(text)) and match.start() > 0:
        return match[1].strip() + re.sub("[{}]", "", match[2])
    match = _NUMBER_AND_WORDS.fullmatch(plain_text(text))
    return match[1].strip() if match else ""
