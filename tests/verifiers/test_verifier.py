"""Extraction of answers, and verifiers that compare text and numbers in this process."""

import json
import time
from fractions import Fraction

import pytest
from jsonargparse import ArgumentParser

import opdlab.verifiers
from opdlab.errors import UsageError
from opdlab.verifiers import BoxedVerifier, ExactMatchVerifier, NumericVerifier, Verdict, Verifier
from opdlab.verifiers.verifier import last_boxed
from tests.verifiers.hostile_answers import HOSTILE_ANSWERS


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{25}", "25"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a^{2}}{b}}} and {more}", r"\sqrt{\frac{a^{2}}{b}}"),
        (r"\boxed{}", ""),
        ("\\boxed{1\n+2}", "1\n+2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{12", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed 12", None),
        ("12", None),
        ("", None),
        ("}{", None),
        ("x" * 200_000, None),
        ("{" * 200_000, None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a \\}", r"a \\"),
        ("\\boxed{" * 25_000, None),
        ("\\boxed{" * 25_000 + "1}", "1"),
        ("\\boxed{" + "\\" * 200_000 + "}", "\\" * 200_000),
        ("\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}", "{" * 100_000 + "}" * 100_000),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("response", "correct", "reason"),
    [
        (r"\boxed{25}", True, "equal"),
        (r"so \boxed{ 25 }", True, "equal"),
        ("\\boxed{25}\n", True, "equal"),
        (r"\boxed{24}", False, "different"),
        (r"\boxed{25} \boxed{24}", False, "different"),
        (r"\boxed{25.0}", False, "different"),
        ("25", False, "no answer"),
    ],
)
def test_boxed_verifier(response: str, correct: bool, reason: str) -> None:
    for at_end in (False, True):
        verdict = BoxedVerifier(at_end=at_end).verify([response], ["25"])[0]
        assert (verdict.correct, verdict.reason) == (correct, reason)


@pytest.mark.parametrize("response", [r"\boxed{25}7", r"\boxed{25} and on", r"\boxed{25} or {25}", r"\boxed{25}}"])
def test_at_end_wants_the_box_last(response: str) -> None:
    assert BoxedVerifier().verify([response], ["25"])[0].correct
    verdict = BoxedVerifier(at_end=True).verify([response], ["25"])[0]
    assert verdict == Verdict(False, "25", "text after the answer")


def test_verifiers_want_as_many_golds_as_responses() -> None:
    with pytest.raises(ValueError, match="zip"):
        BoxedVerifier().verify(["1", "2"], ["1"])


