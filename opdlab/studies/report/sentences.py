"""What was found, in plain words. Nothing is escaped here: whoever shows the text does that."""

from collections.abc import Sequence

from opdlab.evaluation.figures import MEAN
from opdlab.studies.report.compare import TARGET, Comparison, Place
from opdlab.studies.report.load import FINISHED, Results

_POWER = "with a probability of 80%, at 5% two-sided"


def number(value: float, sign: bool = False) -> str:
    """Three decimals; a dash for what is not known.

    Example:
        >>> number(0.0456), number(-0.0001, sign=True), number(float("nan"))
        ('0.046', '0.000', '-')
    """
    if value != value:
        return "-"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return "0.000" if float(text) == 0 else text


def p_value(value: float) -> str:
    """Three decimals, of which 0.05 must not be made by rounding.

    Example:
        >>> p_value(0.0002), p_value(0.0499), p_value(0.3)
        ('< 0.001', '0.0499', '0.300')
    """
    if value != value:
        return "-"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.4f}" if 0.0495 <= value < 0.0505 else f"{value:.3f}"


def place_name(place: Place) -> str:
    """A figure and where: ``pass@1 on toy``."""
    where = "the mean over benchmarks" if place.benchmark == MEAN else place.benchmark
    return f"{place.figure} on {where}"


def detectable_range(comparisons: Sequence[Comparison]) -> str:
    """Smallest detectable differences of some variants: one number, or two."""
    values = [each.detectable for each in comparisons if each.has_interval]
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}, depending on the variant"


def sentence(comparison: Comparison, results: Results) -> str:
    """What can be said of one variant at one place."""
    name, base = results.label(comparison.variant), results.label(results.baseline)
    found, bounds = comparison.found, comparison.interval
    if not comparison.has_interval:
        return (
            f"{name} and {base} differ by {number(found.difference, True)}, with one seed and one problem: "
            "nothing can be said of chance."
        )
    numbers = (
        f"{number(found.difference, True)}, 95% interval {number(bounds.low, True)} to {number(bounds.high, True)}, "
        f"p {_equals(comparison.adjusted_p)} after Holm"
    )
    if comparison.differs:
        side = "better" if found.difference > 0 else "worse"
        return f"{name} is {side} than {base}: {numbers}."
    if found.standard_error == 0 and found.difference == 0:
        return f"{name} and {base} have the same figure on every problem and seed."
    return (
        f"{name} cannot be told apart from {base}: {numbers}; "
        f"a difference of {number(comparison.detectable)} would be detected."
    )


def _equals(value: float) -> str:
    text = p_value(value)
    return text if text[0] == "<" else f"= {text}"


def conclusion(comparisons: Sequence[Comparison], results: Results) -> list[str]:
    """A sentence for each figure, at the largest budget and over all benchmarks.

    Args:
        comparisons: all of one place, for each place to conclude on, one after another.
        results: of the study.
    """
    families: dict[Place, list[Comparison]] = {}
    for each in comparisons:
        families.setdefault(each.place, []).append(each)
    return [_conclude(place, family, results) for place, family in families.items()]


def _conclude(place: Place, family: Sequence[Comparison], results: Results) -> str:
    base, where = results.label(results.baseline), place_name(place)
    judged = [each for each in family if each.has_interval]
    if not judged:
        return f"{where}: with one seed and one problem nothing can be told apart from {base}."
    if not any(each.differs for each in family):
        return (
            f"{where}: nothing can be told apart from {base} at this size. The smallest difference that this study "
            f"would detect {_POWER}{_after(judged)}, is {detectable_range(judged)}.{_mend(judged)}"
        )
    said = []
    for side, sign in (("better", 1), ("worse", -1)):
        names = [
            f"{results.label(each.variant)} ({number(each.found.difference, True)})"
            for each in family
            if each.differs and sign * each.found.difference > 0
        ]
        if names:
            said.append(f"{side} than {base}: {', '.join(names)}")
    rest = [each for each in judged if not each.differs]
    if rest:
        names = [results.label(each.variant) for each in rest]
        said.append(
            f"cannot be told apart from it: {', '.join(names)} (the smallest difference that would be detected "
            f"{_POWER}{_after(judged)}, is {detectable_range(rest)})"
        )
    return f"{where}: {'; '.join(said)}."


def _after(judged: Sequence[Comparison]) -> str:
    return f", after correction for {len(judged)} variants" if len(judged) > 1 else ""


def _mend(judged: Sequence[Comparison]) -> str:
    """How large a study would have to be."""
    repeated = [each for each in judged if each.num_seeds > 1]
    if not repeated or max(each.detectable for each in judged) <= TARGET:
        return ""
    needed = [each.seeds_needed for each in repeated]
    known = [each for each in needed if each is not None]
    if len(known) < len(needed):
        return f" For {TARGET} it would take more problems, not only more seeds."
    return f" For {TARGET} it would take about {max(known)} seeds."


def caveats(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """What limits the comparisons: few seeds, few problems, runs that lack."""
    said = []
    if any(each.num_seeds == 1 for each in comparisons):
        said.append(
            "Where only one seed is paired, intervals cover the choice of problems only and not that of seeds: another "
            "training run might come out differently, and nothing here says by how much."
        )
    if any(1 < each.num_seeds < 4 for each in comparisons):
        said.append("With two or three seeds, how much runs vary is hardly known, and the intervals are wide for it.")
    for name, benchmark in results.benchmarks.items():
        if len(benchmark.problems) == 1:
            said.append(f"{name} has one problem: intervals cover the choice of seeds only.")
    lacking = [run for run in results.runs.values() if run.state != FINISHED]
    if lacking:
        said.append(
            f"{len(lacking)} of {len(results.runs)} runs have not finished. A seed counts in a comparison only where "
            "both sides have it."
        )
    left_out = [v.label for v in results.variants if v.name not in (*results.compared, results.baseline)]
    if left_out:
        said.append(f"Not compared, since no finished run shares a seed with the baseline: {', '.join(left_out)}.")
    return said
