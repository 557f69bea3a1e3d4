"""Paired statistics against scipy, closed forms, and data with a known truth."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from opdlab.studies.report.statistics import (
    Array,
    crossed_bootstrap,
    detectable_difference,
    estimate,
    holm,
    interval,
    problem_scores,
    seeds_needed,
)
from tests.studies.report.synthetic_study import draw_correct


def crossed(seed: int, shape: tuple[int, int], seeds: float = 0.05, problems: float = 0.1, noise: float = 0.2) -> Array:
    generator = np.random.default_rng(seed)
    rows, columns = generator.normal(0, seeds, (shape[0], 1)), generator.normal(0, problems, shape[1])
    cells: Array = 0.1 + rows + columns + generator.normal(0, noise, shape)
    return cells


def test_crossed_bootstrap_is_scipys_of_two_independent_samples() -> None:
    cells = crossed(0, (5, 30))
    theirs = stats.bootstrap(
        (np.arange(5), np.arange(30)),
        lambda seeds, problems: cells[np.ix_(seeds, problems)].mean(),
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        random_state=1,
    )
    ours = crossed_bootstrap([cells[None]], seed=2, num_resamples=10_000)[:, 0, 0]
    found = interval(estimate([cells]), ours, seed=3)
    spread = theirs.standard_error
    assert ours.std() == pytest.approx(spread, rel=0.05)
    np.testing.assert_allclose([found.plain_low, found.plain_high], theirs.confidence_interval, atol=0.12 * spread)


def test_comparisons_and_benchmarks_share_the_draw_of_seeds() -> None:
    # Cells that depend only on the seed: only its draw matters.
    by_seed = np.repeat(np.random.default_rng(0).normal(size=(6, 1)), 7, axis=1)
    found = crossed_bootstrap([np.stack([by_seed, -by_seed]), np.stack([by_seed, by_seed])[:, :, :3]], 1, 50)
    assert found.shape == (50, 2, 2)
    np.testing.assert_allclose(found[:, 0, 0], -found[:, 0, 1])
    np.testing.assert_allclose(found[:, 0, 0], found[:, 1, 0])
    assert found[:, 0, 0].std() > 0
    # Cells that depend only on the problem: benchmarks draw theirs separately, and comparisons together.
    by_problem = by_seed.T[:, :6]
    found = crossed_bootstrap([np.stack([by_problem, 2 * by_problem])] * 2, 1, 50)
    np.testing.assert_allclose(2 * found[:, :, 0], found[:, :, 1])
    assert abs(np.corrcoef(found[:, 0, 0], found[:, 1, 0])[0, 1]) < 0.5


@pytest.mark.parametrize("shape", [(1, 40), (40, 1)])
def test_one_seed_or_one_problem_is_the_paired_t_test(shape: tuple[int, int]) -> None:
    cells = crossed(4, shape)
    found = estimate([cells])
    flat = cells.ravel()
    theirs = stats.ttest_1samp(flat, 0)
    assert found.standard_error == pytest.approx(stats.sem(flat))
    assert found.degrees_of_freedom == pytest.approx(39)
    ours = interval(found, crossed_bootstrap([cells[None]], 1, 40_000)[:, 0, 0], 2)
    expected = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours.low, ours.high], expected, atol=0.15 * found.standard_error)
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.01)


def test_standard_error_is_that_of_repeated_studies() -> None:
    """The variance is unbiased, also of a mean over benchmarks that share seeds; the bootstrap's own is not."""
    means, variances, plain = [], [], []
    for repeat in range(600):
        generator = np.random.default_rng(repeat)
        luck = generator.normal(0, 0.05, (6, 1))
        cells = [luck + generator.normal(0, 0.1, n) + generator.normal(0, 0.4, (6, n)) for n in (20, 40)]
        found = estimate(cells)
        means.append(found.difference)
        variances.append(found.standard_error**2)
        if repeat < 60:
            plain.append(crossed_bootstrap([each[None] for each in cells], repeat, 200).mean(1).var())
    truth = 0.05**2 / 6 + sum((0.1**2 + 0.4**2 / 6) / n for n in (20, 40)) / 4
    assert np.var(means) == pytest.approx(truth, rel=0.15)
    assert np.mean(variances) == pytest.approx(truth, rel=0.08)
    assert np.mean(plain) > 1.3 * truth


def test_parts_of_the_variance() -> None:
    found = estimate([crossed(1, (200, 300), seeds=0.05, problems=0.2, noise=0.3)])
    assert found.seed_part == pytest.approx(0.05**2 / 200 + 0.3**2 / 200 / 300, rel=0.25)
    assert found.problem_part == pytest.approx(0.2**2 / 300, rel=0.25)
    assert found.seed_part + found.problem_part == pytest.approx(found.standard_error**2)


