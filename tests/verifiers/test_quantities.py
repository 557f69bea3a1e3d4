"""Plain numbers: read exactly or not at all, and equal only if their values are."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.verifiers.quantities import Quantity, same_quantity
from opdlab.verifiers.quantities import parse_quantity as parse_normalized
from opdlab.verifiers.spelling import normalized
from tests.verifiers.hostile_answers import HOSTILE_ANSWERS


def parse_quantity(text: str) -> Quantity | None:
    return parse_normalized(normalized(text))


READ = [
    ("12", 12, None),
    ("-12", -12, None),
    ("\u221212", -12, None),
    ("+12.", 12, None),
    ("$12$", 12, None),
    (r"\(12\)", 12, None),
    (r"$\displaystyle 12.$", 12, None),
    ("007", 7, None),
    (".5", Fraction(1, 2), None),
    ("3.140", Fraction(157, 50), None),
    ("3{,}14", Fraction(157, 50), None),
    ("3/4", Fraction(3, 4), None),
    (r"-\frac{3}{4}", Fraction(-3, 4), None),
    (r"\frac{-3}{4}", Fraction(-3, 4), None),
    (r"\dfrac34", Fraction(3, 4), None),
    ("1 1/2", Fraction(3, 2), None),
    (r"-1\frac{1}{2}", Fraction(-3, 2), None),
    (r"1 \tfrac12", Fraction(3, 2), None),
    *((text, 1000, None) for text in ("1,000", "1 000", r"1\,000", "1~000", r"1,\!000", "1{,}000", "1\u202f000")),
    ("1,234,567.5", Fraction(2469135, 2), None),
    *((text, 120000, None) for text in ("1.2e5", "1.2E+5", r"1.2 \times 10^5", r"1.2\cdot 10^{5}", "1.2 * 10^{5}")),
    ("10^{-3}", Fraction(1, 1000), None),
    (r"1.5 \times 10^{-3}", Fraction(3, 2000), None),
    ("1.5 million", 1500000, None),
    (r"2 \text{ dozen}", 24, None),
    *((text, 5, "dollar") for text in ("$5", r"\$5", "5 dollars", r"5 \text{ dollars}", r"\$ 5")),
    ("-$5", -5, "dollar"),
    (r"\$-5", -5, "dollar"),
    ("5\u20ac", 5, "euro"),
    *((text, 10, "cm^2") for text in ("10 cm^2", r"10\text{ cm}^2", r"10 \mathrm{~cm}^{2}", "10 cm\u00b2")),
    (r"10 \text{ square centimeters}", 10, "cm^2"),
    (r"10 \text{ cubic feet}", 10, "foot^3"),
    *((text, 90, "degree") for text in ("90^\\circ", "90^{\\circ}", "90\u00b0", "90 degrees", r"90 \text{ degrees}")),
    *((text, 50, "%") for text in ("50%", r"50\%", "50 percent", r"50 \text{ percent}")),
    (r"\frac{3}{4} \text{ hours}", Fraction(3, 4), "h"),
    *((text, 5, "mile/h") for text in ("5 miles per hour", "5 mph", r"5\text{ mi}/\text{h}")),
    *((text, 10, "m/s") for text in ("10m/s", r"10 \text{ m/s}", r"10\,\mathrm{m\,s^{-1}}", "10 meters per second")),
    *((text, 10, "m") for text in ("10 m", r"10\text{m}", r"10\,\mathrm{m}")),
    ("12 red apples", 12, "red apples"),
    ("5\u5143", 5, "yuan"),
    ("5\u4e07\u5143", 50000, "yuan"),
    ("\uff11\uff12", 12, None),
    ("5\u00bd", Fraction(11, 2), None),
    (r"0.1\overline{6}", Fraction(1, 6), None),
    ("1.6e-19 C", Fraction(16, 10**20), "C"),
    ("-37_8", -31, None),
    ("0.0011_{2}", Fraction(3, 16), None),
    (r"\text{A5}_{11}", 115, None),
    (r"\text{FF}_{16}", 255, None),
    ("0.333...", Fraction(1, 3), None),
    (r"-0.\dot{1}4285\dot{7}", Fraction(-1, 7), None),
]
UNREAD = [
    *("", " ", ".", "-", "+-5", "--5", "x", "east", "5x", "5m", "5!", "2^5", "\\pi", "5\\pi", "\\sqrt{2}", "5i"),
    *("3,14", "1,2", "1,00", "1,0000", "1,000,00", "01,000", "0,5", "1 2", "12 34", "1 2 3", "1000 000", "1, 000"),
    *("2 3/2", "2 0/3", "1/0", r"\frac{1}{0}", "3/4/5", "1/2/", r"\frac{1}{x}", r"\frac123"),
    *("(1,2)", "[1,2]", r"\{1\}", "(5)", "1-2", "1:2", "12:30", "5 = 5", "x = 5", "1e", "e5", "1e401", "1e999999999"),
    *("10^{10^{10}}", "10^{401}", "0x10", "1_000", "\u0661", "5\u00b2", "nan"),
    *(
        "inf",
        "5 hours 3 minutes",
        "10 20",
        "7" * 201,
        "5t",
        "5ab",
        "38_8",
        "x_1",
        "F_{16}",
        "2a_{12}",
        "0.33...",
        "0.5000...",
        "0.1(6)",
        "A_{12}",
        "1011_1",
        ".",
    ),
]


@pytest.mark.parametrize(("text", "value", "unit"), READ)
def test_reads(text: str, value: Fraction, unit: str | None) -> None:
    quantity = parse_quantity(text)
    assert quantity is not None
    assert (quantity.value, quantity.unit) == (value, unit)


@pytest.mark.parametrize("text", UNREAD)
def test_reads_nothing_that_may_mean_something_else(text: str) -> None:
    assert parse_quantity(text) is None


def test_reads_hostile_text_quickly() -> None:
    started = time.process_time()
    for text in HOSTILE_ANSWERS.values():
        for part in (text, text[7:-1], text[7:207], "1" + text[7:200]):
            parse_quantity(part)
    assert time.process_time() - started < 20  # a second on a slow machine; quadratic would be minutes


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("10", "10 cm", True),
        ("10 cm", "10", True),
        ("10 cm", "10 centimeters", True),
        ("10 cm", "10 m", False),
        ("10 cm", "10 cm^2", False),
        ("100 cm", "1 m", False),  # no text is converted
        ("5 dollars", r"\$5", True),
        ("5 dollars", "5 euros", False),
        ("50", "50%", True),
        ("0.5", r"50\%", True),
        (r"\frac{1}{2}", "50%", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50", "0.5", False),
        ("0.005", "0.5%", True),
        ("50%", "50 degrees", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.333334", False),
        ("2/3", "0.666667", True),
        ("2/3", "0.666666", False),
        ("1/3", "0.33333", False),
        ("1/4", "0.2500001", False),
        ("0", "0.0000001", False),
        ("0.3333333", "1/3", True),
        ("1/3", "33.333333%", True),
    ],
)
def test_same(gold: str, answer: str, same: bool) -> None:
    pair = parse_quantity(gold), parse_quantity(answer)
    assert pair[0] is not None
    assert pair[1] is not None
    assert same_quantity(*pair) is same  # type: ignore[arg-type] # neither is None


def _grouped(number: int, separator: str) -> str:
    return f"{number:,}".replace(",", separator)


@st.composite
def plain_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number as someone may write it, with its value by another path: Python's own formatting and Fraction."""
    sign = draw(st.sampled_from(["", "-"]))
    whole = draw(st.one_of(st.integers(0, 30), st.integers(0, 10**7)))
    small, large = sorted(draw(st.tuples(st.integers(1, 20), st.integers(1, 20))))
    places = draw(st.text("0123456789", min_size=1, max_size=5))
    exponent = draw(st.integers(-6, 6))
    separator = draw(st.sampled_from([",", " ", r"\,", "{,}", "~"]))
    text, value = draw(
        st.sampled_from(
            [
                (str(whole), Fraction(whole)),
                (_grouped(whole, separator), Fraction(whole)),
                (f"{whole}.{places}", Fraction(f"{whole}.{places}")),
                (f"{_grouped(whole, separator)}.{places}", Fraction(f"{whole}.{places}")),
                (f"{whole}/{large}", Fraction(whole, large)),
                (rf"\frac{{{whole}}}{{{large}}}", Fraction(whole, large)),
                (f"{whole} {small}/{large + 1}", whole + Fraction(small, large + 1)),
                (rf"{whole}\frac{{{small}}}{{{large + 1}}}", whole + Fraction(small, large + 1)),
                (f"{whole}.{places}e{exponent}", Fraction(f"{whole}.{places}e{exponent}")),
                (rf"{whole} \times 10^{{{exponent}}}", Fraction(f"{whole}e{exponent}")),
            ]
        )
    )
    return sign + text, -value if sign else value


