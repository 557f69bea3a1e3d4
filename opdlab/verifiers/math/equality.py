r"""Equality of two answers that :func:`opdlab.verifiers.math.reading.read` has read.

math-verify rounds numbers to six places and compares differences with 0 up to 15 digits, so it takes a small number for
its negative. Here rational numbers are compared exactly, other numbers to 40 digits, and functions at random rational
points. Expressions come from math-verify's parser (latex2sympy2_extended).

These functions have no time limit: call them only in a process that can be killed.
"""

import functools
import random
import re
from fractions import Fraction
from typing import Any

from opdlab.verifiers.math.reading import (
    EQUALITIES,
    Answer,
    Group,
    Relation,
    SetOperation,
    Single,
    plain_text,
    read_list,
)
from opdlab.verifiers.quantities import Quantity, is_rounded, same_quantity, units_differ

_DIGITS = 60
_AGREEING_DIGITS = 40
_NUM_POINTS = 6


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
    return _same_set(gold, answer)


def same_text(a: str, b: str) -> bool:
    """True if two answers are the same text. Case is ignored in words, but not in ``AB``, which may be a product.

    Example:
        >>> same_text("True", "true"), same_text("AB", "ab"), same_text("1 2", "12")
        (True, False, False)
    """
    a, b = (_LOOSE_SPACE.sub("", plain_text(text)) for text in (a, b))
    if not a or a.lower() != b.lower():
        return False
    return a == b or (_WORDS.fullmatch(a) is not None and (len(a) > 3 or a[1:] == b[1:]))


