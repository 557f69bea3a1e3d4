"""Verifiers: what counts as right, and that no answer can hang or kill the run."""

import pickle
import resource
import time
from collections.abc import Iterator

import pytest

from opdlab.errors import UsageError
from opdlab.tasks import BoxedVerifier, MathVerifier, Verdict
from opdlab.tasks.math_verifier import _start_worker
from opdlab.tasks.verifier import last_boxed

TIME_LIMIT = 2.0


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


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    """One for all, so that each test also shows that those before it left the workers in health."""
    verifier = MathVerifier(num_workers=2, time_limit=TIME_LIMIT)
    assert verifier.verify([r"\boxed{1}"], ["1"])[0].correct  # the workers' start is on nobody's clock
    yield verifier
    assert verifier.verify([r"\boxed{1}", r"\boxed{2}"] * 4, ["1"] * 8) == _verdicts("1", "2") * 4


def _verdicts(*answers: str) -> list[Verdict]:
    return [Verdict(answer == "1", answer, "equal" if answer == "1" else "different") for answer in answers]


RIGHT = [
    (r"thus \boxed{\frac{2}{4}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{(1,2)}", "(1, 2)"),
    (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}"),
    (r"no, \boxed{3}, rather \boxed{4}", "4"),
    ("The final answer is $72$.", "72"),
]
WRONG = [
    (r"\boxed{7}", "8"),
    (r"\boxed{-7}", "7"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"no, \boxed{4}, rather \boxed{3}", "4"),
    (r"\boxed{}", "1"),
    ("", "1"),
    ("I do not know.", "1"),
]


def test_right_and_equivalent_answers(verifier: MathVerifier) -> None:
    verdicts = verifier.verify(*zip(*RIGHT, strict=True))
    assert [case for case, verdict in zip(RIGHT, verdicts, strict=True) if not verdict.correct] == []


def test_wrong_answers(verifier: MathVerifier) -> None:
    verdicts = verifier.verify(*zip(*WRONG, strict=True))
    assert [case for case, verdict in zip(WRONG, verdicts, strict=True) if verdict.correct] == []
    assert verdicts[-1].reason == "no answer"


HOSTILE = {
    "tower": r"\boxed{10^{10^{10}}}",
    "taller tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "factorials": r"\boxed{" + "(" * 6 + "9" + ")!" * 6 + "}",
    "parentheses": r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    "open parentheses": r"\boxed{" + "(" * 2000 + "1}",
    "no box": "2+" * 100_000,
    "long number": r"\boxed{" + "7" * 200_000 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    "null bytes": "\\boxed{\x00\x00}",
    "surrogate": "\\boxed{\ud800}",
    "code": r"\boxed{__import__('os')._exit(1)}",
}


def test_hostile_answers_end_and_harm_nobody(verifier: MathVerifier) -> None:
    responses = [text for hostile in HOSTILE.values() for text in (hostile, r"\boxed{1}")]
    started = time.monotonic()
    verdicts = verifier.verify(responses, ["1"] * len(responses))
    elapsed = time.monotonic() - started
    # Two workers; a second and a half for starting another after each kill.
    assert elapsed < len(HOSTILE) / 2 * (TIME_LIMIT + 1.5) + 5
    assert [name for name, verdict in zip(HOSTILE, verdicts[::2], strict=True) if verdict.correct] == []
    assert verdicts[1::2] == _verdicts("1") * len(HOSTILE)  # the honest ones between them, in their places


def test_time_limit_is_kept(verifier: MathVerifier) -> None:
    started = time.monotonic()
    verdict = verifier.verify([HOSTILE["taller tower"]], ["1"])[0]
    assert verdict == Verdict(False, None, "time limit")
    assert time.monotonic() - started < TIME_LIMIT + 4


def test_hostile_gold_is_no_different(verifier: MathVerifier) -> None:
    verdicts = verifier.verify([r"\boxed{1}", r"\boxed{1}"], [r"9^{9^{9^{9^{9}}}}", "1"])
    assert [verdict.correct for verdict in verdicts] == [False, True]


def test_order_is_kept(verifier: MathVerifier) -> None:
    golds = [str(i) for i in range(24)]
    responses = [rf"\boxed{{{i if i % 3 else i + 1}}}" for i in range(24)]
    verdicts = verifier.verify(responses, golds)
    assert [verdict.correct for verdict in verdicts] == [bool(i % 3) for i in range(24)]
    assert [verdict.extracted for verdict in verdicts] == [str(i if i % 3 else i + 1) for i in range(24)]


def test_pickles_without_its_workers(verifier: MathVerifier) -> None:
    copy = pickle.loads(pickle.dumps(verifier))
    assert (copy.num_workers, copy.time_limit) == (2, TIME_LIMIT)
    assert copy._pool is None
    assert verifier._pool is not None


def test_nothing_to_verify(verifier: MathVerifier) -> None:
    assert verifier.verify([], []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0, but must be at least 1"),
        ({"time_limit": 0.0}, "time_limit is 0.0, but must be above 0"),
        ({"time_limit": -1.0}, "time_limit is -1.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MathVerifier(**options)  # type: ignore[arg-type]


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdlab.tasks.math_verifier._start_worker", _refuse_to_start)
    with pytest.raises(RuntimeError):
        MathVerifier(num_workers=1).verify([r"\boxed{1}"], ["1"])


def _refuse_to_start() -> None:
    raise OSError("no")


@pytest.mark.parametrize(
    ("hard", "expected"), [(1 << 30, 1 << 30), (1 << 40, 4 << 30), (resource.RLIM_INFINITY, 4 << 30)]
)
def test_workers_memory_is_bounded_within_the_systems_limit(
    hard: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[object] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append((kind, limit)))
    _start_worker()
    assert limits == [(resource.RLIMIT_AS, (expected, hard))]