def test_interval_has_the_tails_of_student() -> None:
    cells = crossed(5, (4, 64), seeds=0.1)
    found = estimate([cells])
    normal = found.difference + np.random.default_rng(0).normal(size=100_000)
    ours = interval(found, normal, 1)
    expected = stats.t.interval(0.95, found.degrees_of_freedom, found.difference, found.standard_error)
    np.testing.assert_allclose([ours.low, ours.high], expected, atol=0.1 * found.standard_error)
    student = stats.t.cdf(found.difference / found.standard_error, found.degrees_of_freedom)
    assert ours.probability == pytest.approx(student, abs=0.01)
    assert ours.p == pytest.approx(2 * min(student, 1 - student), abs=0.01)
    assert found.degrees_of_freedom < 10


def test_without_any_spread() -> None:
    same = np.zeros((3, 5))
    found = interval(estimate([same]), crossed_bootstrap([same[None]], 1, 500)[:, 0, 0], 2)
    assert (found.low, found.high, found.p, found.probability) == (0, 0, 1, 0.5)
    worse = np.full((3, 5), -0.7)
    found = interval(estimate([worse]), crossed_bootstrap([worse[None]], 1, 500)[:, 0, 0], 2)
    assert found.high == pytest.approx(-0.7)
    assert found.p < 0.005
    assert np.isnan(interval(estimate([worse[:1, :1]]), worse[:1, 0], 2).p)
    for cells in (same, worse, same + 0.1):  # 0.1 leaves a rounding error
        assert seeds_needed(estimate([cells]), 3, 0.05) is None


def scored(correct: tuple[NDArray[np.int64], NDArray[np.int64]], k: int = 1) -> Array:
    ours, theirs = (problem_scores(counts, 8, k) for counts in correct)
    difference: Array = theirs - ours
    return difference


@pytest.mark.parametrize("seed_std", [0.05, 0.0])
@pytest.mark.parametrize("shape", [(4, 64), (8, 64), (8, 256)])
def test_coverage(shape: tuple[int, int], seed_std: float) -> None:
    """A quick look; ``benchmarks/coverage.py`` has the whole table. With 300 studies ± 2.5% is chance."""
    generator, covered = np.random.default_rng(1), 0
    for repeat in range(300):
        cells = scored(draw_correct(generator, shape, effect=0.03, seed_std=seed_std))
        found = interval(estimate([cells]), crossed_bootstrap([cells[None]], repeat, 300)[:, 0, 0], repeat)
        covered += found.low <= 0.03 <= found.high
    assert 0.915 <= covered / 300 <= 0.99


def test_false_positives_of_a_family() -> None:
    generator, false = np.random.default_rng(2), 0
    for repeat in range(200):
        # Five variants against the same runs of the baseline.
        chance = generator.uniform(0.25, 0.75, 64) + generator.normal(0, 0.05, (6, 6, 1))
        ours, *others = problem_scores(generator.binomial(8, np.clip(chance, 0, 1)), 8, 1)
        cells = np.stack([theirs - ours for theirs in others])
        resampled = crossed_bootstrap([cells], repeat, 1000)[:, 0]
        p_values = [interval(estimate([each]), resampled[:, m], repeat).p for m, each in enumerate(cells)]
        false += min(holm(p_values)) < 0.05
    assert false / 200 <= 0.08  # 0.05 plus chance


def test_detectable_difference_is_detected_four_times_in_five() -> None:
    generator = np.random.default_rng(3)
    truth = (2 * 0.05**2 / 8 + 0.05**2 / 128 + 2 * 0.24 / 8 / 8 / 128) ** 0.5
    effect = detectable_difference(truth, 8)
    detected = 0
    for repeat in range(300):
        cells = scored(draw_correct(generator, (8, 128), effect=effect))
        resampled = crossed_bootstrap([cells[None]], repeat, 400)[:, 0, 0]
        detected += interval(estimate([cells]), resampled, repeat).p < 0.05
    assert detected / 300 == pytest.approx(0.8, abs=0.07)


def test_seeds_needed() -> None:
    cells = crossed(3, (16, 256), seeds=0.07, problems=0.0)
    found = estimate([cells])
    now = detectable_difference(found.standard_error, found.degrees_of_freedom)
    assert seeds_needed(found, 16, now) == pytest.approx(16, abs=1)
    half = seeds_needed(found, 16, now / 2)
    assert half is not None
    assert 50 < half < 80
    assert seeds_needed(estimate([crossed(3, (16, 8), problems=0.3)]), 16, 0.01) is None
    more = seeds_needed(found, 16, now, num_comparisons=10)
    assert more is not None
    assert more > 16


def test_holm() -> None:
    # R: p.adjust(c(0.04, 0.01, 0.03, 0.02, 0.5), "holm")
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02, 0.5]), [0.09, 0.05, 0.09, 0.08, 0.5])
    found = holm([0.01, float("nan"), 0.04])
    assert found[0] == 0.02
    assert np.isnan(found[1])
