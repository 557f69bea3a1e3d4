r"""Numbers with units in answers, read strictly and exactly.

Graders of mathematical expressions misread common forms of plain numbers: math-verify reads ``1 000`` as 0 and
``2 3/4`` as 5/4, takes ``4t`` for 4, and rounds ``\frac{1}{2^{98}}`` to 0. This module reads numbers as exact
fractions. It uses regular expressions on bounded text, and rejects ambiguous text. Texts are in the spelling of
:func:`opdlab.verifiers.spelling.normalized`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from opdlab.verifiers.units import FACTORS, PERCENT, split_unit, units_differ

_MAX_CHARACTERS = 200
_MAX_EXPONENT = 400
# A decimal with fewer places or significant digits than this does not equal a rounded number: 0.33 is not 1/3.
_MIN_ROUNDED_DIGITS = 6


@dataclass(frozen=True)
class Quantity:
    """A plain number with an optional unit.

    Args:
        value: value as written; 50 for 50 %.
        unit: name of the unit as :func:`opdlab.verifiers.units.parse_unit` returns it, or None.
        places: digits after the decimal point; None for an exact notation.
        base: base of the digits.
    """

    value: Fraction
    unit: str | None = None
    places: int | None = None
    base: int = 10

    def __str__(self) -> str:
        return f"{self.value} {self.unit}" if self.unit else str(self.value)


def parse_quantity(text: str, letter: str | None = None) -> Quantity | None:
    r"""Return the plain number in ``text``, with or without a unit; None for anything else.

    Accepted: integers, decimals, fractions (``3/4``, ``\frac{3}{4}``), mixed numbers with a proper fraction (``1 1/2``,
    ``1\frac{1}{2}``), thousands in groups of three (``1,000``, ``1 000``), ``3{,}14``, ``1.2e5``,
    ``1.2 \times 10^{5}``, repeating decimals (``0.1\overline{6}``, ``0.(3)``, ``0.333\ldots``), ``-37_{8}``,
    ``FF_{16}``; signs, currencies, units (see :func:`opdlab.verifiers.units.split_unit`), and ``million`` and similar
    words. Rejected, because they may be lists, products, terms of a sequence, or cut off: ``3,14``, ``1 2``,
    ``2 3/2``, ``5m``, ``2a_{12}``, ``F_{16}``, ``0.33\ldots``.

    Args:
        text: the answer, normalized.
        letter: see :func:`opdlab.verifiers.units.split_unit`.

    Example:
        >>> [str(parse_quantity(text)) for text in ("1 250.50", "1 1/2", r"\$5", r"10\text{ cm}^{2}", "3,14")]
        ['2501/2', '3/2', '5 dollar', '10 cm^2', 'None']
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    text, unit = split_unit(text, letter)
    if match := _BASED.fullmatch(text):
        return None if unit else _in_base(*match.groups(""))
    if not (match := _SIGNED.fullmatch(text)):
        return None
    sign, text, word = match.groups()
    number = _number(text.strip())
    if number is None:
        return None
    value, places = number
    factor = FACTORS[word.lower()] if word else 1
    return Quantity((-1 if sign == "-" else 1) * value * factor, unit, None if word else places)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """True if two quantities count as equal.

    Values are compared exactly. A decimal of at least six places and digits also equals a fraction without a finite
    decimal, if it is that fraction rounded. A unit may be missing on one side, but two units must be the same; units
    are not converted. ``50%`` equals 50 (missing unit) and 0.5 (same value); 50 does not equal 0.5.

    Example:
        >>> same, read = same_quantity, parse_quantity
        >>> pairs = ("10", "10 cm"), ("10 m", "10 cm"), ("1/3", "0.333333"), ("1/3", "0.33"), ("37_{8}", "37")
        >>> [same(read(gold), read(answer)) for gold, answer in pairs]
        [True, False, True, False, False]
    """
    if units_differ(gold.unit, answer.unit) or gold.base != answer.base:
        return False
    pairs = [(gold, answer)]
    if {gold.unit, answer.unit} == {PERCENT, None}:
        pairs.append((_without_percent(gold), _without_percent(answer)))
    return any(a.value == b.value or _rounds_to(a, b) or _rounds_to(b, a) for a, b in pairs)


