r"""Paired differences of runs, as pure functions of arrays.

Shapes: M comparisons, S seeds, P problems, B resamples, K benchmarks. ``differences[m, s, p]`` is variant minus
baseline on problem p with seed s. Seeds and problems are both samples of larger populations, so both must be resampled:
a run repeated with the same problems, or the same runs on other problems, would have come out differently.

The crossed ("pigeonhole") bootstrap draws seeds and problems independently, the same for both sides of a pair. Without
correction its spread is wrong in both directions: with few seeds it is too narrow, by sqrt((S - 1) / S) and for
lack of t quantiles; where the noise of single cells dominates it is too wide, up to sqrt(3) times, since a drawn row
and a drawn column each carry that noise along once more (Owen 2007). So its deviations are rescaled to the standard
error that the two-way analysis of variance gives without that bias, and each is divided by sqrt(chi2 / df), which makes
a normal shape Student's t. `benchmarks/coverage.py` has the coverage of both.

References:
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007); Efron & Tibshirani, "An Introduction to the
    Bootstrap" (1993); Satterthwaite, Biometrics Bulletin 2 (1946); Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from opdlab.metrics.functional import pass_at_k

Array = NDArray[np.float64]

LEVEL, POWER = 0.05, 0.8
NUM_RESAMPLES = 10_000
_MAX_SEEDS = 1000
_CHUNK = 1000  # Resamples at a time, so that weights of 10,000 problems stay below 100 MB.
# The variance of a mean is at least that of its independent noise. An estimate below half of it is chance.
_LEAST_NOISE = 0.5
_NO_SPREAD = 1e-12  # A smaller spread than this is rounding of equal cells.


def problem_scores(num_correct: NDArray[np.int64], num_samples: int, k: int) -> Array:
    """Return the unbiased pass@k of each problem; with k = 1 it is the share of correct samples, avg@n.

    Args:
        num_correct: any shape, correct samples c of a problem.
        num_samples: n.
        k: 1 to n.

    Example:
        >>> problem_scores(np.array([[0, 1], [2, 4]]), num_samples=4, k=2).round(3).tolist()
        [[0.0, 0.5], [0.833, 1.0]]
    """
    table: Array = pass_at_k(torch.arange(num_samples + 1), num_samples, k).numpy()
    return table[num_correct]


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its standard error.

    Args:
        difference: mean over benchmarks of the mean over seeds and problems.
        standard_error: NaN with only one seed and one problem.
        degrees_of_freedom: of the standard error, after Satterthwaite.
        seed_part: part of the variance that falls with the number of seeds; 0 with one seed.
        problem_part: the rest, which falls only with the number of problems.
        problem_degrees: degrees of freedom of ``problem_part``.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    seed_part: float
    problem_part: float
    problem_degrees: int

    @property
    def varies(self) -> bool:
        """True if seeds or problems differ at all; otherwise the spread is unknown."""
        return bool(self.standard_error > _NO_SPREAD)  # False for NaN


def estimate(differences: Sequence[Array]) -> Estimate:
    """Return the mean difference, with a standard error from the two-way analysis of variance.

    With seeds and problems as crossed random effects, ``var = A + sum(B_k) - sum(E_k)``: A is the variance over seeds
    of the mean over everything else, divided by S; B_k that over problems, divided by P; E_k the noise of single
    cells, which both of them contain, so it is subtracted once. With one seed only problems vary, with one
    problem only seeds.

    Args:
        differences: [S, P_k] for each of K benchmarks, all with the same seeds.

    Example:
        >>> found = estimate([np.array([[0.1, 0.3], [0.2, 0.4]])])
        >>> round(found.difference, 3), round(found.standard_error, 3)
        (0.25, 0.112)
    """
    num_seeds = len(differences[0])
    rows = np.mean([cells.mean(1) for cells in differences], axis=0)
    over_seeds = float(rows.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    over_problems, noise, squares = 0.0, 0.0, over_seeds**2 / max(num_seeds - 1, 1)
    for cells in differences:
        num_problems = cells.shape[1]
        if num_problems == 1:
            continue
        columns = cells.mean(0)
        share = float(columns.var(ddof=1)) / num_problems / len(differences) ** 2
        over_problems += share
        squares += share**2 / (num_problems - 1)
        if num_seeds > 1:
            residuals = cells - cells.mean(1, keepdims=True) - columns + cells.mean()
            freedom = (num_seeds - 1) * (num_problems - 1)
            share = float((residuals**2).sum()) / freedom / cells.size / len(differences) ** 2
            noise += share
            squares += share**2 / freedom
    problems = sum(cells.shape[1] - 1 for cells in differences)
    variance = max(over_seeds + over_problems - noise, _LEAST_NOISE * noise)
    if num_seeds == 1 and problems == 0:
        return Estimate(float(rows[0]), np.nan, np.nan, 0.0, 0.0, 0)
    problem_part = min(max(over_problems - noise, 0.0), variance)
    return Estimate(
        difference=float(rows.mean()),
        standard_error=variance**0.5,
        degrees_of_freedom=variance**2 / squares if squares else float(max(num_seeds - 1, problems)),
        seed_part=variance - problem_part if num_seeds > 1 else 0.0,
        problem_part=problem_part if num_seeds > 1 else variance,
        problem_degrees=problems,
    )


def crossed_bootstrap(differences: Sequence[Array], seed: int, num_resamples: int = NUM_RESAMPLES) -> Array:
    """Return means of resampled seeds x resampled problems, with the same draws for all comparisons.

    Every mean is linear in how often each seed and each problem was drawn, so that a resample is a product of matrices.

    Args:
        differences: [M, S, P_k] for each of K benchmarks. They share the draw of seeds, and each draws its problems.
        seed: of the generator.
        num_resamples: B.

    Returns:
        [B, K, M].
    """
    generator = np.random.default_rng(seed)
    num_comparisons, num_seeds = differences[0].shape[:2]
    # [P, M * S]: one matrix product resamples problems for all comparisons and seeds.
    by_problem = [np.moveaxis(cells, 2, 0).reshape(cells.shape[2], -1) for cells in differences]
    parts = []
    for start in range(0, num_resamples, _CHUNK):
        size = min(_CHUNK, num_resamples - start)
        seeds = _draws(generator, size, num_seeds)
        means = []
        for cells in by_problem:
            rows = (_draws(generator, size, len(cells)) @ cells).reshape(size, num_comparisons, num_seeds)
            means.append(np.einsum("bms,bs->bm", rows, seeds))
        parts.append(np.stack(means, 1))
    return np.concatenate(parts)


def _draws(generator: np.random.Generator, size: int, number: int) -> Array:
    """Return the share of each of ``number`` items among as many draws with replacement; [size, number]."""
    drawn = generator.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number) / number


@dataclass(frozen=True)
class Interval:
    """Confidence interval and p value from resampling.

    Args:
        low: lower end of the 95% interval.
        high: upper end.
        probability: share of the rescaled resamples above 0, those at 0 counted half.
        p: two-sided: twice the smaller share at or beyond 0.
        plain_low: lower end of the percentile interval of the uncorrected bootstrap.
        plain_high: its upper end.
    """

    low: float
    high: float
    probability: float
    p: float
    plain_low: float
    plain_high: float


def interval(found: Estimate, resampled: Array, seed: int) -> Interval:
    """Return the 95% interval, the probability of improvement and the p value.

    Args:
        found: see :func:`estimate`.
        resampled: [B] means, see :func:`crossed_bootstrap`.
        seed: for the chi-square draws.

    Returns:
        All NaN with only one seed and one problem.
    """
    if np.isnan(found.standard_error):
        return Interval(*[np.nan] * 6)
    tails = [100 * LEVEL / 2, 100 - 100 * LEVEL / 2]
    plain = np.percentile(resampled, tails)
    shape, spread = resampled - found.difference, resampled.std()
    if spread > _NO_SPREAD and found.varies:
        freedom = found.degrees_of_freedom
        chi = np.random.default_rng(seed).chisquare(freedom, len(resampled)) / freedom
        drawn = found.difference + found.standard_error * shape / spread / np.sqrt(chi)
    else:
        drawn = np.full_like(resampled, 0.0 if abs(found.difference) < _NO_SPREAD else found.difference)
    low, high = np.percentile(drawn, tails)
    below, above, size = (drawn <= 0).sum(), (drawn >= 0).sum(), len(drawn)
    return Interval(
        low=float(low),
        high=float(high),
        probability=float((above + size - below) / (2 * size)),
        p=float(min(1.0, 2 * (1 + min(below, above)) / (1 + size))),
        plain_low=float(plain[0]),
        plain_high=float(plain[1]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p values: rejecting below 0.05 keeps the family-wise error below 5%. NaN is skipped.

    Example:
        >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    values = np.array(p_values, dtype=np.float64)
    adjusted = values.copy()
    order = [index for index in np.argsort(values, kind="stable") if not np.isnan(values[index])]
    factors = len(order) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return [float(p) for p in adjusted]


def detectable_difference(standard_error: float, degrees_of_freedom: float, num_comparisons: int = 1) -> float:
    """Return the smallest true difference that is detected with probability 80%, two-sided at 5%.

    ``(t(1 - 0.05 / 2m) + t(0.8)) * se``: the first of m comparisons in Holm's order has to pass 0.05 / m.

    Args:
        standard_error: of the difference.
        degrees_of_freedom: of it.
        num_comparisons: m.

    Example:
        >>> round(detectable_difference(0.02, 15), 4)
        0.06
    """
    quantiles = stats.t.ppf([1 - LEVEL / 2 / num_comparisons, POWER], degrees_of_freedom)
    return float(np.sum(quantiles) * standard_error)


def seeds_needed(found: Estimate, num_seeds: int, target: float, num_comparisons: int = 1) -> int | None:
    """Return the number of seeds that makes ``target`` detectable on the same number of problems.

    Args:
        found: with ``num_seeds`` seeds.
        num_seeds: S, at least 2.
        target: the difference.
        num_comparisons: see :func:`detectable_difference`.

    Returns:
        At least 2. None if 1000 seeds are not enough, so that more problems are needed; and if nothing varies, so that
        the spread over other seeds and problems is unknown.
    """
    if not found.varies:
        return None
    seeds = np.arange(2, _MAX_SEEDS + 1)
    from_seeds = found.seed_part * num_seeds / seeds
    variance = from_seeds + found.problem_part
    squares = from_seeds**2 / (seeds - 1) + found.problem_part**2 / max(found.problem_degrees, 1)
    quantiles = stats.t.ppf([[1 - LEVEL / 2 / num_comparisons], [POWER]], variance**2 / squares)
    enough = np.sum(quantiles, 0) * np.sqrt(variance) <= target
    return int(seeds[enough.argmax()]) if enough.any() else None
