r"""Values of single expressions: numbers and functions.

math-verify rounds numbers to six places and compares differences with 0 up to 15 digits, so it takes a small number for
its negative. Here rational numbers are compared exactly, other numbers to 490 digits, and functions at random rational
points. Expressions come from math-verify's parser (latex2sympy2_extended).

These functions have no time limit: call them only in a process that can be killed.
"""

import functools
import random
import re
from fractions import Fraction
from typing import Any

from opdlab.verifiers.quantities import Quantity, is_rounded
from opdlab.verifiers.units import ANGLE

_PRECISIONS = (60, 500)  # digits; the second only where two numbers agree to the first
_NUM_POINTS = 6
MIN_POINTS = 3


@functools.lru_cache(maxsize=256)
def expression(text: str) -> Any:
    r"""Return what math-verify's parser makes of an expression, with exact decimals; None if it cannot be read."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import I, Symbol

    if not text or _UNREADABLE.search(text):
        return None
    text = text.replace("^{\\circ}", r"\frac{\pi}{180}" if ANGLE.search(text) else "")
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


def same_value(a: Any, b: Any) -> bool:
    """True if two SymPy objects are equal: numbers exactly or to 490 digits, functions at random rational points."""
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
    pairs = at_points(a, b)
    return len(pairs) >= MIN_POINTS and all(_same_number(*pair) for pair in pairs)


def at_points(a: Any, b: Any) -> list[tuple[Any, Any]]:
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
    for digits in _PRECISIONS:
        near = [one.evalf(digits) for one in (a, b)]
        if not all(one.is_number and one.is_finite for one in near):
            return near[0] == near[1] and near[0].is_extended_real is True
        if 0 in near:
            return bool(sympy.simplify(a - b) == 0)
        if abs(near[0] - near[1]) > max(map(abs, near)) * sympy.Float(10) ** (10 - digits):
            return False
    a, b = a.doit(), b.doit()
    return bool(a == b) if a.is_Rational and b.is_Rational else True


def rounds_to(decimal: Quantity, exact: Any) -> bool:
    """True if a decimal is an irrational number rounded; see :func:`opdlab.verifiers.quantities.is_rounded`."""
    if not decimal.places or not getattr(exact, "is_number", False):
        return False
    near = exact.evalf(_PRECISIONS[0])
    return near.is_Float and not exact.doit().is_Rational and is_rounded(decimal, Fraction(str(near)))


# An ellipsis, times of day, numbers side by side, primes, and comparisons have no value.
_UNREADABLE = re.compile(
    r"\\ldots|:[0-9]{2}(?![0-9])|:.*:|[0-9.] +[0-9]|['?!]{2}|'|[<>]|=(?![^{}]*\})|\\begin\{cases\}"
)
_FOR_THE_PARSER = (
    (re.compile(r"(?<=[0-9])(?:\{,\}|,)(?=[0-9]{3}(?![0-9]))"), ""),
    (
        re.compile(r"([0-9]*)\.([0-9]+)"),
        lambda found: rf"\frac{{{found[1]}{found[2]}}}{{1{'0' * len(found[2])}}}",
    ),
    # latex2sympy reads a number before a number in parentheses as a mixed number: 2(3) as 5.
    (re.compile(r"(?<![\w^.])([0-9]+)\s*(?=\()"), r"\1 \\cdot "),
)
