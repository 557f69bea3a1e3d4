"""Paired statistics against scipy, closed forms, and data with a known truth. `benchmarks/coverage.py` has more."""

import numpy as np
import pytest
from scipy import stats

from opdlab.report.study.statistics import (
    LEVEL,
    Array,
    Estimate,
    detectable_difference,
    estimate,
    holm,
    p_value,
    problem_scores,
    seeds_needed,
)
from tests.report.synthetic_study import draw_correct


def crossed(
    seed: int, shape: tuple[int, ...], seeds: float = 0.05, problems: float = 0.1, noise: float = 0.2, mean: float = 0.1
) -> Array:
    """Cells of crossed random effects, [..., S, P]."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(0, seeds, (*shape[:-1], 1))
    columns = generator.normal(0, problems, (*shape[:-2], 1, shape[-1]))
    cells: Array = mean + rows + columns + generator.normal(0, noise, shape)
    return cells


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)])
def test_one_seed_or_one_problem_is_the_paired_t_test(shape: tuple[int, int]) -> None:
    cells = crossed(4, shape)
    found, theirs = estimate([cells]), stats.ttest_1samp(cells.ravel(), 0)
    assert float(found.standard_error) == pytest.approx(stats.sem(cells.ravel()))
    bounds = found.difference + np.array([-1, 1]) * found.error_bound(LEVEL / 2)
    np.testing.assert_allclose(bounds, theirs.confidence_interval(0.95))
    assert p_value(found) == pytest.approx(theirs.pvalue)


def test_many_studies_are_estimated_at_once() -> None:
    cells = [crossed(1, (5, 6, 20)), crossed(2, (5, 6, 30))]
    together = estimate(cells)
    for index in range(5):
        alone = estimate([each[index] for each in cells])
        for name in ("difference", "standard_error", "seed_part", "problem_degrees"):
            np.testing.assert_allclose(getattr(together, name)[index], getattr(alone, name))
        np.testing.assert_allclose(together.error_bound(0.01)[index], alone.error_bound(0.01))


def test_standard_error_is_that_of_repeated_studies() -> None:
    """Also of a mean over benchmarks that share seeds. It is a little too large, and never too small."""
    generator = np.random.default_rng(0)
    luck = generator.normal(0, 0.05, (2000, 6, 1))
    cells = [luck + generator.normal(0, 0.1, (2000, 1, n)) + generator.normal(0, 0.4, (2000, 6, n)) for n in (20, 40)]
    found = estimate(cells)
    means, variances = found.difference, found.standard_error**2
    truth = 0.05**2 / 6 + sum((0.1**2 + 0.4**2 / 6) / n for n in (20, 40)) / 4
    assert np.var(means) == pytest.approx(truth, rel=0.1)
    assert truth < np.mean(variances) < 1.2 * truth


def test_the_variance_over_seeds_is_bounded_from_below() -> None:
    """Seeds whose means agree by chance: single answers vary, so runs do."""
    noise = np.random.default_rng(3).normal(0, 0.4, (4, 30))
    found = estimate([noise - noise.mean(1, keepdims=True)])
    residuals = noise - noise.mean(1, keepdims=True) - noise.mean(0) + noise.mean()
    assert float(found.seed_part) == pytest.approx((residuals**2).sum() / (3 * 29) / noise.size)


def test_parts_of_the_variance() -> None:
    found = estimate([crossed(1, (200, 300), seeds=0.05, problems=0.2, noise=0.3)])
    assert float(found.seed_part) == pytest.approx(0.05**2 / 200 + 0.3**2 / 200 / 300, rel=0.25)
    assert float(found.problem_part) == pytest.approx(0.2**2 / 300, rel=0.25)
    assert float(found.seed_part + found.problem_part) == pytest.approx(float(found.standard_error) ** 2)


def test_p_is_the_level_at_which_the_interval_ends_at_zero() -> None:
    found = estimate([crossed(5, (4, 64), seeds=0.1)])
    p = p_value(found)
    assert 0.001 < p < 0.9
    assert float(found.error_bound(p / 2)) == pytest.approx(abs(float(found.difference)))
    far = Estimate(np.array(1.0), np.array(1e-10), np.array(0.0), 64, np.array(10.0))
    assert 0 < p_value(far) < 1e-9


def test_without_any_spread() -> None:
    same, worse = np.zeros((3, 5)), np.full((3, 5), -0.7)
    assert p_value(estimate([same])) == 1
    assert p_value(estimate([worse])) == 2 / 4**3
    assert np.isnan(p_value(estimate([worse[:1, :1]])))
    for cells in (same, worse, same + 0.1):  # 0.1 leaves a rounding error
        assert not estimate([cells]).varies
        assert seeds_needed(estimate([cells]), 0.05) is None


# Studies without an effect: the size of a simulation, and what it may report at most.
NULL = {
    "two problems in ten vary": {"problems": 0.3, "noise": 0.05, "seeds": 0.0},
    "seeds alone": {"problems": 0.0, "noise": 0.01, "seeds": 0.1},
    "noise alone": {"problems": 0.0, "noise": 0.3, "seeds": 0.0},
    "all alike": {"problems": 0.2, "noise": 0.4, "seeds": 0.1},
}


@pytest.mark.parametrize("case", NULL)
@pytest.mark.parametrize("shape", [(4, 7), (4, 128), (16, 7)])
def test_false_positives(case: str, shape: tuple[int, int]) -> None:
    """A quick look at the normal case; ``benchmarks/coverage.py`` has the whole table."""
    found = estimate([crossed(6, (4000, *shape), **NULL[case], mean=0.0)])
    false = float((abs(found.difference) > found.error_bound(LEVEL / 2)).mean())
    assert false < 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


def test_detectable_difference_is_detected_four_times_in_five() -> None:
    truth = (2 * 0.05**2 / 8 + 0.05**2 / 128 + 2 * 0.24 / 8 / 8 / 128) ** 0.5
    sizes = np.array([truth**2 - 0.05**2 / 128, 0.05**2 / 128])
    effect = float(detectable_difference(Estimate(np.zeros(()), sizes[0], sizes[1], 8, np.array(127.0))))
    generator = np.random.default_rng(3)
    pairs = [draw_correct(generator, (8, 128), effect=effect) for _ in range(1000)]
    ours, theirs = (problem_scores(np.stack(side), 8, 1) for side in zip(*pairs, strict=True))
    found = estimate([theirs - ours])
    detected = float((found.difference > found.error_bound(LEVEL / 2)).mean())
    assert detected == pytest.approx(0.8, abs=0.05)


def test_seeds_needed() -> None:
    found = estimate([crossed(3, (16, 256), seeds=0.07, problems=0.0)])
    now = float(detectable_difference(found))
    assert seeds_needed(found, now) == pytest.approx(16, abs=1)
    half = seeds_needed(found, now / 2)
    assert half is not None
    assert 50 < half < 80
    assert seeds_needed(found, 1.0) == 4  # no verdict with fewer
    assert seeds_needed(estimate([crossed(3, (16, 8), problems=0.3)]), 0.01) is None
    more = seeds_needed(found, now, num_comparisons=10)
    assert more is not None
    assert more > 16


def test_holm() -> None:
    # R: p.adjust(c(0.04, 0.01, 0.03, 0.02, 0.5), "holm")
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02, 0.5]), [0.09, 0.05, 0.09, 0.08, 0.5])
    found = holm([0.01, float("nan"), 0.04])
    assert found[0] == 0.02
    assert np.isnan(found[1])
