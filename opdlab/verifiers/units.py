r"""Units after numbers: where a unit begins, its one spelling, and which two units differ.

Texts are in the spelling of :func:`opdlab.verifiers.spelling.normalized`.
"""

import re

PERCENT = "%"


def split_unit(text: str, letter: str | None = None) -> tuple[str, str | None]:
    r"""Return the text before a unit, and the unit as :func:`parse_unit` returns it.

    A unit is a currency, percent or degree sign, everything in ``\text{…}`` at the end, a known unit of several
    letters, words after a space, and words in Chinese, Japanese or Korean. A single letter right after a number, with
    or without a power, is a variable. It is a unit after a space if it is a known one, or if it is ``letter``.

    Args:
        text: the answer, normalized.
        letter: a unit whose letters count as one, because the gold answer writes it as a unit; None to read a gold
            answer, where a known letter after a space is a unit.

    Example:
        >>> [split_unit(text) for text in (r"10\text{ m}", "4t", "10 m", "12 apples", r"\sqrt{2} cm")]
        [('10', 'm'), ('4t', None), ('10', 'm'), ('12', 'apples'), ('\\sqrt{2}', 'cm')]
    """
    if match := _CURRENCY.match(text):
        return match[1] + text[match.end() :], parse_unit(match[2])
    for pattern in (_TEXT_UNIT, _SIGN_UNIT, _ASIAN_UNIT, _WORD_UNIT):
        match = pattern.search(text)
        if match is None or match.start() == 0:
            continue
        value, words = text[: match.start()].strip(), match[0].strip()
        if (pattern is _SIGN_UNIT and ANGLE.search(value)) or _COMPARISON.search(words):
            return text, None  # the degrees of an angle; "or more" is no unit
        if (factor := _FACTOR.match(words)) and not _is_known(
            parse_unit(words)
        ):  # in Chinese, a kilometer is a thousand meters
            value, words = f"{value} {factor[1]}", words[factor.end() :].strip(" {}")
            if not words:
                return value, None
        unit = parse_unit(words)
        known = _is_known(unit)
        if pattern is _WORD_UNIT and _LETTERS.fullmatch(words):
            known = unit == letter if letter is not None else known and match[0] != words
        elif pattern is _WORD_UNIT and not known:
            known = match[0] != words and _PLAIN_WORDS.fullmatch(words) is not None
        return (value, unit) if known or pattern is not _WORD_UNIT else (text, None)
    return text, None


def parse_unit(words: str) -> str:
    r"""Return a unit in one spelling: known units by name, with their powers; other words in lower case.

    Example:
        >>> [parse_unit(words) for words in ("square feet", r"\text{m}/\text{s}^{2}", "km per hour", " Red Apples")]
        ['foot^2', 'm/s^2', 'km/h', 'red apples']
    """
    plain = " ".join(re.sub(r"\\text|\\cdot|[{}]|^US(?= ?\\?\$)", " ", words).split()).rstrip(".")
    plain = re.sub(r"(?i)^(?:(mph)|kmp?h|kph)$", lambda match: "mi/h" if match[1] else "km/h", plain)
    powers: dict[str, int] = {}
    for index, part in enumerate(re.split(" ?/ ?| per |\u6bcf", re.sub(r" ?\^ ?", "^", plain))):
        factor = 1
        if match := _SQUARED.match(part):
            factor, part = 2 if match[1] else 3, part[match.end() :]
        for name in [part] if _name(part) else part.split():
            stem, _, power = name.partition("^")
            known = _name(stem) or _name(name)
            if known is None or (stem and not re.fullmatch(r"-?[1-9]?|\\circ.*", power)):
                return plain.lower()
            sign = -1 if index else 1
            powers[known] = powers.get(known, 0) + sign * factor * (int(power) if power.lstrip("-").isdigit() else 1)
    upper, lower = (
        " ".join(name if abs(n) == 1 else f"{name}^{abs(n)}" for name, n in sorted(powers.items()) if n * sign > 0)
        for sign in (1, -1)
    )
    return f"{upper}/{lower}" if lower else upper


def _is_known(unit: str) -> bool:
    return all(name in _NAMES for name in re.findall("[^ /^0-9-]+", unit))


