"""Results of a study as sentences. Text is not escaped here; each output format escapes it."""

from collections.abc import Sequence

from opdlab.evaluation.benchmark_metrics import MEAN
from opdlab.studies.report.compare import TARGET, Comparison, Place
from opdlab.studies.report.load import Results
from opdlab.studies.report.statistics import LEVEL

_POWER = "with a probability of 80%, at 5% two-sided"
_RATES = "rates differ by 1 at most"


def number(value: float, sign: bool = False) -> str:
    """Return three decimals; a dash for unknown numbers.

    Example:
        >>> number(0.0456), number(-0.0001, sign=True), number(float("nan"))
        ('0.046', '0.000', '-')
    """
    if value != value:
        return "-"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return "0.000" if float(text) == 0 else text


def detectable(value: float) -> str:
    """Return a detectable difference as text: "> 1" above 1, which no difference of rates reaches.

    Example:
        >>> detectable(0.25), detectable(1.092), detectable(float("nan"))
        ('0.250', '> 1', '-')
    """
    return "> 1" if value > 1 else number(value)


def p_value(value: float) -> str:
    """Return a p value with three decimals, or four where rounding would give 0.05.

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
    """Return metric and benchmark: ``pass@1 on toy``."""
    where = "the mean over benchmarks" if place.benchmark == MEAN else place.benchmark
    return f"{place.figure} on {where}"


def detectable_range(values: Sequence[float]) -> str:
    """Return the smallest detectable differences of some variants: one number, or two.

    Example:
        >>> detectable_range([0.2, 0.1]), detectable_range([0.9, 1.3])
        ('0.100 to 0.200, depending on the variant', '0.900 to more than 1, depending on the variant')
    """
    low, high = (detectable(value).replace(">", "more than") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}, depending on the variant"


def _unknown(comparisons: Sequence[Comparison]) -> str:
    """Return the reason why the detectable difference is unknown."""
    if all(each.num_seeds == 1 for each in comparisons):
        return "unknown, since one seed does not tell how runs vary"
    if any(each.num_seeds == 1 for each in comparisons):
        return "unknown, since runs and problems do not vary here, or one seed is paired"
    return "unknown, since runs and problems do not vary here"


def _smallest(judged: Sequence[Comparison], family: Sequence[Comparison], results: Results) -> str:
    """Return a clause on the smallest difference that a study detects, without a full stop.

    Args:
        judged: the variants that the clause is about.
        family: all variants that the correction counts.
        results: of the study.
    """
    known = [each.detectable for each in judged if each.knows_detectable]
    unknown = [each for each in judged if not each.knows_detectable]
    if not known:
        return f"what this study would detect is {_unknown(unknown)}"
    after = f", after correction for {len(family)} variants" if len(family) > 1 else ""
    said = f"the smallest difference that this study would detect {_POWER}{after}, is {detectable_range(known)}"
    if min(known) > 1:
        said += f", so that it can find no difference here at all: {_RATES}"
    if unknown:
        said += f"; for {', '.join(results.label(each.variant) for each in unknown)} it is {_unknown(unknown)}"
    return said


def sentence(comparison: Comparison, results: Results) -> str:
    """Return the result of one variant at one place."""
    name, base = results.label(comparison.variant), results.label(comparison.baseline)
    found, bounds = comparison.found, comparison.interval
    if not comparison.has_interval:
        return (
            f"{name} and {base} differ by {number(found.difference, True)}, with one seed and one problem: "
            "nothing can be said of chance."
        )
    span = f"95% interval {number(bounds.low, True)} to {number(bounds.high, True)}"
    span = span if found.varies else "on every problem and seed"
    after = " after Holm" if len(results.compared) > 1 else ""
    numbers = f"{number(found.difference, True)}, {span}, p {_equals(comparison.adjusted_p)}{after}"
    if comparison.differs:
        return f"{name} is {_side(comparison)} {base}: {numbers}."
    if not found.varies and number(found.difference) == "0.000":
        return f"{name} and {base} have the same figure on every problem and seed."
    alone = ""
    if after and bounds.p < LEVEL:
        alone = f"; alone it would be (p {_equals(bounds.p)}), among {len(results.compared)} variants it is not"
    return f"{name} cannot be told apart from {base}: {numbers}{alone}; {_would_be_detected(comparison)}."


def _side(comparison: Comparison) -> str:
    """Return the words for a variant that differs from its baseline; one seed does not cover other runs."""
    up = comparison.found.difference > 0
    if comparison.num_seeds == 1:
        return "on this one seed ahead of" if up else "on this one seed behind"
    return "better than" if up else "worse than"


def _would_be_detected(comparison: Comparison) -> str:
    if not comparison.knows_detectable:
        return f"what would be detected is {_unknown([comparison])}"
    if comparison.detectable > 1:
        return f"no difference would be detected at this size, since {_RATES}"
    return f"a difference of {number(comparison.detectable)} would be detected four times out of five"


def _equals(value: float) -> str:
    text = p_value(value)
    return text if text[0] == "<" else f"= {text}"


def conclusion(comparisons: Sequence[Comparison], results: Results) -> list[str]:
    """Return a sentence for each metric and baseline, at the largest budget and over all benchmarks.

    Args:
        comparisons: all comparisons of one place, place after place.
        results: of the study.
    """
    families: dict[Place, list[Comparison]] = {}
    for each in comparisons:
        families.setdefault(each.place, []).append(each)
    return [
        _conclude(place, baseline, family, results)
        for place, family in families.items()
        for baseline in dict.fromkeys(each.baseline for each in family)
    ]


def _conclude(place: Place, baseline: str, corrected: Sequence[Comparison], results: Results) -> str:
    """Return the result of the variants with this baseline; the correction counts all variants at the place."""
    base, where = results.label(baseline), place_name(place)
    corrected = [each for each in corrected if each.has_interval]
    judged = [each for each in corrected if each.baseline == baseline]
    if not judged:
        return f"{where}: with one seed and one problem nothing can be told apart from {base}."
    if not any(each.differs for each in judged):
        smallest = _smallest(judged, corrected, results)
        return (
            f"{where}: nothing can be told apart from {base} at this size. "
            f"{smallest[0].upper()}{smallest[1:]}.{_mend(judged)}"
        )
    sides: dict[str, list[str]] = {}
    for each in sorted((each for each in judged if each.differs), key=lambda each: each.found.difference < 0):
        named = f"{results.label(each.variant)} ({number(each.found.difference, True)})"
        sides.setdefault(_side(each), []).append(named)
    said = [f"{side} {base}: {', '.join(names)}" for side, names in sides.items()]
    rest = [each for each in judged if not each.differs]
    if rest:
        names = [results.label(each.variant) for each in rest]
        said.append(f"cannot be told apart from {base}: {', '.join(names)} ({_smallest(rest, corrected, results)})")
    return f"{where}: {'; '.join(said)}."


def _mend(judged: Sequence[Comparison]) -> str:
    """Return the size that a study needs."""
    repeated = [each for each in judged if each.knows_detectable]
    if not repeated or max(each.detectable for each in repeated) <= TARGET:
        return ""
    needed = [each.seeds_needed for each in repeated]
    known = [each for each in needed if each is not None]
    if len(known) < len(needed):
        return f" For {TARGET} it would take more problems, not only more seeds."
    return f" For {TARGET} it would take about {max(known)} seeds."


def caveats(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """Return the limits of the comparisons: few seeds, few problems, missing runs."""
    said = []
    if any(each.num_seeds == 1 for each in comparisons):
        said.append(
            "Where only one seed is paired, intervals cover the choice of problems only and not that of seeds: another "
            "training run might come out differently, and nothing here says by how much."
        )
    if any(1 < each.num_seeds < 4 for each in comparisons):
        said.append("With two or three seeds, how much runs vary is hardly known, and the intervals are wide for it.")
    if any(4 <= each.num_seeds < 8 for each in comparisons):
        said.append(
            "With four to seven seeds p is a little too small: of simulated studies of four seeds in which all "
            "variants were equal, up to 7% called one different."
        )
    for name, benchmark in results.benchmarks.items():
        if len(benchmark.problems) == 1:
            said.append(f"{name} has one problem: intervals cover the choice of seeds only.")
    if results.lacking:
        said.append(
            f"{len(results.lacking)} of {len(results.runs)} runs have not finished. A seed counts in a comparison only "
            "where both sides have it."
        )
    left_out = [
        results.label(v.name)
        for v in results.study.variants
        if v.name not in (*results.compared, results.study.baseline)
    ]
    if left_out:
        said.append(f"Not compared, since no finished run shares a seed with its baseline: {', '.join(left_out)}.")
    return said
