r"""Equality of two mathematical answers, and the canonical form of an answer.

An answer is untrusted text. It can make a computer algebra system run forever, exhaust memory, or overflow the stack.
Call these functions only in a process that can be killed, as :mod:`opdlab.verifiers.math.worker_process` does.

Those processes import this module, so it must not import torch.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from opdlab.verifiers.math.notation import (
    NUMBERS_SIDE_BY_SIDE,
    chain,
    differ,
    plain_text,
    same_text,
    time_of_day,
    with_base,
    without_lead_in,
    words_differ,
)
from opdlab.verifiers.quantities import Quantity, normalized, parse_quantity, same_quantity, without_assignment
from opdlab.verifiers.verifier import bounded_form


class Judgement(NamedTuple):
    """Result for one answer, with the fields of :class:`~opdlab.verifiers.Verdict`."""

    correct: bool
    extracted: str | None
    reason: str


def judge(answer: str, gold: str, boxed: bool, decided: Callable[[bool], None] | None = None) -> Judgement:
    r"""Return the judgement of an answer. There is no time limit: call it only in a process that can be killed.

    If both are plain numbers, :func:`~opdlab.verifiers.quantities.same_quantity` decides. Otherwise math-verify
    decides, first on the text as written and then without punctuation and spacing. Vetoes reject different answers that
    math-verify accepts: :func:`~opdlab.verifiers.math.notation.differ`, and a side of ``a=b=c`` that is another number
    than the gold answer.

    Args:
        answer: text in the box, or the end of a response without a box.
        gold: the gold answer.
        boxed: ``answer`` comes from a box.
        decided: called with the result before the canonical form is computed.
    """
    found = None
    if not boxed:
        found = _parse(answer)
        if not found:
            return Judgement(False, None, "no answer")
        answer = str(found[-1])
    if not answer.strip():
        return Judgement(False, None, "no answer")
    answer = without_lead_in(answer)
    if "=" not in gold:
        answer = without_assignment(answer)
    quantities = parse_quantity(gold), parse_quantity(answer)
    equal = _equal(answer, gold, *quantities, found)
    if decided is not None:
        decided(equal)
    if equal:
        return Judgement(True, _form(gold, quantities[0]), "equal")
    if None in quantities and words_differ(answer, gold):  # the canonical form would drop the words
        return Judgement(False, bounded_form(plain_text(answer)), "different")
    return Judgement(False, _form(answer, quantities[1], quantities[0]), "different")


def _equal(answer: str, gold: str, wanted: Quantity | None, quantity: Quantity | None, found: Any) -> bool:
    if wanted is not None and quantity is not None:
        return same_quantity(wanted, quantity)
    if same_text(answer, gold):
        return True
    if differ(answer, gold) or not _chain_holds(answer, gold):
        return False
    if _verify(_boxed(gold), found or _boxed(answer)):
        return True
    shorter = normalized(answer), normalized(gold)
    return shorter != (answer, gold) and bool(shorter[0]) and _verify(_boxed(shorter[1]), _boxed(shorter[0]))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # The kernel enforces the time limit; math-verify's is a Python signal handler, which cannot interrupt C code.
    found: list[Any] = parse(text, parsing_timeout=None)
    return found


def _boxed(text: str) -> list[Any]:
    text = _NUMBER_BEFORE_PARENTHESIS.sub(r"\1 \\cdot ", text)
    return _parse(f"\\boxed{{{text}}}")


def _verify(gold: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    if not gold or not found:
        return False
    if verify(gold, found, timeout_seconds=None):
        return True
    # math-verify compares an interval with a gold inequality, but not an inequality with a gold interval.
    return _is_interval(gold[0]) and _is_inequality(found[0]) and bool(verify(found, gold, timeout_seconds=None))


def _is_interval(expression: Any) -> bool:
    import sympy

    return isinstance(expression, sympy.Interval | sympy.Union)


def _is_inequality(expression: Any) -> bool:
    import sympy

    inequality = sympy.core.relational._Inequality
    parts = expression.args if isinstance(expression, sympy.And | sympy.Or) else [expression]
    return all(isinstance(part, inequality) for part in parts)


def _chain_holds(answer: str, gold: str) -> bool:
    """True if each number in ``a=b=c`` equals the gold answer, or the answer is not a chain of equations."""
    sides = chain(answer)
    gold = without_assignment(gold)
    if "=" in gold or len(sides) < 2:
        return True
    numbers = [side for side in sides if _is_number(side)]
    if len(sides) == 2 and len(numbers) < 2:
        return True
    return all(_equal(side, gold, parse_quantity(gold), parse_quantity(side), None) for side in numbers)


def _is_number(text: str) -> bool:
    if parse_quantity(text) is not None:
        return True
    found = _boxed(text)
    return bool(found) and getattr(found[0], "free_symbols", None) == set()


# latex2sympy reads a number before a number in parentheses as a mixed number: 2(3) as 5.
_NUMBER_BEFORE_PARENTHESIS = re.compile(r"(?<![\w^.])([0-9]+(?:\.[0-9]+)?)\s*(?=(?:\\left\s*)?\()")


def _form(text: str, quantity: Quantity | None, gold: Quantity | None = None) -> str:
    """Return the canonical form, or the text if there is none, as for a number with too many digits."""
    try:
        return canonical(text, quantity, gold)
    except Exception:  # SymPy raises many types; equality is already decided
        return bounded_form(normalized(text))


@functools.lru_cache(maxsize=1024)
def canonical(text: str, quantity: Quantity | None, gold: Quantity | None = None) -> str:
    r"""Return one string for equivalent notations of an answer: ``\frac{2}{4}``, ``0.5`` and ``1/2`` are ``1/2``.

    Numbers become integers or fractions, sets are sorted, expressions are evaluated by SymPy, words lose ``\text`` and
    case. A unit is kept only if the gold answer has another one. At most 200 characters.
    """
    if quantity is not None:
        dropped = gold is None or gold.unit in (None, quantity.unit)
        return bounded_form(str(quantity.value if dropped else quantity))
    words = plain_text(text)
    if re.fullmatch(r"[a-zA-Z][a-zA-Z ]+", words):
        return bounded_form(words.lower())
    notation = with_base(text) or time_of_day(text)
    if notation or NUMBERS_SIDE_BY_SIDE.fullmatch(words):
        return bounded_form(notation or words)
    found = _boxed(normalized(text))
    return bounded_form(_evaluated(found[0]) if found and not isinstance(found[0], str) else words)


def _evaluated(expression: Any) -> str:
    import sympy

    if isinstance(expression, sympy.FiniteSet):
        return "{" + ", ".join(sorted(_evaluated(item) for item in expression.args)) + "}"
    if isinstance(expression, sympy.Tuple):
        return "(" + ", ".join(_evaluated(item) for item in expression.args) + ")"
    if isinstance(expression, sympy.Eq) and isinstance(expression.lhs, sympy.Symbol):
        return _evaluated(expression.rhs)
    try:
        expression = expression.doit()
        if expression.has(sympy.Float):
            expression = sympy.nsimplify(expression, rational=True)
        if _is_small_polynomial(expression):
            expression = sympy.expand(expression)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        pass  # as it stands, then
    return str(expression)


def _is_small_polynomial(expression: Any) -> bool:
    """True if the expression is cheap to expand."""
    import sympy

    powers = expression.atoms(sympy.Pow)
    return len(list(sympy.preorder_traversal(expression))) < 60 and all(
        power.exp.is_Rational and abs(power.exp) <= 8 for power in powers
    )
