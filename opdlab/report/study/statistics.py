r"""Paired differences of runs, as pure functions of arrays.

Shapes: S seeds, P problems, K benchmarks; leading dimensions are independent studies. ``differences[..., s, p]`` is
variant minus baseline on problem p with seed s. Seeds and problems are both samples of larger populations: a run
repeated with the same problems, or the same runs on other problems, would have come out differently.

A two-way analysis of variance gives the variance of the mean difference over seeds (A), over problems (B), and the
noise of single cells (E), which both contain. A has only S - 1 degrees of freedom: with few seeds it is near 0 by
chance, and a study would take chance for certainty. So A counts as at least E, which has (S - 1)(P - 1), and each part
keeps the t quantile of its own degrees of freedom: ``(a t[S - 1] + b t[P - 1]) / sqrt(a + b)`` with ``a = max(A, E)``
and ``b = max(B - E, 0)``, Cochran's approximation to the Behrens-Fisher test. Unlike a common number of degrees of
freedom that is estimated from the parts (Welch, Satterthwaite), it keeps its level. ``benchmarks/coverage.py``
measures false positives, coverage and power.

References:
    Cochran, "Approximate significance levels of the Behrens-Fisher test", Biometrics 20 (1964); Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1 (2007); Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats

from opdlab.metrics.functional import pass_at_k

Array = NDArray[np.float64]

LEVEL, POWER = 0.05, 0.8
MIN_SEEDS = 4
"""Fewest seeds for a verdict: with fewer, hardly anything is known about how runs vary."""
_MAX_SEEDS = 1000
_LEAST_P = 1e-12
_NO_SPREAD = 1e-12  # A smaller standard error than this is rounding of equal cells.


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
    """A mean difference and the two parts of its variance.

    Args:
        difference: [...], mean over benchmarks of the mean over seeds and problems.
        seed_part: [...], part of the variance that falls with the number of seeds; 0 with one seed.
        problem_part: [...], the rest, which falls only with the number of problems.
        num_seeds: S.
        problem_degrees: [...], degrees of freedom of ``problem_part``; 0 with one problem.
    """

    difference: Array
    seed_part: Array
    problem_part: Array
    num_seeds: int
    problem_degrees: Array

    @property
    def standard_error(self) -> Array:
        """Return the standard error of the difference, [...]; NaN with only one seed and one problem."""
        known = (self.num_seeds > 1) | (self.problem_degrees > 0)
        return np.where(known, np.sqrt(self.seed_part + self.problem_part), np.nan)

    @property
    def varies(self) -> NDArray[np.bool_]:
        """True where seeds or problems differ at all; otherwise the spread is unknown."""
        return self.standard_error > _NO_SPREAD  # False for NaN

    def error_bound(self, tail: float) -> Array:
        """Return what the error of the difference exceeds with probability ``tail``, [...], at most 0.5."""
        seeds = stats.t.isf(tail, max(self.num_seeds - 1, 1))
        problems = stats.t.isf(tail, np.maximum(self.problem_degrees, 1))
        with np.errstate(invalid="ignore"):
            bound: Array = (self.seed_part * seeds + self.problem_part * problems) / self.standard_error
        return np.where(self.varies, bound, self.standard_error)


def estimate(differences: Sequence[Array]) -> Estimate:
    """Return the mean difference and its variance, from the two-way analysis of variance.

    With one seed only problems vary, with one problem only seeds.

    Args:
        differences: [..., S, P_k] for each of K benchmarks, all with the same seeds.

    Example:
        >>> found = estimate([np.array([[0.1, 0.3], [0.2, 0.4]])])
        >>> float(found.difference.round(3)), float(found.standard_error.round(3))
        (0.25, 0.112)
    """
    num_seeds = differences[0].shape[-2]
    rows = np.mean([cells.mean(-1) for cells in differences], axis=0)
    over_seeds = rows.var(-1, ddof=1) / num_seeds if num_seeds > 1 else 0.0 * rows[..., 0]
    over_problems, squares, noise = 0.0 * over_seeds, 0.0 * over_seeds, 0.0 * over_seeds
    for cells in differences:
        num_problems = cells.shape[-1]
        if num_problems == 1:
            continue
        columns = cells.mean(-2)
        part = columns.var(-1, ddof=1) / num_problems / len(differences) ** 2
        over_problems += part
        squares += part**2 / (num_problems - 1)
        if num_seeds > 1:
            means = cells.mean(-1, keepdims=True)
            residuals = cells - means - columns[..., None, :] + means.mean(-2, keepdims=True)
            freedom = (num_seeds - 1) * (num_problems - 1)
            noise += (residuals**2).sum((-2, -1)) / freedom / num_seeds / num_problems / len(differences) ** 2
    with np.errstate(invalid="ignore"):
        degrees = np.where(squares > 0, over_problems**2 / squares, sum(cells.shape[-1] - 1 for cells in differences))
    return Estimate(
        difference=rows.mean(-1),
        seed_part=np.maximum(over_seeds, noise),
        problem_part=np.maximum(over_problems - noise, 0.0),
        num_seeds=num_seeds,
        problem_degrees=degrees,
    )


def p_value(found: Estimate) -> float:
    """Return the two-sided p value of a single study; NaN with one seed and one problem.

    Where all cells are equal there is no standard error. If they are 0, p is 1. If not, p is the largest probability
    with which equal variants give this: independent runs of one distribution differ by a given number with a
    probability of at most 1/4, and they have done so with each of S seeds, in one of two directions.
    """
    size = abs(float(found.difference))
    if np.isnan(found.standard_error):
        return np.nan
    if not found.varies:
        return 1.0 if size < _NO_SPREAD else min(1.0, 2 * 0.25**found.num_seeds)
    if found.error_bound(_LEAST_P / 2) <= size:
        return _LEAST_P
    return float(optimize.brentq(lambda p: float(found.error_bound(p / 2)) - size, _LEAST_P, 1.0, xtol=_LEAST_P))


def holm(p_values: Sequence[float], num_comparisons: int = 0) -> list[float]:
    """Return Holm-adjusted p values: rejecting below 0.05 keeps the family-wise error below 5%. NaN is skipped.

    Args:
        p_values: NaN for comparisons without one.
        num_comparisons: of the family, if some are still to come; they count as if their p were 1.

    Example:
        >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
        >>> [round(p, 2) for p in holm([0.01, 0.04], num_comparisons=3)]
        [0.03, 0.08]
    """
    values = np.array(p_values, dtype=np.float64)
    adjusted = values.copy()
    order = [index for index in np.argsort(values, kind="stable") if not np.isnan(values[index])]
    factors = max(num_comparisons, len(order)) - np.arange(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return [float(p) for p in adjusted]


def detectable_difference(found: Estimate, num_comparisons: int = 1) -> Array:
    """Return the smallest true difference that is detected with probability 80%, two-sided at 5%, [...].

    The first of m comparisons in Holm's order has to pass 0.05 / m. 0 where runs and problems do not vary.

    Args:
        found: see :func:`estimate`.
        num_comparisons: m.

    Example:
        >>> found = Estimate(np.zeros(1), np.full(1, 0.0004), np.zeros(1), 16, np.full(1, 63.0))
        >>> detectable_difference(found).round(4).tolist()
        [0.06]
    """
    return found.error_bound(LEVEL / 2 / num_comparisons) + found.error_bound(1 - POWER)


def seeds_needed(found: Estimate, target: float, num_comparisons: int = 1) -> int | None:
    """Return the number of seeds that makes ``target`` detectable on the same number of problems.

    Args:
        found: of a single study, with at least 2 seeds.
        target: the difference.
        num_comparisons: see :func:`detectable_difference`.

    Returns:
        At least 4. None if 1000 seeds are not enough, so that more problems are needed; and if nothing varies, so that
        the spread over other seeds and problems is unknown.
    """

    def enough(seeds: int) -> bool:
        planned = replace(found, seed_part=found.seed_part * found.num_seeds / seeds, num_seeds=seeds)
        return bool(detectable_difference(planned, num_comparisons) <= target)

    if not found.varies or not enough(_MAX_SEEDS):
        return None
    return MIN_SEEDS + bisect_left(range(MIN_SEEDS, _MAX_SEEDS), True, key=enough)