@pytest.mark.parametrize("verifier", [BoxedVerifier(), ExactMatchVerifier(), NumericVerifier()])
def test_extraction_is_quick_on_hostile_text(verifier: Verifier) -> None:
    responses = [text * (1_000_000 // len(text)) for text in HOSTILE_ANSWERS.values() if len(text) < 1_000_000]
    started = time.process_time()
    verdicts = verifier.verify(responses, ["1"] * len(responses))
    assert time.process_time() - started < 0.5 * len(responses)  # 1 MB each; quadratic would be minutes
    assert max(len(verdict.extracted or "") for verdict in verdicts) <= 200
    "".join(verdict.extracted or "" for verdict in verdicts).encode()  # can be written to a file


@pytest.mark.parametrize(
    ("options", "response", "gold", "correct"),
    [
        ({}, r"so \boxed{ north \n east }", "north east", True),
        ({}, r"so \boxed{North}", "north", False),
        ({"ignore_case": True}, r"so \boxed{NORTH}", "north", True),
        ({"collapse_whitespace": False}, r"\boxed{north }", "north", False),
        ({}, "north", "north", False),
        ({"boxed": False}, " north\n", "north", True),
        ({"boxed": False}, "so north", "north", False),
        ({}, r"\boxed{1.0}", "1", False),
    ],
)
def test_exact_match(options: dict[str, bool], response: str, gold: str, correct: bool) -> None:
    assert ExactMatchVerifier(**options).verify([response.replace(r"\n", "\n")], [gold])[0].correct is correct


@pytest.mark.parametrize(
    ("response", "gold", "extracted"),
    [
        ("it takes 3 days, so 12 in all", "12", "12"),
        ("so \\boxed{x = -3.50} and 7 more", "-7/2", "-7/2"),
        (r"\boxed{\frac{3}{4}}", "0.75", "3/4"),
        (r"\boxed{\dfrac{-3}{4}}", "-0.75", "-3/4"),
        ("it costs $1,250.", "1250", "1250"),
        ("5-3", "3", "3"),
        ("1.5e3 m", "$1500$", "1500"),
        ("from 1, 2 to 3.", "3", "3"),
        ("that is .5", "1/2", "1/2"),
        (r"\boxed{\frac12}", "0.5", "1/2"),
        (r"\boxed{1\frac{1}{2}}", "1.5", "3/2"),
        (r"\boxed{1 1/2}", "1.5", "3/2"),
        (r"\boxed{1{,}000}", "1000", "1000"),
        (r"\boxed{1\,000}", "1000", "1000"),
        (r"\boxed{1.5\times 10^3}", "1500", "1500"),
        ("\\boxed{\u20135}", "-5", "-5"),
        ("it is \u20135", "-5", "-5"),
        (r"\boxed{- 2}", "-2", "-2"),
        (r"\boxed{5 cm^2}", "5", "5"),
        *((r"\boxed{5}", gold, "5") for gold in (r"\$5", "5 cm", "x=5", "$x = 5$", r"\frac{10}{2}")),
        ("50", r"50\%", "50"),
    ],
)
def test_last_number(response: str, gold: str, extracted: str) -> None:
    assert NumericVerifier().verify([response], [gold])[0] == Verdict(True, extracted, "equal")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("no number", "no answer"),
        ("", "no answer"),
        (r"12 \boxed{none}", "no answer"),
        (r"\boxed{\frac \pi4 + 12}", "no answer"),
        (r"\boxed{12} or \boxed{12", "no answer"),
        ("so it is 12t", "no answer"),
        ("so it is 12.5x", "no answer"),
        ("so it is 12!", "no answer"),
        ("1e999999999", "number out of range"),
        ("-1e-999999999", "number out of range"),
        ("7" * 100_000, "number out of range"),
        ("1/0", "number out of range"),
        ("12.5", "different"),
        ("\u0661\u0662 \u00b2", "no answer"),  # digits elsewhere, not here
    ],
)
def test_numbers_that_are_wrong(response: str, reason: str) -> None:
    verdict = NumericVerifier().verify([response], ["12"])[0]
    assert (verdict.correct, verdict.reason) == (False, reason)


def test_tolerances_are_inclusive_and_the_larger_counts() -> None:
    for verifier, largest in (
        (NumericVerifier(absolute_tolerance=0.5), Fraction(1, 2)),
        (NumericVerifier(relative_tolerance=0.125), 25),
        (NumericVerifier(relative_tolerance=0.125, absolute_tolerance=2), 25),
        (NumericVerifier(relative_tolerance=0.125, absolute_tolerance=32), 32),
    ):
        responses = [str(float(200 + sign * largest * scale)) for sign in (1, -1) for scale in (1, 1.01)]
        assert [v.correct for v in verifier.verify(responses, ["200"] * 4)] == [True, False, True, False]


def test_a_gold_answer_must_be_a_number() -> None:
    with pytest.raises(UsageError, match="'east' is not a number .* use opdlab.verifiers.MathVerifier"):
        NumericVerifier().verify(["1"], ["east"])


@pytest.mark.parametrize("key", ["relative_tolerance", "absolute_tolerance"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_tolerances_are_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"verifier.{key} is {value}, but must be at least 0"):
        NumericVerifier(**{key: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BoxedVerifier", {"at_end": True}),
        ("ExactMatchVerifier", {"boxed": False, "ignore_case": True}),
        ("NumericVerifier", {"relative_tolerance": 0.5}),
        ("MathVerifier", {"num_workers": 3, "time_limit": 2.0, "memory_limit": 2048}),
    ],
)
def test_verifiers_can_be_given_in_yaml(name: str, options: dict[str, object]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--verifier", type=Verifier)
    given = json.dumps({"class_path": f"opdlab.verifiers.{name}", "init_args": options})
    verifier = parser.instantiate_classes(parser.parse_args(["--verifier", given])).verifier
    assert type(verifier) is getattr(opdlab.verifiers, name)
    assert {key: getattr(verifier, key) for key in options} == options


def test_submit_waits_for_nothing_by_default() -> None:
    assert ExactMatchVerifier().submit([r"\boxed{1}"], ["1"])() == [Verdict(True, "1", "equal")]
