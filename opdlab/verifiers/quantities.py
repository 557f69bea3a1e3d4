r"""Plain numbers in answers, read strictly and exactly.

Graders of mathematical expressions misread common forms of plain numbers: math-verify reads ``1 000`` as 0 and
``2 3/4`` as 5/4, and accepts ``10 cm`` as ``10 m``. This module reads such answers as an exact fraction with a unit.
It uses regular expressions on bounded text, and rejects ambiguous text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_MAX_CHARACTERS = 200
_MAX_EXPONENT = 400
# A decimal with fewer places than this does not equal a rounded fraction: 0.33 is not 1/3.
_MIN_ROUNDED_PLACES = 6

PERCENT = "%"


@dataclass(frozen=True)
class Quantity:
    """A plain number with an optional unit.

    Args:
        value: value as written; 50 for 50 %.
        unit: canonical name of the unit, or None.
        places: digits after the decimal point; None for an exact notation.
    """

    value: Fraction
    unit: str | None = None
    places: int | None = None

    def __str__(self) -> str:
        return f"{self.value} {self.unit}" if self.unit else str(self.value)


def parse_quantity(text: str) -> Quantity | None:
    r"""Return the plain number in ``text``, with or without a unit; None for anything else.

    Accepted: integers, decimals, fractions (``3/4``, ``\frac34``), mixed numbers with a proper fraction (``1 1/2``,
    ``1\frac12``), thousands in groups of three (``1,000``, ``1 000``, ``1\,000``), ``3{,}14``, ``1.2e5``,
    ``1.2 \times 10^5``; signs, currencies, percent, units from a list, and ``million`` and
    similar words. Rejected, because they may be lists or products: ``3,14``, ``1 2``, ``2 3/2``, ``5m``.

    Example:
        >>> [str(parse_quantity(text)) for text in (r"1\,250.50", "1 1/2", r"\$5", r"10\text{ cm}^2", "3,14")]
        ['2501/2', '3/2', '5 dollar', '10 cm^2', 'None']
    """
    if len(text) > _MAX_CHARACTERS:
        return None
    match = _PREFIX.match(text := normalized(text))
    assert match is not None  # all of it is optional
    before, currency, after = match.groups()
    number = _number_at(text, match.end())
    if number is None or (before and after):
        return None
    value, places, end = number
    suffix = _suffix(text[end:])
    if suffix is None or (currency and suffix[1]):
        return None
    factor, unit = suffix
    if currency:
        unit = _UNITS[currency.lstrip("\\")]
    sign = 1 if {before, after} <= {"", "+"} else -1
    return Quantity(sign * factor * value, unit, places if factor == 1 else None)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """True if two quantities count as equal.

    Values are compared exactly. A decimal of at least six places also equals a fraction without a finite decimal, if
    it is that fraction rounded. A unit may be missing on one side, but two units must be the same; units are not
    converted. ``50%`` equals 50 (missing unit) and 0.5 (same value); 50 does not equal 0.5.

    Example:
        >>> same, read = same_quantity, parse_quantity
        >>> pairs = ("10", "10 cm"), ("10 m", "10 cm"), ("1/3", "0.333333"), ("1/3", "0.33")
        >>> [same(read(gold), read(answer)) for gold, answer in pairs]
        [True, False, True, False]
    """
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if _same_number(gold, answer):
        return True
    if {gold.unit, answer.unit} != {PERCENT, None}:
        return False
    return _same_number(_without_percent(gold), _without_percent(answer))


def normalized(text: str) -> str:
    r"""Return the text without surrounding dollars, spacing commands, and final punctuation and line breaks.

    Example:
        >>> normalized(r"$\dfrac{1}{2}\,.$"), normalized(r"\left(1,~2\right).")
        ('\\frac{1}{2}', '(1, 2)')
    """
    text = _SPACES.sub(" ", text.replace("\\!", "").replace("\u2212", "-")).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)]
    text = _EMPTY_COMMANDS.sub("", text)
    text = _FRAC.sub(r"\\frac", text).strip()
    end = len(text)
    while end and (text[end - 1] in ".,;: " or text.endswith("\\\\", 0, end)):  # linear time
        end -= 1 if text[end - 1] in ".,;: " else 2
    return text[:end]


def without_assignment(text: str) -> str:
    """Return the text without the ``x =`` before a value.

    Example:
        >>> without_assignment("x = 5"), without_assignment("2x = 5")
        ('5', '2x = 5')
    """
    return _ASSIGNMENT.sub("", text) if text.count("=") == 1 else text


def parse_number(text: str) -> Fraction | None:
    """Return the unsigned number without a unit in ``text``; None for anything else.

    Example:
        >>> parse_number("1.50"), parse_number("1e999999999"), parse_number("1/0")
        (Fraction(3, 2), None, None)
    """
    number = _number_at(text, 0) if len(text) <= _MAX_CHARACTERS else None
    return number[0] if number is not None and number[2] == len(text) else None


def _number_at(text: str, start: int) -> tuple[Fraction, int | None, int] | None:
    """Return value, decimal places and end of the number at ``start``, or None."""
    for pattern in (_LATEX_FRACTION, _SLASHED_FRACTION):
        if match := pattern.match(text, start):
            whole, *parts = match.groups("")
            fraction = _fraction(whole, *filter(None, parts))
            return None if fraction is None else (fraction, None, match.end())
    if match := _POWER.match(text, start):
        power = _power_of_ten(match[1] or match[2])
        return None if power is None else (power, None, match.end())
    match = _DECIMAL.match(text, start)
    assert match is not None  # all of it is optional
    whole, places, comma_places, *exponents = match.groups("")
    digits, places = re.sub(r"[^0-9]", "", whole), places or comma_places
    exponent = "".join(exponents) or "0"
    power = _power_of_ten(exponent)
    if power is None or not digits + places:
        return None
    return Fraction(int(digits + places), 10 ** len(places)) * power, len(places) - int(exponent), match.end()


def _power_of_ten(exponent: str) -> Fraction | None:
    """Return the power, or None for a large exponent, because ``10**10**9`` would exhaust memory."""
    return Fraction(10) ** int(exponent) if abs(int(exponent)) <= _MAX_EXPONENT else None


def _fraction(whole: str, numerator: str, denominator: str) -> Fraction | None:
    upper, lower = int(numerator), int(denominator)
    if lower == 0 or (whole and not 0 < upper < lower):  # 2 3/2 may be a product
        return None
    return int(whole or 0) + Fraction(upper, lower)


def _suffix(text: str) -> tuple[int, str | None] | None:
    """Return factor and canonical unit of the text after a number; None for other text."""
    glued = bool(text) and text[0].isalpha()
    words = _TEXT_COMMANDS.sub(" ", text)
    words = re.sub(r"\s+", " ", re.sub(r"[{}]", "", words)).strip()
    if glued and len(words) == 1:
        return None  # 5m may be a product or a length
    factor = 1
    first, _, rest = words.partition(" ")
    if first.lower() in _FACTORS:
        factor, words = _FACTORS[first.lower()], rest
    if not words:
        return factor, None
    unit = known_unit(words)
    return None if unit is None else (factor, unit)


def known_unit(words: str) -> str | None:
    """Return the canonical name of a unit, or None for an unknown one.

    Example:
        >>> known_unit("square feet"), known_unit("apples")
        ('foot^2', None)
    """
    words = words.replace("\u00b2", "^2").replace("\u00b3", "^3").replace(" ^", "^")
    for power, spellings in (("^2", ("square ", "sq ", "sq. ")), ("^3", ("cubic ", "cu ", "cu. "))):
        for spelling in spellings:
            if words.lower().startswith(spelling):
                words = words[len(spelling) :] + power
    name, power = (words[:-2], words[-2:]) if words.endswith(("^2", "^3")) else (words, "")
    unit = _UNITS.get(name) or _UNITS.get(name.lower())
    if unit is None or (power and unit not in _LENGTHS):
        return None
    return unit + power


def _same_number(a: Quantity, b: Quantity) -> bool:
    return a.value == b.value or _is_rounded(a, b) or _is_rounded(b, a)


def _is_rounded(decimal: Quantity, exact: Quantity) -> bool:
    """True if ``exact`` has no finite decimal, and ``decimal`` is ``exact`` rounded to its places."""
    if decimal.places is None or decimal.places < _MIN_ROUNDED_PLACES:
        return False
    rest = exact.value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest > 1 and round(exact.value, decimal.places) == decimal.value


def _without_percent(quantity: Quantity) -> Quantity:
    if quantity.unit != PERCENT:
        return quantity
    return Quantity(quantity.value / 100, None, None if quantity.places is None else quantity.places + 2)


_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad|~|\s")
_EMPTY_COMMANDS = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_TEXT_COMMANDS = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox|rm)(?![a-zA-Z])")

_ASSIGNMENT = re.compile(r"^\s*[a-zA-Z]\s*=\s*")
_PREFIX = re.compile(r"([+\-\u2013]?) *(\\?\$|\u20ac|\u00a3|) *([+\-\u2013]?) *")
_BRACED = r"(?:\{ *(-?[0-9]+) *\}|([0-9]))"
_LATEX_FRACTION = re.compile(rf"(?:([0-9]+) *)?\\frac *{_BRACED} *{_BRACED}")
_SLASHED_FRACTION = re.compile(r"(?:([0-9]+) +)?([0-9]+) */ *([0-9]+)")
_EXPONENT = r"\^ *(?:\{ *([+-]?[0-9]+) *\}|([0-9]+))"
_POWER = re.compile(rf"10 *{_EXPONENT}")
_WHOLE = r"([1-9][0-9]{0,2}(?:\{,\}[0-9]{3})+|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)?"
_DECIMAL = re.compile(
    _WHOLE
    + r"(?:\.([0-9]+)|\{,\}([0-9]{1,2}(?![0-9])|[0-9]{4,}))?"
    + rf"(?:[eE]([+-]?[0-9]+)| *(?:\\times|\\cdot|\*|\u00d7) *10 *{_EXPONENT})?"
)

_FACTORS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_LENGTHS = {
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "inch": "inch inches in",
    "foot": "foot feet ft",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "unit": "unit units",
}
_OTHERS = {
    "degree": "degree degrees deg \u00b0 ^\\circ \\circ \\degree",
    PERCENT: "% \\% percent pct",
    "dollar": "$ \\$ dollar dollars usd",
    "cent": "cent cents \\cents \u00a2",
    "euro": "\u20ac euro euros eur",
    "pound": "\u00a3 gbp",
    "s": "s sec second seconds",
    "min": "min minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs",
    "ounce": "oz ounce ounces",
    "ml": "ml milliliter milliliters",
    "l": "l liter liters litre litres",
    "gallon": "gallon gallons",
    "mph": "mph miles_per_hour",
    "km/h": "km/h kmh kph kilometers_per_hour",
    "m/s": "m/s meters_per_second",
}
_UNITS = {
    spelling.replace("_", " "): name
    for name, spellings in {**_LENGTHS, **_OTHERS}.items()
    for spelling in spellings.split(" ")
}
