r"""Structure of an answer: lists, tuples, intervals, sets, relations, and the numbers, expressions and words in them.

math-verify's parser guesses where the structure is unclear: it reads ``1, 2, \ldots, n`` as 2 and ``1 2`` as 3. So the
structure is read here, from text in the spelling of :func:`opdlab.verifiers.spelling.normalized`, and the parser gets
only single expressions.
"""

import re
from dataclasses import dataclass

from opdlab.verifiers.quantities import Quantity, parse_quantity
from opdlab.verifiers.spelling import end_of_group
from opdlab.verifiers.units import split_unit

ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"


@dataclass(frozen=True)
class Answer:
    """An answer or a part of one.

    Args:
        text: normalized text.
    """

    text: str


@dataclass(frozen=True)
class Single(Answer):
    """A number, an expression or words.

    Args:
        value: the text without the unit.
        unit: the unit, or None.
        quantity: the number that ``text`` is, or None.
        time: a time of day with ``am`` or ``pm`` as ``3:45pm``, or None.
    """

    value: str
    unit: str | None = None
    quantity: Quantity | None = None
    time: str | None = None


@dataclass(frozen=True)
class Group(Answer):
    """Several answers.

    Args:
        brackets: ``()``, ``[]``, ``(]``, ``[)``, ``{}``, or empty for a list without brackets.
        items: two or more; one only in braces.
        joint: the items are inequalities that hold together, as in ``x > 1 and x < 3``.
    """

    brackets: str
    items: tuple[Answer, ...]
    joint: bool = False


@dataclass(frozen=True)
class Relation(Answer):
    """Equations, inequalities and memberships: ``a < b <= c`` has three sides and two operators."""

    sides: tuple[Answer, ...]
    operators: tuple[str, ...]

    @property
    def assigns(self) -> bool:
        """True for ``x = …``, ``f(x) = …``, ``x in …``: the first side has only symbols."""
        symbols = re.sub(r"_\{[^{}]*\}|\^\{-1\}|_[a-zA-Z0-9]", "", self.sides[0].text)
        named = _SYMBOLS.fullmatch(symbols) is not None and not re.search(r"\\(?:frac|sqrt)", symbols)
        return named and set(self.operators) <= EQUALITIES


@dataclass(frozen=True)
class Piecewise(Answer):
    """A function in pieces: each has a value and a condition, which is the text ``otherwise`` for the rest."""

    pieces: tuple[tuple[Answer, Answer], ...]


@dataclass(frozen=True)
class SetOperation(Answer):
    """A union, intersection or difference of two sets; the operator is ``cup``, ``cap`` or ``setminus``."""

    left: Answer
    operator: str
    right: Answer


EQUALITIES = {"=", "\\in", "\\approx"}


def read(text: str, letter: str | None = None) -> Answer:
    r"""Return the structure of an answer.

    Args:
        text: the answer, normalized.
        letter: see :func:`opdlab.verifiers.units.split_unit`.

    Example:
        >>> type(read(r"x<-1 \text{ or } x>1")).__name__, [item.text for item in read("(1, 2)").items]
        ('Group', ['1', '2'])
    """
    text = _without_lead_in(text)
    if match := _CLOCK.fullmatch(plain_text(text)):
        return Single(text, match[1], time=f"{match[1]}{match[2].lower()}m")
    if quantity := parse_quantity(text, letter):
        return Single(text, split_unit(text, letter)[0], quantity.unit, quantity)
    return read_list(text, letter) or _read_one(text, letter)


def read_list(text: str, letter: str | None = None) -> Group | None:
    """Return a list without brackets; None if the text has no separators.

    Example:
        >>> [item.text for item in read_list("100,200").items], read_list("x + 1")
        (['100', '200'], None)
    """
    parts, separators = _split(text, _SEPARATOR)
    if len(parts) < 2 or "," in separators:
        # Without spaces all commas separate: 1,200 is one number, and 1,200,3 are three.
        parts, separators = _split(text, _ANY_SEPARATOR)
    if len(parts) < 2:
        return None
    items = [read(part, letter) for part in parts if part]
    inequalities = any(isinstance(item, Relation) and not item.assigns for item in items)
    joint = inequalities and all("and" in separator for separator in separators)
    return Group(text, "", tuple(_flat(items)), joint)


