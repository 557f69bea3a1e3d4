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
    ("gold", "response", "correct"),
    [
        ("San Jos\u00e9", "SAN JOSE", True),
        ("San Jos\u00e9", "San Jose\u0301", True),
        ("San Jos\u00e9", "San Joseph", False),
        ("San Jos\u00e9", "Lima, then San Jose", False),
        ("San Jos\u00e9", "San Jose and Lima", True),
        ("San Jos\u00e9", "", False),
        # Cities that are no answer to any question here.
        ("Paris", "London. No, Paris.", False),
        ("Canberra", "It is Sydney, not Canberra.", False),
        ("Conakry", "The capital of Guinea is Bissau, not Conakry.", False),
        ("Kuala Lumpur", "Malaysia, beside Singapore, has Kuala Lumpur.", True),
        # Spelling and marks.
        ("Paris", "_Paris_", True),
        ("Paris", "Paris\u2019s", True),
        ("Paris", "__Paris__, the city of light", True),
        ("Paris", "Parisian", False),
        ("Port-au-Prince", "Port au Prince", True),
        ("Port-au-Prince", "Port\u2011au\u2011Prince", True),
        ("Phnom Penh", "Phnom-Penh", True),
        ("New Delhi", "New\nDelhi", True),
        ("New Delhi", "New\u00a0Delhi", True),
        ("Sana'a", "Sanaa", True),
        ("Sana'a", "Sana\u02bca", True),
        ("N'Djamena", "N`Djamena", True),
        ("Kyiv", "Kiev", True),
        ("Bern", "Berne's old town", True),
        ("Nairobi", "A male voice said Nairobi.", True),
    ],
)
def test_the_first_city_counts(gold: str, response: str, correct: bool) -> None:
    (verdict,) = CapitalVerifier().verify([response], [gold])
    assert verdict.correct == correct