@functools.lru_cache(maxsize=256)
def expression(text: str) -> Any:
    r"""Return what math-verify's parser makes of an expression, with exact decimals; None if it cannot be read."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import I, Symbol

    if not text or _UNREADABLE.search(text):
        return None
    for pattern, replacement in _FOR_THE_PARSER:
        text = pattern.sub(replacement, text)
    try:
        found = latex2sympy(
            text, is_real=True, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
        return found.subs(Symbol("i", real=True), I) if "i" in text else found
    except MemoryError:
        raise
    except Exception:  # the parser raises bare exceptions, SymPy many types
        return None


def _same_single(gold: Single, answer: Single) -> bool:
    if gold.time or answer.time:
        return gold.time == answer.time or (not gold.time and same_text(gold.text, answer.value))
    if gold.quantity and answer.quantity:
        return same_quantity(gold.quantity, answer.quantity)
    if units_differ(gold.unit, answer.unit) or _is_word(gold.text) or _is_word(answer.text):
        return False
    if {gold.quantity and gold.quantity.base, answer.quantity and answer.quantity.base} - {None, 10}:
        return False
    values = expression(gold.value), expression(answer.value)
    if values[0] is None or values[1] is None:
        return False
    for single, other in ((gold, values[1]), (answer, values[0])):
        if single.quantity and single.quantity.places and not other.is_Matrix and other.is_number:
            return same_value(*values) or _is_rounded_value(single.quantity, other)
    return same_value(*values)


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
        if side is exact[-1] or (value is not None and value.is_number)
    )


def _same_group(gold: Group, answer: Group) -> bool:
    kinds = []
    for group in (gold, answer):
        square = group.brackets == "[]" and len(group.items) != 2  # no interval
        kinds.append("()" if square else group.brackets)
    if len(gold.items) != len(answer.items):
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
    ratios = [
        one / other if other != 0 else None for one, other in _at_points(values[1] - values[0], values[3] - values[2])
    ]
    if len(ratios) < _NUM_POINTS // 2 or None in ratios or not all(same_value(ratios[0], ratio) for ratio in ratios):
        return False
    return ratios[0] != 0 and (operators[0] in ("=", "\\ne") or ratios[0].is_positive is True)


def _same_set(gold: Answer, answer: Answer) -> bool:
    """True if two answers are equal as sets of real numbers, at least one of which is a set operation or a relation."""
    answers = gold, answer
    if not any(_is_set_like(one) for one in answers):
        return False
    symbols = [_symbols(one) for one in answers]
    if all(symbols) and symbols[0] != symbols[1]:
        return False
    sets = [_as_set(one) for one in answers]
    if sets[0] is None or sets[1] is None:
        return False
    pieces = [_pieces(one) for one in sets]
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


def same_value(a: Any, b: Any) -> bool:
    """True if two SymPy objects are equal: numbers exactly or to 40 digits, functions at random rational points."""
    if a == b:
        return True
    matrices = getattr(a, "is_Matrix", False), getattr(b, "is_Matrix", False)
    if any(matrices):
        a, b = a.doit(), b.doit()
        return all(matrices) and a.shape == b.shape and all(map(same_value, a, b))
    if not (hasattr(a, "evalf") and hasattr(b, "evalf")) or a.is_Boolean or b.is_Boolean:
        return False
    if not a.free_symbols | b.free_symbols:
        return _same_number(a, b)
    pairs = _at_points(a, b)
    return len(pairs) >= _NUM_POINTS // 2 and all(_same_number(*pair) for pair in pairs)


def _at_points(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """Return the values of two functions at random rational points, except where one is not a finite number."""
    from sympy import Rational

    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    generator = random.Random(f"{a} {b}")
    pairs = []
    for _ in range(2 * _NUM_POINTS):
        point = {s: Rational(generator.choice((-1, 1)) * generator.randint(1, 400), 127) for s in symbols}
        pair = tuple(one.subs(point) for one in (a, b))
        if all(one.is_number and one.is_finite is not False for one in pair):
            pairs.append(pair)
        if len(pairs) == _NUM_POINTS:
            break
    return pairs


def _same_number(a: Any, b: Any) -> bool:
    import sympy

    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    near = [one.evalf(_DIGITS) for one in (a, b)]
    if not all(one.is_number and one.is_finite for one in near):
        return near[0] == near[1] and near[0].is_extended_real is True
    if 0 in near:
        return bool(sympy.simplify(a - b) == 0)
    difference, scale = abs(near[0] - near[1]), max(abs(near[0]), abs(near[1]))
    if difference > scale * sympy.Float(10) ** -_AGREEING_DIGITS:
        return False
    a, b = a.doit(), b.doit()
    return bool(a == b) if a.is_Rational and b.is_Rational else True


def _is_rounded_value(decimal: Quantity, exact: Any) -> bool:
    near = exact.evalf(_DIGITS)
    if not near.is_Float or exact.doit().is_Rational:
        return False
    return is_rounded(decimal, Fraction(str(near)))


# Spaces between digits or between letters count.
_LOOSE_SPACE = re.compile("(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])|(?<=[0-9]) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=[0-9])")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_WORDS = re.compile(r"no|[a-z]{3,}|[a-z]{2,}(?: [a-z]+)+", re.IGNORECASE)
# An ellipsis, times of day, numbers side by side, primes, and comparisons have no value.
_UNREADABLE = re.compile(r"\\ldots|:[0-9]{2}(?![0-9])|:.*:|[0-9.] +[0-9]|['?!]{2}|'|[<>=]|\\begin\{cases\}")
_FOR_THE_PARSER = (
    (re.compile(r"(?<=[0-9])(?:\{,\}|,)(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\^\{\\circ\}"), r"\\frac{\\pi}{180}"),
    (
        re.compile(r"([0-9]*)\.([0-9]+)"),
        lambda found: rf"\frac{{{found[1]}{found[2]}}}{{1{'0' * len(found[2])}}}",
    ),
    # latex2sympy reads a number before a number in parentheses as a mixed number: 2(3) as 5.
    (re.compile(r"(?<![\w^.])([0-9]+)\s*(?=\()"), r"\1 \\cdot "),
)