def plain_text(text: str) -> str:
    r"""Return the text without braces and ``\text`` commands.

    Example:
        >>> plain_text(r"\text{ Evelyn }")
        'Evelyn'
    """
    return " ".join(re.sub(r"\\text(?![a-zA-Z])|[{}]", " ", text).split())


def _read_one(text: str, letter: str | None) -> Answer:
    if match := _CASES.fullmatch(text):
        return _read_cases(text, match[1]) or Single(text, text)
    parts, operators = _split(text, _SET_OPERATOR)
    if len(parts) > 1:
        answer = read(parts[0], letter)
        for operator, part in zip(operators, parts[1:], strict=True):
            answer = SetOperation(text, answer, operator.strip().lstrip("\\"), read(part, letter))
        return answer
    parts, operators = _split(text, _RELATION)
    if len(parts) > 1:
        sides = tuple(read(part, letter) for part in parts)
        return Relation(text, sides, tuple(operator.strip() for operator in operators))
    if bracketed := _read_bracketed(text, letter):
        return bracketed
    if "\\pm" in text or "\\mp" in text:
        both = (text.replace("\\pm", a).replace("\\mp", b).strip() for a, b in (("+", "-"), ("-", "+")))
        return Group(text, "", tuple(_flat([read(one.removeprefix("+").strip(), letter) for one in both])))
    return Single(text, *split_unit(text, letter))


def _read_cases(text: str, inner: str) -> Answer | None:
    """Return a system of relations as a list, a function in pieces, or None if it is neither."""
    rows = [row for row in _split(inner, _ROW)[0] if row]
    aligned = [re.sub(rf"& *(?={_RELATION.pattern})|(?<=[<>=]) *&", "", row) for row in rows]
    if rows and not any("&" in row or _CONDITION.search(row) for row in aligned):
        items = [read(row.rstrip(" ,;.")) for row in aligned]
        if not all(isinstance(item, Relation) for item in items):
            return None
        joint = any(isinstance(item, Relation) and not item.assigns for item in items)
        return Group(text, "", tuple(items), joint) if len(items) > 1 else items[0]
    pieces = []
    for row in rows:
        row = _CONDITION.sub(lambda found: "&\\text{" if found[1] else "&", row, count=1)
        parts = _split(row, _CELL)[0]
        if len(parts) != 2 or not all(parts):
            return None
        value, condition = (part.strip(" ,;.") for part in parts)
        otherwise = _OTHERWISE.fullmatch(plain_text(condition)) is not None
        pieces.append((read(value), Single("otherwise", "otherwise") if otherwise else read(condition)))
    return Piecewise(text, tuple(pieces)) if pieces else None


def _read_bracketed(text: str, letter: str | None) -> Answer | None:
    opening, closing = (2 if text.startswith("\\{") else 1), (2 if text.endswith("\\}") else 1)
    brackets = text[:opening][-1:] + text[-closing:][-1:]
    if brackets not in ("()", "[]", "(]", "[)", "{}") or (brackets == "{}") != (opening + closing == 4):
        return None
    inner = text[opening:-closing].strip()
    if not inner or not _split(inner, _NEVER)[0]:
        return None
    if brackets == "{}" and (match := _SET_BUILDER.match(inner)):
        return read(inner[match.end() :], letter)
    items = read_list(inner, letter)  # (12,102) is a pair
    if items is None and brackets != "{}":
        return read(inner, letter)
    return Group(text, brackets, items.items if items else (read(inner, letter),))