def _name(word: str) -> str | None:
    """Return the name of a known unit, singular or plural, or None."""
    if len(word) < 3:
        return _UNITS.get(word) or (_UNITS.get(word.lower()) if len(word) == 2 else None)
    stems = (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es"))
    return next((_UNITS[stem] for stem in stems if stem in _UNITS), None)


def units_differ(gold: str | None, answer: str | None) -> bool:
    """True if both units are there and are not the same.

    Example:
        >>> units_differ("m", "cm"), units_differ("ways", "different ways"), units_differ("m", None)
        (True, False, False)
    """
    if not gold or not answer or gold == answer:
        return False
    words = [{word.rstrip("s") for word in unit.replace(".", "").split()} for unit in (gold, answer)]
    return not (words[0] <= words[1] or words[1] <= words[0])


FACTORS = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"\u767e": 100, "\u5343": 1000, "\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8},
}
_FACTOR = re.compile(rf"(?:\\text\{{)? *({'|'.join(FACTORS)})(?![a-zA-Z])", re.IGNORECASE)
_CURRENCY = re.compile(r"([+-]? *)((?:US *)?\\?\$|\u20ac|\u00a3|\u00a5|Rs\.?) *(?=[-+.0-9\\])")
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"
_TEXT_UNIT = re.compile(rf"{_TEXT}(?:{_TEXT}| |/|\\cdot|\^\{{-?[0-9]\}})*$")
_SIGN_UNIT = re.compile(r"(?:\\?%|(?:\^\{)?\\circ\}?(?: *[CF])?|\\?\$|\u20ac|\u00a3|\u00a5|\u00a2|\\cents)$")
ANGLE = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_ASIAN_UNIT = re.compile(f"(?<![{_ASIAN}/])(?:(?![\u4ee5\u4e0d])[{_ASIAN}]/?)+$")  # not "and more", "is not"
_WORD = r"[a-zA-Z]+\.?(?:\^\{-?[0-9]\})?"
_WORD_UNIT = re.compile(rf"(?:(?<=[0-9}})\]])|(?<=\\pi)) *{_WORD}(?: ?/ ?{_WORD}| {_WORD})*$")
_LETTERS = re.compile(
    r"(?!m ?/ ?s)[a-zA-Z](?:\^\{-?[0-9]\})?(?: ?[ /] ?[a-zA-Z](?:\^\{-?[0-9]\})?)*"
)  # may be variables
_COMPARISON = re.compile(r"(?<![a-zA-Z])(?:or|more|less|least|most|than|not|over|under)(?![a-zA-Z])")
_PLAIN_WORDS = re.compile(r"[a-zA-Z]{3,}\.?(?: [a-zA-Z]{2,}\.?)*")
_SQUARED = re.compile(r"(square |sq\.? |\u5e73\u65b9)|cubic |cu\.? |\u7acb\u65b9", re.IGNORECASE)
_UNITS = {
    spelling.replace("_", " "): line.split()[0].replace("_", " ")
    for line in """
        mm millimeter millimetre \u6beb\u7c73
        cm centimeter centimetre \u5398\u7c73 \u516c\u5206
        dm decimeter decimetre \u5206\u7c73
        m meter metre \u7c73 \u516c\u5c3a
        km kilometer kilometre \u5343\u7c73 \u516c\u91cc
        inch inches in
        foot feet ft
        yard yd
        mile mi
        unit \u5355\u4f4d
        degree deg ^\\circ \\circ \u5ea6
        celsius ^\\circ_C ^\\circC
        fahrenheit ^\\circ_F ^\\circF
        % \\% percent pct percentage
        dollar $ \\$ usd
        cent \\cents \u00a2
        euro \u20ac eur
        pound \u00a3 gbp lb
        rupee Rs rs
        yuan \u00a5 \u5143
        s sec second \u79d2
        min minute \u5206\u949f
        h hr hour \u5c0f\u65f6
        day d \u5929 \u65e5
        week wk \u5468
        month \u6708 \u4e2a\u6708
        year yr \u5e74
        mg milligram
        g gram gm \u514b
        kg kilogram \u5343\u514b \u516c\u65a4
        t ton tonne \u5428
        ounce oz
        ml milliliter millilitre mL \u6beb\u5347
        l liter litre L \u5347
        gallon gal
        C coulomb
        J joule
        N newton
        W watt
        V volt
        A ampere amp
        K kelvin
    """.strip().splitlines()
    for spelling in line.split()
}
_NAMES = frozenset(_UNITS.values())
