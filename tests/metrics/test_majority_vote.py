"""The majority vote against a vote counted by hand, and the laws that make it well defined."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from opdlab.metrics import MajorityVote
from opdlab.metrics.functional import majority_vote

GOLD = "7"


def drawn(answers: list[str | None]) -> float:
    """The expectation over all draws of one sample among those with a most frequent answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0.0
    ballots = [answer for answer in answers if answer is not None and counts[answer] == max(counts.values())]
    return float(Fraction(sum(answer == GOLD for answer in ballots), len(ballots)))


def vote(answers: list[str | None]) -> float:
    return majority_vote([answers], torch.tensor([[answer == GOLD for answer in answers]])).item()


def test_equals_counting_over_all_answer_sheets() -> None:
    sheets = itertools.product([GOLD, "1", "2", None], repeat=5)
    for sheet in sheets:
        assert vote(list(sheet)) == pytest.approx(drawn(list(sheet)), abs=1e-12), sheet


def test_order_has_no_influence_to_the_bit() -> None:
    generator = random.Random(0)
    sheet = [GOLD] * 3 + ["1"] * 3 + ["2"] * 3 + [None, "3"]
    results = set()
    for _ in range(50):
        generator.shuffle(sheet)
        results.add(vote(sheet))
    assert results == {1 / 3}


def test_no_answer_is_no_vote() -> None:
    assert vote([None, None, None, GOLD]) == 1
    assert vote([None, None]) == 0


def test_without_any_extracted_answer_there_is_no_vote_to_show() -> None:
    metric = MajorityVote()
    metric.update([[None, None]], torch.tensor([[False, False]]))
    assert metric.compute().isnan()
    metric.update([["7", None]], torch.tensor([[True, False]]))
    assert metric.compute() == 0.5


def test_white_space_does_not_split_votes() -> None:
    correct = torch.tensor([[True, True, False, False, False]])
    assert majority_vote([["7", " 7 ", "1", "2", "3"]], correct).item() == 1


def test_equal_answers_judged_differently_count_by_their_share() -> None:
    # The toy's verifier wants the box at the end: the same answer may be correct in one response and wrong in another.
    assert majority_vote([["7", "7", "7", "1"]], torch.tensor([[True, False, True, True]])).item() == pytest.approx(
        2 / 3
    )


def test_metric_averages_over_problems_with_an_error() -> None:
    metric = MajorityVote()
    metric.update([["7", "7", "1"], ["1", "1", "7"]], torch.tensor([[True, True, False], [False, False, True]]))
    metric.update([["7", "1", None]], torch.tensor([[True, False, False]]))
    assert metric.compute().item() == pytest.approx(0.5)
    assert metric.standard_error().item() == pytest.approx(torch.tensor([1.0, 0.0, 0.5]).std().item() / 3**0.5)
