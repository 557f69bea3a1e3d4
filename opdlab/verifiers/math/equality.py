r"""Equality of two answers that :func:`opdlab.verifiers.math.reading.read` has read.

These functions have no time limit: call them only in a process that can be killed.
"""

import re
from typing import Any

from opdlab.verifiers.math.reading import (
    EQUALITIES,
    Answer,
    Group,
    Piecewise,
    Relation,
    SetOperation,
    Single,
    plain_text,
    read_list,
)
from opdlab.verifiers.math.values import MIN_POINTS, at_points, expression, rounds_to, same_value
from opdlab.verifiers.quantities import parse_quantity, same_quantity
from opdlab.verifiers.units import units_differ


def same(gold: Answer, answer: Answer) -> bool:
    r"""True if two answers are equal.

    Lists and sets are compared without order, tuples and intervals with it. Inequalities equal the sets of their
    solutions, and equations equal their multiples. ``x = 5`` equals 5, but not ``y = 5``. In ``a = b = c`` every number
    must equal the gold answer.

    Example:
        >>> from opdlab.verifiers.math.reading import read
        >>> pairs = ("1, 2", "2, 1"), ("(1, 2)", "(2, 1)"), ("x", "y = x"), ("10", "x = 11 = 10")
        >>> [same(read(gold), read(answer)) for gold, answer in pairs]
        [True, False, True, False]
    """
    if same_text(gold.text, answer.text):
        return True
    gold, answer = (one.items[0] if isinstance(one, Group) and len(one.items) == 1 else one for one in (gold, answer))
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if gold.assigns and answer.assigns and same_text(gold.sides[0].text, answer.sides[0].text):
            return same(gold.sides[-1], answer.sides[-1]) and _chain_holds(gold.sides[-1], answer)
        return _same_relation(gold, answer) or _same_set(gold, answer)
    if isinstance(gold, Relation) and gold.assigns:
        return same(gold.sides[-1], answer)
    if isinstance(answer, Relation) and set(answer.operators) <= EQUALITIES:
        return _chain_holds(gold, answer)
    if isinstance(gold, Single) and isinstance(answer, Single):
        return _same_single(gold, answer)
    if isinstance(gold, Single) and isinstance(answer, Group):
        gold = read_list(gold.text) or gold if gold.quantity else gold  # 100,200 is a number or a list
    elif isinstance(gold, Group) and isinstance(answer, Single):
        answer = read_list(answer.text) or answer if answer.quantity else answer
    if isinstance(gold, Group) and isinstance(answer, Group) and _same_group(gold, answer):
        return True
    pieces = isinstance(gold, Piecewise) and isinstance(answer, Piecewise) and _same_pieces(gold, answer)
    return pieces or _same_set(gold, answer)


def same_text(a: str, b: str) -> bool:
    """True if two answers are the same text. Case is ignored in words, but not in ``AB``, which may be a product.

    Example:
        >>> same_text("True", "true"), same_text("AB", "ab"), same_text("1 2", "12")
        (True, False, False)
    """
    a, b = (_LOOSE_SPACE.sub("", " ".join(_TEXT.sub(r" \1 ", text).split())) for text in (a, b))
    if not a or a.lower() != b.lower():
        return False
    return a == b or (_WORDS.fullmatch(a) is not None and (len(a) > 3 or a[1:] == b[1:]))


def _same_single(gold: Single, answer: Single) -> bool:
    if gold.time or answer.time:
        return gold.time == answer.time or (not gold.time and same_text(gold.text, answer.value))
    if gold.quantity and answer.quantity:
        return same_quantity(gold.quantity, answer.quantity)
    if {gold.quantity and gold.quantity.base, answer.quantity and answer.quantity.base} - {None, 10}:
        # Digits in lower case count if the other side has them in upper case: 2a_{12} alone may be a product.
        first, second = (single.quantity or parse_quantity(single.value.upper()) for single in (gold, answer))
        return first is not None and second is not None and same_quantity(first, second)
    if units_differ(gold.unit, answer.unit) or _is_word(gold.text) or _is_word(answer.text):
        return False
    values = expression(gold.value), expression(answer.value)
    if values[0] is None or values[1] is None:
        return False
    if same_value(*values):
        return True
    return any(
        single.quantity is not None and rounds_to(single.quantity, other)
        for single, other in ((gold, values[1]), (answer, values[0]))
    )


