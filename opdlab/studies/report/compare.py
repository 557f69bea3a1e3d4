"""Comparisons of every variant with its baseline, by metric, benchmark and budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from opdlab.evaluation.benchmark_metrics import MEAN
from opdlab.seeds import derive_seed
from opdlab.studies.report.load import Results
from opdlab.studies.report.statistics import (
    LEVEL,
    Array,
    Estimate,
    Interval,
    crossed_bootstrap,
    detectable_difference,
    estimate,
    holm,
    interval,
    problem_scores,
    seeds_needed,
)

PASS_AT = (1, 8)
TARGET = 0.05  # the report gives the number of seeds needed to detect this difference


@dataclass(frozen=True)
class Place:
    """A metric on a benchmark at a budget.

    Args:
        figure: ``pass@1``, ``pass@8``.
        benchmark: its name, or ``mean``, the unweighted mean over benchmarks.
        budget: optimizer steps.
    """

    figure: str
    benchmark: str
    budget: int


@dataclass(frozen=True)
class Comparison:
    """A variant against its baseline, on the seeds that both have finished.

    Args:
        place: metric, benchmark and budget.
        variant: its name.
        baseline: name of the variant that it is compared with.
        num_seeds: pairs of runs.
        seeds_ahead: pairs in which the variant's metric is higher.
        baseline_mean: mean of the baseline's metric in these pairs.
        variant_mean: mean of the variant's metric in these pairs.
        found: the difference and its standard error.
        interval: see :class:`~opdlab.studies.report.statistics.Interval`; within -1 and 1, where differences of rates
            are, and without ends where runs and problems do not vary.
        adjusted_p: p after Holm, over the variants at this place.
        detectable: smallest difference that would be found, after Bonferroni over these variants. Above 1 no difference
            of rates would be. NaN if it is unknown: with one seed, or if runs and problems do not vary.
        seeds_needed: pairs with which a difference of 0.05 would be; None: unknown, or problems are what lacks.
    """

    place: Place
    variant: str
    baseline: str
    num_seeds: int
    seeds_ahead: int
    baseline_mean: float
    variant_mean: float
    found: Estimate
    interval: Interval
    adjusted_p: float
    detectable: float
    seeds_needed: int | None

    @property
    def has_interval(self) -> bool:
        """True unless there is only one seed and one problem, so that an interval exists."""
        return not np.isnan(self.found.standard_error)

    @property
    def knows_detectable(self) -> bool:
        """True if the smallest detectable difference is known."""
        return not np.isnan(self.detectable)

    @property
    def differs(self) -> bool:
        """True if the variant differs from the baseline significantly."""
        return self.adjusted_p < LEVEL


def figure_names(results: Results) -> dict[str, int]:
    """Return the metrics for which all benchmarks have enough samples, with their k.

    Args:
        results: of the study.
    """
    fewest = min(benchmark.num_samples for benchmark in results.benchmarks.values())
    return {f"pass@{k}": k for k in PASS_AT if k <= fewest}


def benchmark_names(results: Results) -> list[str]:
    """Return the names of the benchmarks; if there are several, their mean comes first."""
    names = list(results.benchmarks)
    return [MEAN, *names] if len(names) > 1 else names


def scores(results: Results, variant: str, seeds: Sequence[int], budget: int, k: int) -> dict[str, Array]:
    """Return pass@k of each run and problem, [S, P], by benchmark.

    Args:
        results: of the study.
        variant: name.
        seeds: of finished runs.
        budget: optimizer steps.
        k: of pass@k.
    """
    return {
        name: problem_scores(
            np.stack([results.counts[variant, seed, budget, name] for seed in seeds]), benchmark.num_samples, k
        )
        for name, benchmark in results.benchmarks.items()
    }


def run_figures(results: Results, variant: str, place: Place) -> Array:
    """Return the metric of each finished run of a variant, [S].

    Args:
        results: of the study.
        variant: name.
        place: metric, benchmark and budget.
    """
    found = scores(results, variant, results.finished(variant), place.budget, figure_names(results)[place.figure])
    chosen = found.values() if place.benchmark == MEAN else [found[place.benchmark]]
    figures: Array = np.mean([cells.mean(1) for cells in chosen], axis=0)
    return figures


def compare(results: Results) -> list[Comparison]:
    """Return all comparisons: by budget, metric and benchmark, in the order of the study.

    Args:
        results: of the study.
    """
    groups: dict[tuple[int, ...], list[str]] = {}  # variants with the same seeds are resampled together
    for variant in results.compared:
        groups.setdefault(tuple(results.paired(variant)), []).append(variant)
    found = {
        (each.place, each.variant): each
        for budget, (seeds, variants) in product(results.budgets, groups.items())
        for each in _compare_group(results, budget, seeds, variants)
    }
    places = product(results.budgets, figure_names(results), benchmark_names(results))
    families = [[found[Place(figure, name, budget), v] for v in results.compared] for budget, figure, name in places]
    return [each for family in families for each in _adjusted(family)]


def _compare_group(results: Results, budget: int, seeds: tuple[int, ...], variants: Sequence[str]) -> list[Comparison]:
    keys = list(product(figure_names(results).items(), variants))
    pairs = [
        [scores(results, name, seeds, budget, k) for name in (variant, results.baseline_of(variant))]
        for (_, k), variant in keys
    ]
    cells = {name: np.stack([theirs[name] - ours[name] for theirs, ours in pairs]) for name in results.benchmarks}
    resampled = crossed_bootstrap(list(cells.values()), derive_seed("report", results.study.name, budget))
    by_place = {MEAN: resampled.mean(1)} | {name: resampled[:, index] for index, name in enumerate(cells)}
    return [
        _comparison(
            Place(figure, name, budget),
            (variant, results.baseline_of(variant)),
            pair=[list(side.values()) if name == MEAN else [side[name]] for side in pair],
            resampled=by_place[name][:, index],
        )
        for index, (((figure, _), variant), pair) in enumerate(zip(keys, pairs, strict=True))
        for name in benchmark_names(results)
    ]


def _comparison(place: Place, names: tuple[str, str], *, pair: Sequence[list[Array]], resampled: Array) -> Comparison:
    theirs, ours = (np.mean([cells.mean(1) for cells in side], axis=0) for side in pair)
    found = estimate([one - other for one, other in zip(*pair, strict=True)])
    bounds = interval(found, resampled, derive_seed("report", "chi-square"))
    # The true difference lies between -1 and 1, so cutting the interval there keeps its coverage.
    low, high = np.clip([bounds.low, bounds.high], -1, 1) if found.varies else (np.nan, np.nan)
    return Comparison(
        place=place,
        variant=names[0],
        baseline=names[1],
        num_seeds=len(theirs),
        # Means of equal cells may differ by rounding.
        seeds_ahead=int((theirs - ours > 1e-12).sum()),
        baseline_mean=float(ours.mean()),
        variant_mean=float(theirs.mean()),
        found=found,
        interval=replace(bounds, low=float(low), high=float(high)),
        adjusted_p=np.nan,
        detectable=np.nan,
        seeds_needed=None,
    )


def _adjusted(family: Sequence[Comparison]) -> list[Comparison]:
    """Return the variants of one place, with p values and detectable differences corrected for their number."""
    number = sum(each.has_interval for each in family)
    adjusted = []
    for each, p in zip(family, holm([each.interval.p for each in family]), strict=True):
        detectable, needed = np.nan, None
        if each.num_seeds > 1:
            needed = seeds_needed(each.found, each.num_seeds, TARGET, number)
            if each.found.varies:
                freedom = each.found.degrees_of_freedom
                detectable = detectable_difference(each.found.standard_error, freedom, max(number, 1))
        adjusted.append(replace(each, adjusted_p=p, detectable=detectable, seeds_needed=needed))
    return adjusted