def is_rounded(decimal: Quantity, exact: Fraction) -> bool:
    """True if ``decimal`` has at least six places and digits, and is ``exact`` rounded to its places.

    Example:
        >>> [is_rounded(parse_quantity(text), Fraction(1, 3)) for text in ("0.333333", "0.333334", "0.33")]
        [True, False, False]
    """
    places = decimal.places or 0
    digits = len(str(abs(decimal.value.numerator) * 10**places // decimal.value.denominator)) if places > 0 else 0
    return min(places, digits) >= _MIN_ROUNDED_DIGITS and round(exact, places) == decimal.value


def _in_base(sign: str, whole: str, places: str, base: str) -> Quantity | None:
    number, digits = int(base), whole + places
    if not 2 <= number <= 36 or any(int(digit, 36) >= number for digit in digits):
        return None
    value = Fraction(int(digits, number), number ** len(places))
    return Quantity(-value if sign == "-" else value, base=number)


def _number(text: str) -> tuple[Fraction, int | None] | None:
    """Return value and decimal places of the unsigned number that is the whole text, or None."""
    if match := _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text):
        whole, *parts = match.groups("")
        upper, lower = (Fraction(part) for part in parts)
        if lower == 0 or (whole and not 0 < upper < lower):  # 2 3/2 may be a product
            return None
        return int(whole or 0) + upper / lower, None
    if match := _REPEATING.fullmatch(text) or _ELLIPSIS.fullmatch(text):
        whole, start, *written = match.groups("")
        repeated = "".join(written)
        numerator = int(whole + start + repeated) - int("0" + whole + start)
        return Fraction(numerator, (10 ** len(repeated) - 1) * 10 ** len(start)), None
    if not (match := _DECIMAL.fullmatch(text)):
        return None
    power, whole, places, comma_places, *exponents = match.groups("")
    digits, places = "1" if power else re.sub("[^0-9]", "", whole), places or comma_places
    exponent = int("".join([power, *exponents]) or 0)
    if not digits + places or abs(exponent) > _MAX_EXPONENT:  # 10**10**9 would exhaust memory
        return None
    value = Fraction(int(digits + places), 10 ** len(places)) * Fraction(10) ** exponent
    return value, len(places) - exponent if places else None


def _rounds_to(decimal: Quantity, exact: Quantity) -> bool:
    rest = exact.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1 and is_rounded(decimal, exact.value)


def _without_percent(quantity: Quantity) -> Quantity:
    if quantity.unit != PERCENT:
        return quantity
    return Quantity(quantity.value / 100, None, None if quantity.places is None else quantity.places + 2)


_DIGITS = r"-?[0-9]+(?:\.[0-9]+)?"
_SIGNED = re.compile(rf"([+-]?) *(.*?)(?: *({'|'.join(FACTORS)}))?", re.IGNORECASE)
# One letter without a digit may be a term of a sequence.
_BASED = re.compile(
    r"([+-]?) *\(?([0-9A-Z]*[0-9][0-9A-Z]*|[A-Z]{2,}|(?=\.))(?:\.([0-9A-Z]+))?\)? *_\{[ (]*([0-9]{1,2})[ )]*\}"
)
_FRACTION = re.compile(rf"(?:([0-9]+) *)?\\frac\{{ *({_DIGITS}) *\}}\{{ *({_DIGITS}) *\}}")
_SLASHED = re.compile(r"(?:([0-9]+) +)?([0-9]+) */ *([0-9]+)")
# Digits under a bar, between dots, or in parentheses right after the point: 0.1(6) may be a product.
_REPEATING = re.compile(
    r"([0-9]*)\.(?:([0-9]*)(?:\\(?:overline|bar) *(?:\{ *([0-9]+) *\}|([0-9]))"
    r"|\\dot *\{? *([0-9]) *\}?(?:([0-9]*)\\dot *\{? *([0-9]) *\}?)?)|\(([0-9]+)\))"
)
# Digits written three times, or several together twice, before an ellipsis. Zeros are places of a rounded number.
_ELLIPSIS = re.compile(r"([0-9]*)\.([0-9]*?)(?:([1-9])\3{2,}|(?!0+ *\\ldots)([0-9]{2,}?)\4+) *\\ldots")
_WHOLE = r"([1-9][0-9]{0,2}(?:\{,\}[0-9]{3})+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)?"
_EXPONENT = r"\^\{ *([+-]?[0-9]+) *\}"
_DECIMAL = re.compile(
    rf"10{_EXPONENT}|{_WHOLE}(?:\.([0-9]+)|\{{,\}}([0-9]{{1,2}}(?![0-9])|[0-9]{{4,}}))?"
    rf"(?:[eE]([+-]?[0-9]+)| *(?:\\times|\\cdot|\*) *10{_EXPONENT})?"
)
