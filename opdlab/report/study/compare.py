"""Comparisons of every variant with its baseline, by metric, benchmark and optimizer step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from opdlab.evaluation.benchmark_metrics import MEAN
from opdlab.report.study.load import Results
from opdlab.report.study.statistics import (
    LEVEL,
    MIN_SEEDS,
    Array,
    detectable_difference,
    estimate,
    holm,
    p_value,
    problem_scores,
    seeds_needed,
)

TARGET = 0.05  # the report gives the number of seeds needed to detect this difference
REVERSE_KL = "reverse_kl"


@dataclass(frozen=True)
class Place:
    """A metric on a benchmark after a number of optimizer steps.

    Args:
        metric: ``pass@1``, ``pass@8``, ``reverse_kl``.
        benchmark: its name, or ``mean``, the unweighted mean over benchmarks.
        step: optimizer steps.
    """

    metric: str
    benchmark: str
    step: int

    @property
    def is_rate(self) -> bool:
        """True if the metric lies between 0 and 1, and more is better; False for nats, of which fewer are."""
        return self.metric != REVERSE_KL

    @property
    def metric_name(self) -> str:
        """The metric's name in a sentence: ``pass@1``, ``reverse KL``."""
        return self.metric if self.is_rate else "reverse KL"


@dataclass(frozen=True)
class Comparison:
    """A variant against its baseline, on the seeds that both have finished. The fields are columns of a CSV file.

    Args:
        place: metric, benchmark and step.
        variant: its name.
        label: its name in the report.
        baseline: name of the variant that it is compared with.
        baseline_mean: mean of the baseline's metric in these pairs.
        variant_mean: mean of the variant's metric in these pairs.
        difference: their difference.
        low: lower end of the 95% interval, of rates at least -1, since they differ by 1 at most; NaN where runs and
            problems do not vary.
        high: its upper end, of rates at most 1.
        probability_of_improvement: 1 - p / 2 if the variant is ahead, else p / 2.
        p: see :func:`~opdlab.report.study.statistics.p_value`; NaN with fewer than 4 seeds, or with failed runs.
        p_holm: p after Holm, over all variants of the study.
        standard_error: of the difference; NaN with one seed and one problem.
        seed_share: part of its square that falls with the number of seeds.
        seeds: pairs of runs.
        seeds_ahead: pairs in which the variant's metric is better.
        collapsed: pairs in which training of the variant has collapsed.
        failed: pairs that lack a run because it has failed.
        detectable_difference: smallest difference that would be found, after Bonferroni over these variants. Above 1 no
            difference of rates would be. NaN without p, and if runs and problems do not vary.
        seeds_for_target: pairs with which a difference of 0.05 would be; None: unknown, or problems are what lacks.
    """

    place: Place
    variant: str
    label: str
    baseline: str
    baseline_mean: float
    variant_mean: float
    difference: float
    low: float
    high: float
    probability_of_improvement: float
    p: float
    p_holm: float
    standard_error: float
    seed_share: float
    seeds: int
    seeds_ahead: int
    collapsed: int
    failed: int
    detectable_difference: float
    seeds_for_target: int | None

    @property
    def has_verdict(self) -> bool:
        """True if there are enough seeds, and no failed runs, to say whether the variant differs."""
        return not np.isnan(self.p)

    @property
    def has_interval(self) -> bool:
        """True if runs or problems vary."""
        return not np.isnan(self.low)

    @property
    def ahead(self) -> bool:
        """True if the variant's mean is the better one."""
        return self.difference > 0 if self.place.is_rate else self.difference < 0

    @property
    def differs(self) -> bool:
        """True if the variant differs from the baseline significantly."""
        return self.p_holm < LEVEL

    def record(self) -> dict[str, Any]:
        """Return the columns of the CSV file."""
        fields = asdict(self)
        needed = fields.pop("seeds_for_target")
        return {**fields.pop("place"), **fields, f"seeds_for_{TARGET}": needed}


def metric_names(results: Results) -> list[str]:
    """Return each pass@k for which all benchmarks have enough samples, and the reverse KL if it was measured."""
    fewest = min(benchmark.num_samples for benchmark in results.benchmarks.values())
    return [*(f"pass@{k}" for k in results.pass_at if k <= fewest), *([REVERSE_KL] if results.reverse_kl else [])]