def _flat(items: list[Answer]) -> list[Answer]:
    r"""Return the items, with lists such as that of ``1 \pm 2`` replaced by their items."""
    return [
        part
        for item in items
        for part in (item.items if isinstance(item, Group) and not item.brackets and not item.joint else (item,))
    ]


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Return the parts between separators outside of all brackets, and the separators; no parts for open brackets."""
    parts, separators, depth, start, position = [], [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position].strip())
            separators.append(match[0])
            start = position = match.end()
            continue
        match = _BRACKET.match(text, position)
        if match:
            depth += -1 if match[1] else 1 if match[2] else 0
            if depth < 0:
                return [], []
        position = match.end() if match else position + 1
    return ([*parts, text[start:].strip()], separators) if depth == 0 else ([], [])


def _without_lead_in(text: str) -> str:
    text = text.strip()
    while text.startswith("{") and end_of_group(text, 0) == len(text):
        text = text[1:-1].strip()
    if match := _ALL_TEXT.fullmatch(text):
        text = match[1].strip()
    for pattern in (_LEAD_IN, _ASIAN_LEAD_IN, _ABOUT):
        if (match := pattern.match(text)) and match.end() < len(text):
            text = text[match.end() :].removeprefix("}").strip()
    return text


_CASES = re.compile(r"\\begin *\{(?:cases|aligned|gathered|split)\}(.*)\\end *\{(?:cases|aligned|gathered|split)\}")
_ROW = re.compile(r" *\\\\(?: *\[[0-9a-z. ]*\])? *")
_CELL = re.compile(r" *&[& ]*")
# What introduces the condition of a piece; the words after it stay.
_CONDITION = re.compile(
    r"[& ]*(?:\\text\{ *(?:,? *(?:if|when|for|where) *\}|,? *(?:if|when|for|where) +(?=[^{}]*(\})))"
    r"|(?<![a-zA-Z\\])(?:if|when|for|where)(?![a-zA-Z])|(?=\\text\{ *(?:otherwise|else)))[& ]*|[& ]*&[& ]*"
)
_OTHERWISE = re.compile(r"(?:otherwise|else)")
_SYMBOLS = re.compile(r"[a-zA-Z\\ (),{}'|]+")
_WORD_SEPARATOR = (
    r"\\text\{ *,? *(?:and|or|[\u548c\u6216\u4e0e]) *,? *\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[\u548c\u6216\u4e0e]"
)
_COMMA = r"(?<![0-9]),|,(?![0-9]{3}(?![0-9]))"
_SEPARATOR = re.compile(rf" *(?:(?:{_COMMA}|;|\\\\|{_WORD_SEPARATOR}) *)+")
_ANY_SEPARATOR = re.compile(rf" *(?:(?:,|;|\\\\|{_WORD_SEPARATOR}) *)+")
_SET_OPERATOR = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|sim|notin|to|mapsto|subset(?:eq)?)(?![a-zA-Z])|[<>=]")
_NEVER = re.compile("(?!)")
_BRACKET = re.compile(
    r"(\\end\{[a-z]+\*?\}|\\\}|\\r(?:floor|ceil|angle)|[)\]}])"
    r"|(\\begin\{[a-z]+\*?\}|\\\{|\\l(?:floor|ceil|angle)|[(\[{])|\\\\|\\[a-zA-Z]+"
)
_SET_BUILDER = re.compile(r"[a-zA-Z] *(?:\\in *\\mathbb *\{?R\}?)? *(?:\\mid|:|\|)")
_CLOCK = re.compile(r"([0-9]{1,2}(?::[0-9]{2}){0,2}) *([ap])\.? *m\.?", re.IGNORECASE)
_ALL_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_LEAD_IN = re.compile(
    r"(?:\\text\{ *)?(?:(?:so|thus|hence|therefore),? +)?the +(?:final +)?answer +is *:?\s*", re.IGNORECASE
)
# "Not", "negative", "minus", "below", "less than" and the like are no lead-in.
_ASIAN_LEAD_IN = re.compile(
    r"(?:\\text\{)?(?:(?![\u4e0d\u975e\u8d1f\u8ca0\u51cf\u672a\u65e0\u7121\u6ca1\u6c92\u96f6]|.[\u4e8e\u65bc]|\u8d85\u8fc7)"
    rf"[{ASIAN},:; ])+(?=\}}?[^{ASIAN},:; }}])"
)
_ABOUT = re.compile(r"(?:\\approx(?![a-zA-Z])|\\sim(?![a-zA-Z])|=) *")
