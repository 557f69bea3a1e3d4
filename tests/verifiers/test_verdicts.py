"""What is equal and what is not: answers by kind, and laws that hold for all answers of a kind."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdlab.verifiers import MathVerifier
from opdlab.verifiers.math.judging import judge

BASE_DIGITS = "0123456789ABCDEF"


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier(num_workers=2, time_limit=30)


# (gold, answer), by kind
RIGHT = {
    "exact numbers": [
        (r"\frac{1}{2^{98}}", "2^{-98}"),
        (r"\frac{1}{2004!}", "(2004!)^{-1}"),
        (r"1.6\times10^{-19}", "1.6e-19"),
        (r"\frac{1}{3}", r"0.\overline{3}"),
        (r"\frac{1}{3}", "0.333333"),
        ("0.785398", r"\frac{\pi}{4}"),
        ("137 \\frac{1}{2}", "137.5"),
        ("2{,}016{,}532", "2016532"),
        (r"\frac{2\sqrt6}{5}", r"0.4\sqrt{6}"),
        ("0", "-0"),
    ],
    "bases": [
        ("0.0011_{2}", "0.0011_2"),
        ("-37_8", "-37_{8}"),
        ("2215_6", "(2215)_6"),
        ("24_{10}", "24"),
        ("1F_{16}", "1f_{16}"),
        ("ff_{16}", "FF_{16}"),
        ("FF_{16}", r"\text{ff}_{16}"),
        ("2a_{12}", r"2 \cdot a_{12}"),
        ("37_8", r"37 \text{ base } 8"),
        ("37_8", r"(37)_{\text{eight}}"),
        ("37_8", r"37_{\text{base }8}"),
        ("37_8", r"37 \text{ (base 8)}"),
        ("37_8", "37 in base eight"),
        ("1011_2", r"1011 \text{ in binary}"),
    ],
    "units": [
        (r"10\text{ m}", "10"),
        ("10", r"10\text{ m}"),
        (r"10\text{ m}", "10m"),
        ("10 m", "10m"),
        (r"10\text{ m}^2", "10m^2"),
        (r"10\text{ m}/\text{s}", "10m/s"),
        (r"10 \text{ N}", "10 N"),
        ("4t", r"t \cdot 4"),
        ("5", "5 cm"),
        ("12", "12 apples"),
        (r"10 \text{ m/s}", r"10\,\mathrm{m\,s^{-1}}"),
        (r"8\sqrt{3} \text { square inches}", r"8\sqrt3"),
        (r"1.6\times10^{-19}\text{ C}", r"0.16\times 10^{-18} C"),
        (r"60^\circ, 120^\circ", "120, 60"),
        (r"\cos 13^\circ", r"\sin 77^\circ"),
        (r"180^\circ - 2\theta", r"180 - 2\theta"),
    ],
    "Chinese": [
        ("5", "5\u4e2a"),
        ("5\u4e2a", "5"),
        ("5", "\u7b54\u6848\u662f5\u3002"),
        ("5", "\u6700\u5927\u503c\u4e3a 5"),
        ("5", "\u5171\u67095\u79cd"),
        (r"5\text{ m}", "5\u7c73"),
        ("5\u5e73\u65b9\u7c73", r"5\text{ m}^2"),
        ("50000", "5\u4e07\u5143"),
        ("3,4", "3\u548c4"),
        ("-5", "\u8d1f5"),
        (r"36 \text{ km/h}", "36\u5343\u7c73/\u5c0f\u65f6"),
        (r"\frac{1}{2}", "\\text{\u7b54\u6848\u662f}\\frac{1}{2}"),
    ],
    "LaTeX": [
        (r"\frac{\pi}{4}", r"\frac\pi4"),
        (r"\emptyset", r"\varnothing"),
        (r"\frac{9}{20}", r"\frac 9{20}"),
        ("5", r"\text{5}"),
        ("5", r"$\displaystyle 5\;$"),
        (r"\sqrt[3]{2}", "2^{1/3}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\frac12\begin{pmatrix} 2 \\ 4 \end{pmatrix}"),
    ],
    "Unicode": [
        (r"\sqrt{2}", "\u221a2"),
        (r"\sqrt{12}", "\u221a12"),
        ("x^2", "x\u00b2"),
        (r"\frac{1}{x}", "x\u207b\u00b9"),
        (r"\infty", "\u221e"),
        (r"\frac12", "\u00bd"),
        ("5.5", "5\u00bd"),
        ("12", "\uff11\uff12"),
        ("12", "1\u200b2\ufeff"),
        (r"x \in [-3,1]", "x \u2208 [\u22123,1]"),
        ("[-3,1]", "\u22123\u2264x\u22641"),
        (r"x \neq 1", "x\u22601"),
        (r"2\pi", "2\u03c0"),
        (r"\alpha+\beta", "\u03b1+\u03b2"),
        ("(1,2)", "\uff081\uff0c2\uff09"),
    ],
    "sets and inequalities": [
        (r"x<-1 \text{ or } x>1", r"x>1 \text{ or } x<-1"),
        (r"x<-1 \text{ or } x>1", "x < -1 or x > 1"),
        (r"x<-1 \text{ or } x>1", r"(-\infty,-1)\cup(1,\infty)"),
        (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1"),
        (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)"),
        (r"(-\infty,1)\cup(1,\infty)", r"x \ne 1"),
        (r"\{x \mid x > 2\}", r"(2,\infty)"),
        (r"[3, 4) \cup \left(4, \frac{64}{11}\right]", r"(4,64/11] \cup [3,4)"),
        (r"s^2 \le 8r^2", r"8r^2 \ge s^2"),
        (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
        ("100,200,300", r"\{100,200,300\}"),
        (r"-12 \text{ or } -30", "-30,-12"),
        (r"\{5\}", "5"),
        (r"(2,12) \cup (12,102)", r"(12,102) \cup (2,12)"),
    ],
    "equations": [
        ("2x - y + 2z - 18 = 0", "4x-2y+4z=36"),
        ("AB=9, CD=4", "CD=4, AB=9"),
        ("(1,2)", "x=1, y=2"),
        ("5", "m+n=5"),
        ("5", "f(2)=5"),
        (r"\sum_{k=1}^{3} k", "6"),
        (r"\frac{\pi}{4}", r"\frac{\pi}{4} \approx 0.785"),
    ],
    "words": [(r"\text{(E)}", "E"), (r"\text{B, E, G}", "E,B,G"), ("no solution", "No solution"), ("(C)", "C")],
    "repeating decimals": [
        (r"\frac{1}{3}", "0.333..."),
        (r"\frac{1}{3}", "0.333\u2026"),
        (r"\frac{1}{6}", r"0.1666\ldots"),
        (r"\frac{1}{7}", r"0.142857142857\ldots"),
        (r"\frac{4}{33}", r"0.\dot{1}\dot{2}"),
        (r"\frac{1}{3}", r"0.\bar3"),
        (r"\frac{1}{3}", "0.(3)"),
        (r"\frac{1}{3}", r"\frac{1}{3} = 0.333\ldots"),
        (r"0.1\overline{6}", r"0.1666\ldots"),
        ("1", "0.999..."),
    ],
    "systems and pieces": [
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", "x=1, y=2"),
        ("(1,2)", r"\begin{cases} x=1 \\ y=2 \end{cases}"),
        ("x=1, y=2", r"\left\{\begin{array}{l} y&=2 \\ x&=1 \end{array}\right."),
        ("(1,3)", r"\begin{cases} x>1 \\ x<3 \end{cases}"),
        (r"\begin{cases} x+y=3 \\ x-y=1 \end{cases}", r"\begin{cases} 2x+2y=6 \\ x-y=1 \end{cases}"),
        (
            r"f(x)=\begin{cases} 1 & x>0 \\ 0 & x\le0 \end{cases}",
            r"\begin{cases} 0, & \text{if } x\le0, \\ 1, & 0<x. \end{cases}",
        ),
        (
            r"\begin{cases} x & x\ge0 \\ -x & x<0 \end{cases}",
            r"\begin{cases} x & x\ge0 \\ -x & \text{otherwise} \end{cases}",
        ),
        (
            r"\begin{cases} 1 & \text{if n is even} \\ 0 & \text{otherwise} \end{cases}",
            r"\begin{cases} 0 & \text{else} \\ 1 & \text{for n is even} \end{cases}",
        ),
    ],
    "choices": [
        ("B", "(B)"),
        ("B", r"\textbf{(B)}"),
        ("B", "B) 12"),
        ("B", "(B) 12"),
        ("B", "B. 12"),
        (r"(\text{B})", r"\textbf{(B)}\ -12"),
        ("(B)", "Option B"),
        (r"\textbf{(B) } 12", "B"),
        (r"\textbf{(B) } 12", "12"),
        ("12", r"\textbf{(B)}\ 12"),
        ("12", r"\textbf{(B) 12}"),
    ],
}
WRONG = {
    "exact numbers": [
        (r"\frac{1}{2^{98}}", r"-\frac{1}{2^{98}}"),
        (r"\frac{1}{2^{98}}", "0"),
        ("0", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        (r"\frac{1}{3000000}", "0.000000"),
        (r"\frac{1}{3}", "0.333334"),
        ("e^{-100}", "-e^{-100}"),
        ("2^{1000}", "2^{1000}+1"),
        ("1", r"\frac{10^{60}+1}{10^{60}}"),
        ("10^{-9}x", r"2\cdot10^{-9}x"),
        ("x", "x+10^{-30}"),
        (r"\begin{pmatrix} 0 \\ 10^{-20} \end{pmatrix}", r"\begin{pmatrix} 0 \\ -10^{-20} \end{pmatrix}"),
        ("(1, 10^{-20})", "(1, -10^{-20})"),
        (r"\sqrt{x^2}", "x"),
        (r"\sqrt{10^{40}+1}", "10^{20}"),
        (r"\sqrt{2x}", r"\sqrt2x"),
        ("x^{2y}", "x^2y"),
        (r"\frac{a}{2b}", r"\frac{a2}{b}"),
    ],
    "bases": [
        ("-37_8", "-37"),
        ("-37_8", "37_8"),
        ("0.0011_{2}", "0.0011"),
        ("0.0011_2", "0.011_2"),
        ("37_8", "37_9"),
        ("1011_2", "11"),
        ("FF_{16}", "255"),
        ("FF_{16}", "ff_{15}"),
        ("1F_{16}", "1e_{16}"),
        ("-FF_{16}", "ff_{16}"),
        ("F_{16}", "f_{16}"),
        ("2a_{12}", "2b_{12}"),
        ("37", r"37 \text{ base } 8"),
        ("37_8", r"37_{\text{nine}}"),
        ("x_{8}", r"x \text{ base } 8"),
    ],
    "units": [
        ("4t", "4"),
        ("4", "4t"),
        ("7s", "7t"),
        ("5", "5x"),
        ("3s^2", "3"),
        ("3", "3m^2"),
        ("3s/t", "3"),
        ("10", "10 m"),
        ("10 m", "10s"),
        (r"10\text{ m}", "10 cm"),
        (r"10\text{ m}", r"10\text{ m}^2"),
        (r"1.6\times10^{-19}\text{ C}", r"3\times 10^{-19}\text{ C}"),
        (r"10\text{ apples}", "10 oranges"),
        (r"10\text{ dollars per hour}", r"10\text{ dollars per day}"),
        (r"8\sqrt{3}\text{ cm}", r"8\sqrt{3}\text{ m}"),
        (r"\cos 13^\circ", r"\cos 13"),
    ],
    "Chinese": [
        ("5", "\u4e0d\u662f5"),
        ("5", "\u8d1f5"),
        ("5", "\u5927\u4e8e5"),
        ("5", "5\u4ee5\u4e0a"),
        ("7", r"7 \text{ or more}"),
        ("36\u5343\u7c73/\u5c0f\u65f6", "36\u7c73/\u79d2"),
        ("5", "5\u4e07"),
        ("5\u7c73", "5\u5398\u7c73"),
    ],
    "unread LaTeX": [
        (r"\frac \pi4 + 2 - \sqrt2", "2"),
        (r"\frac \pi4 + 2 - \sqrt2", "4"),
        ("2", r"\frac \pi4 + 2 - \sqrt2"),
        ("2", r"\foo{3} + 2"),
        (r"1, 2, \ldots, n", "2"),
        (r"1, 2, \ldots, n", "1, 2, n"),
        ("2", r"1, 2, \ldots, n"),
        ("3", "1, 2, 3, ..."),
    ],
    "sets and inequalities": [
        (r"x<-1 \text{ or } x>1", "x<-1"),
        (r"x<-1 \text{ or } x>1", r"x<-1 \text{ or } x\ge 1"),
        (r"x<-1 \text{ or } x>1", r"x<-1 \text{ and } x>1"),
        ("x<2", "y<2"),
        ("1,1,2", "1,2"),
        ("05:00", "7:00"),
        ("2", r"\pm 2"),
        (r"\pm 2", "2"),
        (r"\emptyset", r"\{0\}"),
    ],
    "equations": [("2x - y = 0", "2x+y=0"), ("5", "2x=5"), ("5", "x>5"), ("2", "1=2"), ("y=2x+3", "y=2x-3")],
    "words": [(r"\text{ACF}", "AFC"), (r"\text{east}", "seat"), ("LQSX", "QLSX"), (r"\text{(E)}", "D")],
    "repeating decimals": [
        (r"\frac{1}{3}", "0.33..."),
        (r"\frac{1}{3}", "0.334..."),
        (r"\frac{333}{1000}", "0.333..."),
        ("0.333", "0.333..."),
        ("0.5", "0.5000..."),
        ("0", "0.0000..."),
        (r"\frac{1}{6}", "0.1(6)"),
    ],
    "systems and pieces": [
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", r"\begin{cases} x=2 \\ y=1 \end{cases}"),
        ("2", r"\begin{cases} x=1 \\ y=2 \end{cases}"),
        ("2", r"\begin{cases} 2 & x>0 \\ 3 & x\le0 \end{cases}"),
        (r"\begin{cases} 1 & n=1 \\ 2 & n=2 \end{cases}", r"\begin{cases} 1 & n=2 \\ 2 & n=1 \end{cases}"),
        (r"\begin{cases} 1, n=1 \\ 2, n=2 \end{cases}", r"\begin{cases} 1, n=2 \\ 2, n=1 \end{cases}"),
        (r"\begin{cases} 1 & n=1 \\ 1 & n=1 \end{cases}", r"\begin{cases} 1 & n=1 \\ 2 & n=2 \end{cases}"),
        (
            r"\begin{cases} x & x\ge0 \\ -x & x\le0 \end{cases}",
            r"\begin{cases} x & x\ge0 \\ -x & \text{otherwise} \end{cases}",
        ),
        (r"\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}", r"\begin{array}{cc} 3 & 4 \\ 1 & 2 \end{array}"),
    ],
    "choices": [
        ("B", "C) B"),
        ("B", "b"),
        ("B", "B(12)"),
        ("B", "(B)(12)"),
        ("A", "(A) or (B)"),
        ("A", "(A) 1, (B) 2"),
        ("A", r"(A) \cup (B)"),
        ("12", "(B) 12"),
        ("12", r"\textbf{(B)}\ 13"),
        (r"\textbf{(B)}\ 12", r"\textbf{(B)}\ 13"),
        (r"\textbf{(B)}\ 12", "C"),
    ],
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers_pass(kind: str, verifier: MathVerifier) -> None:
    golds, answers = zip(*RIGHT[kind], strict=True)
    verdicts = verifier.verify([rf"so it is \boxed{{{answer}}}" for answer in answers], golds)
    assert [case for case, verdict in zip(RIGHT[kind], verdicts, strict=True) if not verdict.correct] == []


@pytest.mark.parametrize("kind", WRONG)
def test_no_wrong_answer_passes(kind: str, verifier: MathVerifier) -> None:
    golds, answers = zip(*WRONG[kind], strict=True)
    verdicts = verifier.verify([rf"so it is \boxed{{{answer}}}" for answer in answers], golds)
    assert [case for case, verdict in zip(WRONG[kind], verdicts, strict=True) if verdict.correct] == []


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        (r"The pairs are \boxed{(1,4)} and \boxed{(4,1)}.", "(4,1),(1,4)", True),
        (r"\boxed{2}, \boxed{7}, \boxed{5}", r"\{2,5,7\}", True),
        (r"$x = \boxed{3}$ or $x = \boxed{5}$", "5, 3", True),
        (r"$x = \boxed{3}$, $y = \boxed{5}$", "(3, 5)", True),
        (r"$x = \boxed{5}$, $y = \boxed{3}$", "(3, 5)", False),
        (r"\boxed{2} and \boxed{7}", r"\{2,5,7\}", False),
        (r"\boxed{(3,4)} or \boxed{(1,2)}", "(1,2)", False),
        (r"\boxed{\{1,2\}}, that is $\boxed{\{1,2\}}$", r"\{1,2\}", True),
        (r"\boxed{4}, and after correcting the sign \boxed{9}", "4, 9", False),
        (r"First \boxed{4}, and after correcting the sign \boxed{9}.", "9", True),
        (r"First \boxed{4}, and after correcting the sign \boxed{9}.", "4", False),
        (r"\boxed{4} and \boxed{9}", "9", True),
        (r"\boxed{75} and \boxed{75}", "75, 75", True),
        (r"The smaller root is \boxed{1} and the larger one \boxed{2}.", "1, 2", True),
        (r"\boxed{4} and \boxed{9}", "4", False),
        (r"\boxed {5}", "5", True),
        (r"\fbox{5}", "5", True),
        ("\\boxed\n{5}", "5", True),
        (r"\boxed{\fbox{5}}", "5", True),
        (r"\boxed{5} and then \boxed{6", "5", False),
        (r"\boxed{5} and then \boxed{6", "6", False),
        (r"The answer is 6. \boxed{6", "6", False),
        ("The answer is \uff16.", "6", True),
        ("\u7b54\u6848\u662f6\u3002", "6", True),
        (r"The answer is $\frac \foo4 + 2 - \sqrt2$.", "2", False),
    ],
)
def test_boxes(response: str, gold: str, correct: bool, verifier: MathVerifier) -> None:
    assert verifier.verify([response], [gold])[0].correct is correct


def test_several_boxes_have_one_form(verifier: MathVerifier) -> None:
    responses = [r"\boxed{1} and \boxed{2}", r"\boxed{2}, \boxed{1}", r"\boxed{\{1, 2\}}"]
    assert {v.extracted for v in verifier.verify(responses, ["3, 4"] * 3)} == {"{1, 2}"}


# -- laws ------------------------------------------------------------------------------------------------------------


def equal(gold: str, answer: str) -> bool:
    return judge([answer], gold, boxed=True).correct


@st.composite
def numbers(draw: st.DrawFn) -> str:
    """A number above 0 in one of many notations, from tiny to huge, rational or not."""
    a, b = draw(st.integers(1, 10**6)), draw(st.integers(2, 999))
    power = draw(st.integers(-60, 60))
    return draw(
        st.sampled_from(
            [
                str(a),
                f"{a}.{b:03d}",
                rf"\frac{{{a}}}{{{b}}}",
                rf"\frac{{{a}}}{{{b}^{{{abs(power)}}}}}",
                rf"{a} \times 10^{{{power}}}",
                f"{a}e{power}",
                f"{b}^{{{power}}}",
                rf"\frac{{\sqrt{{{b}}}}}{{10^{{{abs(power)}}}}}",
                rf"{a}\pi \cdot 10^{{{power}}}",
                rf"\frac{{{a}}}{{{b}!}}",
                f"e^{{-{b}}}",
            ]
        )
    )


@settings(max_examples=150, deadline=None)
@given(numbers())
def test_a_number_equals_itself_and_never_its_negative(number: str) -> None:
    assert equal(number, rf"\frac{{2}}{{2}} \cdot ({number})" if "e" not in number[1:] else number)
    assert not equal(number, "-" + number)
    assert not equal("-" + number, number)
    assert not equal(f"(1, -{number})", f"(1, {number})")
    assert not equal("0", number)


@settings(max_examples=150, deadline=None)
@given(numbers(), st.integers(1, 80), st.sampled_from("+-"))
def test_a_number_never_equals_another_one(number: str, digits: int, sign: str) -> None:
    """A relative difference of 10^-80 to 10^-1: rational numbers are compared exactly, others to 40 digits."""
    rational = not any(name in number for name in ("sqrt", "pi", "^{-"))
    digits = digits if rational and number[:2] != "e^" else min(digits, 35)
    if "e" not in number[1:]:
        assert not equal(number, rf"({number}) \cdot (1 {sign} 10^{{-{digits}}})")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**4), st.sampled_from("bcfghjklmnpqrstuvwxyzABCFGHJKLMNPQRSTUVWXYZ"))
def test_a_letter_after_a_number_is_a_variable_unless_the_gold_writes_a_unit(number: int, letter: str) -> None:
    assert not equal(str(number), f"{number}{letter}") or number == 0
    assert not equal(f"{number}{letter}", str(number)) or number == 0
    assert equal(f"{number}{letter}", f"{number} {letter}")
    assert equal(rf"{number}\text{{ {letter}}}", str(number))
    assert equal(rf"{number}\text{{ {letter}}}", f"{number}{letter}")
    assert not equal(rf"{number}\text{{ {letter}}}", rf"{number + 1}\text{{ {letter}}}")


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 16), st.text(BASE_DIGITS, min_size=1), st.text(BASE_DIGITS, max_size=4), st.booleans())
def test_numbers_in_a_base_are_read_as_one(base: int, whole: str, places: str, negative: bool) -> None:
    whole, places = ("".join(BASE_DIGITS[int(d, 16) % base] for d in digits) for digits in (whole, places))
    if not any(digit.isdigit() for digit in whole):
        return
    digits = ("-" if negative else "") + whole + ("." + places if places else "")
    assert equal(f"{digits}_{base}", f"{digits}_{{{base}}}")
    if int(whole + places, base):
        other = digits[1:] if negative else "-" + digits
        assert not equal(f"{digits}_{base}", f"{other}_{base}")
        assert not equal(f"{digits}_{base}", f"{digits}_{base + 1}")
        assert base == 10 or not equal(f"{digits}_{base}", digits)


GOLDS = [
    *(
        "12",
        "-7",
        "3.25",
        r"\frac{3}{4}",
        r"-\frac{2\pi}{5}",
        r"2\sqrt{3}",
        r"x^{2}-3x+1",
        "(-3, 2)",
        r"\{1,2,-5\}",
        "1,-1",
    ),
    *(
        r"(-\infty,-1)\cup(2,\infty)",
        r"90^\circ",
        r"x\le 3",
        "2516_{8}",
        r"10\text{ cm}^{2}",
        r"\frac{1}{2^{98}}",
        "y=2x-1",
    ),
]
SPELLINGS = [
    lambda text: text.translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"}),
    lambda text: text.replace("-", "\u2212"),
    lambda text: text.replace("\\pi", "\u03c0").replace("\\infty", "\u221e").replace("\\cup", "\u222a"),
    lambda text: text.replace("\\le ", "\u2264").replace("^\\circ", "\u00b0").replace("^{2}", "\u00b2"),
    lambda text: text.replace("\\frac", "\\dfrac").replace("\\text", "\\mathrm"),
    lambda text: text.replace(",", ",\\; "),
    lambda text: f"${text}$",
    lambda text: f"\\displaystyle {text}.",
    lambda text: "\u200b".join(text) if "\\" not in text else text + "\ufeff",
    lambda text: f"\u7b54\u6848\u662f {text}",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(GOLDS), st.lists(st.sampled_from(SPELLINGS), max_size=5, unique=True))
def test_an_answer_equals_itself_in_any_spelling(gold: str, spellings: list[Callable[[str], str]]) -> None:
    answer = gold
    for spelling in spellings:
        answer = spelling(answer)
    assert equal(gold, answer)
    assert equal(answer, gold)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_lists_have_no_order_and_tuples_have(items: list[int], generator: object) -> None:
    texts = [str(item) for item in items]
    shuffled = texts[1:] + texts[:1]
    assert equal(", ".join(texts), ", ".join(shuffled))
    assert equal(rf"\{{{','.join(texts)}\}}", ", ".join(shuffled))
    assert not equal(f"({','.join(texts)})", f"({','.join(shuffled)})")
    assert not equal(", ".join(texts), ", ".join(texts[1:]))
    boxes = " and ".join(rf"\boxed{{{text}}}" for text in shuffled)
    assert judge(shuffled, ", ".join(texts), boxed=True).correct, boxes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=5), st.integers(0, 4), st.integers(1, 9))
def test_a_polynomial_equals_its_factored_form_alone(coefficients: list[int], place: int, change: int) -> None:
    terms = [f"{c}x^{{{power}}}" for power, c in enumerate(coefficients)]
    horner = "0"
    for c in reversed(coefficients):
        horner = f"(x \\cdot {horner} + ({c}))"
    assert equal("+".join(terms).replace("+-", "-"), horner)
    assert not equal("+".join(terms).replace("+-", "-"), f"{horner} + {change}x^{{{place}}}")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("0123456789 ,./-{}\\%$exm^()_=<>|!\u00b2\u221a\u4e2a", max_size=14), min_size=8, max_size=8))
def test_no_text_equals_two_numbers(verifier: MathVerifier, texts: list[str]) -> None:
    golds = ("7", "-7", "7.5", "0.007")
    verdicts = verifier.verify([f"\\boxed{{{text}}}" for text in texts for _ in golds], [*golds] * len(texts))
    for row in range(len(texts)):
        assert sum(verdict.correct for verdict in verdicts[4 * row : 4 * row + 4]) <= 1, texts[row]
    assert not any("not understood" in verdict.reason for verdict in verdicts)
