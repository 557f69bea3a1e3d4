"""Capitals of countries: splits, the rule of an answer, and the prompt in a chat format."""

import pytest

from opdlab.errors import UsageError
from opdlab.toy import CapitalProblems, CapitalVerifier
from opdlab.toy.capitals import CAPITALS


def test_splits_share_no_country() -> None:
    train, held_out = ({problem.id for problem in CapitalProblems(split).problems()} for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(CAPITALS)
    assert len(held_out) >= 40
    with pytest.raises(UsageError, match="split is 'test', but must be train or held_out"):
        CapitalProblems("test")  # type: ignore[arg-type]


def test_each_gold_answer_is_accepted_and_no_other_is() -> None:
    """Some capitals are part of another name, such as that of a country."""
    verifier, problems = CapitalVerifier(), CapitalProblems().problems() + CapitalProblems("held_out").problems()
    golds = [problem.answer or "" for problem in problems]
    sentences = [f"The capital of {problem.id} is **{problem.answer}**." for problem in problems]
    assert all(verdict.correct for verdict in verifier.verify(sentences, golds))
    shifted = [*golds[1:], golds[0]]
    assert not any(verdict.correct for verdict in verifier.verify(sentences, shifted))


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("SAN JOSE", True),
        ("San Jose\u0301", True),
        ("San Joseph", False),
        ("Lima, then San Jose", False),
        ("", False),
        ("San Jose and Lima", True),
    ],
)
def test_the_first_capital_counts(response: str, correct: bool) -> None:
    (verdict,) = CapitalVerifier().verify([response], ["San Jos\u00e9"])
    assert verdict.correct == correct
