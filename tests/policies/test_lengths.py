"""Groups and packs hold every row once, and no more than the bound."""

import itertools
import random

import pytest

from opdlab.policies.passes import length_groups, length_packs, recomputed_first

BOUNDS = [None, 1, 40, 97, 500, 10**9]


def some_lengths(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.choice([0, generator.randint(1, 9), generator.randint(1, 200)]) for _ in range(24)]


@pytest.mark.parametrize("bound", BOUNDS)
def test_every_row_goes_once_and_within_the_bound(bound: int | None) -> None:
    for seed in range(20):
        lengths = some_lengths(seed)
        rows = [row for row, length in enumerate(lengths) if length]
        for overhead in (0, 50, 10**6):
            groups = length_groups(lengths, overhead, bound)
            assert sorted(itertools.chain(*groups)) == rows
            for group in groups:
                assert bound is None or len(group) == 1 or len(group) * max(lengths[row] for row in group) <= bound
        packs = length_packs(lengths, bound)
        assert sorted(itertools.chain(*packs)) == rows
        for pack in packs:
            assert bound is None or len(pack) == 1 or sum(lengths[row] for row in pack) <= bound


def test_no_bound_is_a_bound_that_holds_everything() -> None:
    for seed in range(20):
        lengths = some_lengths(seed)
        assert length_groups(lengths, 50, 24 * 200) == length_groups(lengths, 50)
        assert len(length_packs(lengths)) == 1
        assert length_packs(lengths, 10**6) == length_packs(lengths)


def test_packs_are_few() -> None:
    for seed in range(20):
        lengths = some_lengths(seed)
        fewest = -(-sum(lengths) // 200)
        assert len(length_packs(lengths, 200)) <= 11 / 9 * fewest + 1


def test_nothing_to_group() -> None:
    assert length_groups([0, 0], 9, max_tokens=5) == length_packs([0, 0], 5) == length_packs([]) == []


def test_a_group_is_not_split_for_rows_that_could_not_join_it() -> None:
    # Three of the rows of 10 would save 30 tokens each in a group of their own, but only one of them fits here.
    assert length_groups([40, 40, 10, 10, 10], overhead=60, max_tokens=120) == [[0, 1, 2], [3, 4]]
    assert length_groups([40, 40, 10, 10, 10], overhead=60) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("bound", [1, 60, 150, 400, 10**6])
def test_what_is_kept_fits_and_is_the_most_expensive(bound: int) -> None:
    for seed in range(20):
        costs = [cost for cost in some_lengths(seed) if cost]
        order, again = recomputed_first(costs, bound)
        assert sorted(order) == list(range(len(costs)))
        kept = order[again:]
        assert max(costs) in [costs[number] for number in kept]
        assert len(kept) == 1 or sum(costs[number] for number in kept) <= bound
        left = bound - sum(costs[number] for number in kept)
        assert all(costs[number] > left for number in order[:again])  # no more could have been kept