def _is_word(text: str) -> bool:
    return re.fullmatch("[A-Z]{3,}|[a-zA-Z]{4,}|[a-zA-Z]+(?: [a-zA-Z]+)+", plain_text(text)) is not None


def _chain_holds(gold: Answer, answer: Relation) -> bool:
    r"""True if each number in ``a = b = c`` and the last side equal the gold answer; after ``\approx`` one suffices.

    ``m + n = 5`` equals 5, but ``2x = 5`` does not: it may be an equation for ``x``.
    """
    sides = answer.sides[1:] if answer.assigns else answer.sides
    exact = [sides[0]]
    for side, operator in zip(sides[1:], answer.operators[len(answer.sides) - len(sides) :], strict=True):
        if operator == "\\approx" and same(gold, side):
            return True
        if operator == "\\approx":
            break
        exact.append(side)
    values = [expression(side.value) if isinstance(side, Single) else None for side in exact[:-1]]
    if not answer.assigns and values and values[0] is not None and len(values[0].free_symbols) == 1:
        return False
    return all(
        same(gold, side)
        for side, value in zip(exact, [*values, None], strict=True)
        if side is exact[-1] or getattr(value, "is_number", False)
    )


def _same_group(gold: Group, answer: Group) -> bool:
    kinds = []
    for group in (gold, answer):
        square = group.brackets == "[]" and len(group.items) != 2  # no interval
        kinds.append("()" if square else group.brackets)
    if len(gold.items) != len(answer.items) or gold.joint != answer.joint:
        return False
    if set(kinds) <= {"", "{}"}:
        left = list(answer.items)
        for item in gold.items:
            match = next((other for other in left if same(item, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    if kinds[0] == kinds[1] or set(kinds) == {"", "()"}:
        return all(map(same, gold.items, answer.items))
    return False


def _same_pieces(gold: Piecewise, answer: Piecewise) -> bool:
    """True if the pieces are equal in any order; ``otherwise`` equals the real numbers without other conditions."""
    left = list(answer.pieces)
    rest = []
    for piece in gold.pieces:
        match = next((other for other in left if all(map(same, piece, other))), None)
        left.remove(match) if match else rest.append(piece)
    if len(rest) != 1 or len(left) != 1 or not same(rest[0][0], left[0][0]):
        return not rest and not left
    stated = [condition for _, condition in (rest[0], left[0]) if condition.text != "otherwise"]
    others = [condition for value, condition in gold.pieces if (value, condition) != rest[0]]
    if len(stated) != 1:
        return False
    import sympy

    try:
        sets = [_as_set(one) for one in (*stated, *others)]
        return None not in sets and sympy.Reals - sympy.Union(*sets[1:]) == sets[0]
    except (AttributeError, NotImplementedError, TypeError, ValueError):  # a condition on several variables
        return False


def _same_relation(gold: Relation, answer: Relation) -> bool:
    operators, sides = answer.operators, answer.sides
    if gold.operators != operators:
        operators = tuple(_FLIPPED.get(operator, operator) for operator in reversed(operators))
        sides = sides[::-1]
    if gold.operators != operators:
        return False
    if all(map(same, gold.sides, sides)):
        return True
    if len(operators) > 1 or operators[0] not in ("=", *_FLIPPED):
        return False
    values = [expression(side.text) for side in (*gold.sides, *sides)]
    if any(value is None or not getattr(value, "is_commutative", False) for value in values):
        return False
    pairs = at_points(values[1] - values[0], values[3] - values[2])
    if len(pairs) < MIN_POINTS or any(one == 0 or other == 0 for one, other in pairs):
        return False
    ratios = [one / other for one, other in pairs]
    constant = all(same_value(ratios[0], ratio) for ratio in ratios)
    return constant and (operators[0] in ("=", "\\ne") or ratios[0].is_positive is True)


def _same_set(gold: Answer, answer: Answer) -> bool:
    """True if two answers are equal as sets of real numbers, at least one of which is a set operation or a relation."""
    answers = gold, answer
    if not any(_is_set_like(one) for one in answers):
        return False
    symbols = [_symbols(one) for one in answers]
    if all(symbols) and symbols[0] != symbols[1]:
        return False
    try:
        sets = [_as_set(one) for one in answers]
        if sets[0] is None or sets[1] is None:
            return False
        pieces = [_pieces(one) for one in sets]
    except (NotImplementedError, TypeError, ValueError):  # several variables, or unordered numbers
        return False
    return sets[0] == sets[1] or (
        len(pieces[0]) == len(pieces[1])
        and all(kind == other and all(map(same_value, a, b)) for (kind, a), (other, b) in zip(*pieces, strict=True))
    )


def _is_set_like(answer: Answer) -> bool:
    if isinstance(answer, Group) and not answer.brackets:
        return any(_is_set_like(item) for item in answer.items)
    return isinstance(answer, SetOperation | Relation) or answer.text.startswith(("\\mathbb", "\\emptyset"))


def _symbols(answer: Answer) -> set[str]:
    """Return the variables of relations; a set in brackets has none."""
    if isinstance(answer, Relation):
        values = [expression(side.text) for side in answer.sides]
        return {str(symbol) for value in values if value is not None for symbol in value.free_symbols}
    if isinstance(answer, Group) and not answer.brackets:
        return set().union(*(_symbols(item) for item in answer.items))
    return set()


def _as_set(answer: Answer) -> Any:
    import sympy

    if isinstance(answer, SetOperation):
        left, right = _as_set(answer.left), _as_set(answer.right)
        names = {"cup": "union", "cap": "intersect", "setminus": "__sub__"}
        return None if left is None or right is None else getattr(left, names[answer.operator])(right)
    if isinstance(answer, Relation):
        values = [expression(side.text) for side in answer.sides]
        if answer.assigns and answer.operators == ("\\in",):
            return _as_set(answer.sides[1])
        if None in values or not set(answer.operators) <= set(_FLIPPED):
            return None
        pairs = zip(values, answer.operators, values[1:], strict=False)
        relations = [sympy.Rel(left, right, operator.lstrip("\\")) for left, operator, right in pairs]
        return sympy.And(*relations).as_set()
    if isinstance(answer, Group):
        if not answer.brackets and any(map(_is_set_like, answer.items)):
            sets = [_as_set(item) for item in answer.items]
            join = sympy.Intersection if answer.joint else sympy.Union
            return None if None in sets else join(*sets)
        values = [expression(item.value) if isinstance(item, Single) else None for item in answer.items]
        if None in values:
            return None
        if answer.brackets in ("", "{}"):
            return sympy.FiniteSet(*values)
        if len(values) == 2:
            return sympy.Interval(*values, answer.brackets[0] == "(", answer.brackets[1] == ")")
        return None
    found = expression(answer.text)
    return found.doit() if isinstance(found, sympy.Set) else None


def _pieces(found: Any) -> list[tuple[str, list[Any]]]:
    """Return the intervals and points of a set of real numbers in ascending order: a kind and its numbers."""
    import sympy

    pieces: list[tuple[str, list[Any]]] = []
    for part in found.args if isinstance(found, sympy.Union) else [found]:
        if isinstance(part, sympy.Interval):
            pieces.append((f"{part.left_open} {part.right_open}", [part.start, part.end]))
        elif isinstance(part, sympy.FiniteSet):
            pieces += [("point", [point]) for point in part.args]
        else:
            pieces.append((str(part), []))
    return sorted(pieces, key=lambda piece: [float(number) for number in piece[1]])


_TEXT = re.compile(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}")
# Spaces between digits or between letters count.
_LOOSE_SPACE = re.compile("(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])|(?<=[0-9]) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=[0-9])")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_WORDS = re.compile(r"no|[a-z]{3,}|[a-z]{2,}(?: [a-z]+)+", re.IGNORECASE)