@given(plain_numbers())
def test_plain_numbers_are_read_exactly(number: tuple[str, Fraction]) -> None:
    quantity = parse_quantity(number[0])
    assert quantity is not None
    assert quantity.value == number[1]


@given(plain_numbers(), plain_numbers())
def test_plain_numbers_are_the_same_only_if_they_are_equal(a: tuple[str, Fraction], b: tuple[str, Fraction]) -> None:
    gold, answer = parse_quantity(a[0]), parse_quantity(b[0])
    assert gold is not None
    assert answer is not None
    if a[1] == b[1]:
        assert same_quantity(gold, answer)
    elif abs(a[1] - b[1]) > Fraction(1, 2 * 10**6):  # a long decimal may be a fraction
        assert not same_quantity(gold, answer)


@given(plain_numbers(), st.integers(1, 9), st.integers(-3, 5))
def test_a_number_that_is_off_is_different(number: tuple[str, Fraction], digit: int, power: int) -> None:
    gold, off = parse_quantity(number[0]), number[1] + digit * Fraction(10) ** power
    assert gold is not None
    answer = parse_quantity(f"{off.numerator}/{off.denominator}")
    assert answer is None or not same_quantity(gold, answer)


@given(st.text("0123456789 ,./-{}\\%$exm^()", max_size=12))
def test_a_reading_is_what_python_reads(text: str) -> None:
    """Any text of these characters that Python's Fraction reads too has the same value."""
    quantity = parse_quantity(text)
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        return
    assert quantity is None or quantity.value == value