def places(results: Results) -> list[Place]:
    """Return all places, by step, metric and benchmark; if there are several benchmarks, their mean comes first."""
    benchmarks = [*([MEAN] if len(results.benchmarks) > 1 else []), *results.benchmarks]
    return [Place(*each) for step in results.steps for each in product(metric_names(results), benchmarks, [step])]


def run_scores(results: Results, variant: str, seeds: Sequence[int], place: Place) -> list[Array]:
    """Return the metric of each run and problem, [S, P]; of every benchmark if the place is their mean.

    Args:
        results: of the study.
        variant: name.
        seeds: of finished runs.
        place: metric, benchmark and step.
    """
    names = [name for name in results.benchmarks if place.benchmark in (MEAN, name)]
    keys = [[(variant, seed, place.step, name) for seed in seeds] for name in names]
    if not place.is_rate:
        return [np.stack([results.reverse_kl[key] for key in each]) for each in keys]
    k = int(place.metric.removeprefix("pass@"))
    return [
        problem_scores(np.stack([results.counts[key] for key in each]), results.benchmarks[name].num_samples, k)
        for name, each in zip(names, keys, strict=True)
    ]


def run_means(results: Results, variant: str, place: Place) -> Array:
    """Return the metric of each finished run of a variant, [S]."""
    return _means(run_scores(results, variant, results.finished(variant), place))


def _means(cells: Sequence[Array]) -> Array:
    means: Array = np.mean([each.mean(1) for each in cells], axis=0)
    return means


def compare(results: Results) -> list[Comparison]:
    """Return all comparisons, place after place, in the order of the study."""
    return [each for place in places(results) for each in _compare_at(place, results)]


def _compare_at(place: Place, results: Results) -> list[Comparison]:
    """Return the variants of one place, with p values and detectable differences corrected for their number."""
    pairs = [(variant, results.study.baseline_of(variant), results.paired(variant)) for variant in results.compared]
    scores = [[run_scores(results, name, seeds, place) for name in pair] for *pair, seeds in pairs]
    estimates = [estimate([one - other for one, other in zip(*sides, strict=True)]) for sides in scores]
    failed = [len(results.failed(variant, baseline)) for variant, baseline, _ in pairs]
    # Runs that fail are often those that diverge: without them a variant would look better than it is.
    judged = [each.num_seeds >= MIN_SEEDS and not count for each, count in zip(estimates, failed, strict=True)]
    p_values = [p_value(each) if may else np.nan for each, may in zip(estimates, judged, strict=True)]
    number, comparisons = results.num_comparisons, []  # also while some are still to come
    corrected = holm(p_values, number)
    for pair, sides, found, p, p_holm, lost in zip(pairs, scores, estimates, p_values, corrected, failed, strict=True):
        (variant, baseline, seeds), (theirs, ours) = pair, map(_means, sides)
        varies, difference = bool(found.varies), float(found.difference)
        width = float(found.error_bound(LEVEL / 2)) if varies else np.nan
        sign, widest = (1, 1.0) if place.is_rate else (-1, np.inf)
        detected = varies and not np.isnan(p)
        comparisons.append(
            Comparison(
                place=place,
                variant=variant,
                label=results.study.label(variant),
                baseline=baseline,
                baseline_mean=float(ours.mean()),
                variant_mean=float(theirs.mean()),
                difference=difference,
                low=float(np.maximum(difference - width, -widest)),
                high=float(np.minimum(difference + width, widest)),
                probability_of_improvement=1 - p / 2 if sign * difference > 0 else p / 2,
                p=p,
                p_holm=p_holm,
                standard_error=float(found.standard_error),
                seed_share=float(found.seed_part / found.standard_error**2) if varies else np.nan,
                seeds=len(seeds),
                seeds_ahead=int((sign * (theirs - ours) > 1e-12).sum()),  # Means of equal cells may differ by rounding.
                collapsed=sum((variant, seed) in results.collapsed for seed in seeds),
                failed=lost,
                detectable_difference=float(detectable_difference(found, number)) if detected else np.nan,
                seeds_for_target=seeds_needed(found, TARGET, number) if len(seeds) > 1 else None,
            )
        )
    return comparisons
