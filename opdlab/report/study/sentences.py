"""Results of a study as sentences. Text is not escaped here; each output format escapes it."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from opdlab.evaluation.benchmark_metrics import MEAN
from opdlab.report.study.compare import TARGET, Comparison, Place
from opdlab.report.study.load import Results
from opdlab.report.study.statistics import LEVEL, MIN_SEEDS
from opdlab.studies.schema import FINISHED

_RATES = "rates differ by 1 at most"
_FEW = f"no verdict with fewer than {MIN_SEEDS} seeds"
_CONSTANT = "unknown, since runs and problems do not vary here"


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


def detectable(value: float, *, of_rates: bool = True) -> str:
    """Return a detectable difference as text: of rates "> 1" above 1, which none of theirs reaches.

    Example:
        >>> detectable(0.25), detectable(1.092), detectable(1.092, of_rates=False), detectable(float("nan"))
        ('0.250', '> 1', '1.092', '-')
    """
    return "> 1" if of_rates and value > 1 else number(value)


def p_text(value: float) -> str:
    """Return a p value with three decimals, or four where rounding would give 0.05.

    Example:
        >>> p_text(0.0002), p_text(0.0499), p_text(0.3)
        ('< 0.001', '0.0499', '0.300')
    """
    if value != value:
        return "-"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.4f}" if 0.0495 <= value < 0.0505 else f"{value:.3f}"


def place_name(place: Place) -> str:
    """Return metric and benchmark: ``pass@1 on toy``, ``reverse KL on toy``."""
    where = "the mean over benchmarks" if place.benchmark == MEAN else place.benchmark
    return f"{place.metric_name} on {where}"


def sentence(comparison: Comparison, results: Results) -> str:
    """Return the result of one variant at one place."""
    name, base, difference = comparison.label, results.study.label(comparison.baseline), comparison.difference
    span = "on all problems and seeds"
    if comparison.has_interval:
        span = f"95% interval {number(comparison.low, True)} to {number(comparison.high, True)}"
    if not comparison.has_verdict:
        count = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
        said = f"{number(difference, True)}, {span}, {count}{_collapsed(comparison, '; ')}"
        return f"{name} against {base}: {said}; {_no_verdict(comparison)}."
    several = results.num_comparisons > 1
    after = " after Holm" if several else ""
    numbers = f"{number(difference, True)}, {span}, p {_equals(comparison.p_holm)}{after}{_collapsed(comparison, '; ')}"
    if comparison.differs:
        return f"{name} is {'better' if comparison.ahead else 'worse'} than {base}: {numbers}."
    if not comparison.has_interval and number(difference) == "0.000":
        return f"{name} and {base} have the same {comparison.place.metric_name} on every problem and seed."
    alone = ""
    if several and comparison.p < LEVEL:
        alone = f"; alone it would be (p {_equals(comparison.p)}), among {results.num_comparisons} variants it is not"
    if not comparison.has_interval:
        power = f"what would be detected is {_CONSTANT}"
    elif comparison.place.is_rate and comparison.detectable_difference > 1:
        power = f"no difference would be detected at this size, since {_RATES}"
    else:
        power = f"a difference of {number(comparison.detectable_difference)} would be detected four times out of five"
    return f"{name} cannot be told apart from {base}: {numbers}{alone}; {power}."


def _equals(value: float) -> str:
    text = p_text(value)
    return text if text[0] == "<" else f"= {text}"


def conclusion(comparisons: Sequence[Comparison], results: Results) -> list[str]:
    """Return a sentence for each metric and baseline, at the last step and over all benchmarks.

    Args:
        comparisons: all comparisons of one place, place after place.
        results: of the study.
    """
    said = []
    for place, group in groupby(comparisons, key=lambda each: each.place):
        family = list(group)
        for baseline in dict.fromkeys(each.baseline for each in family):
            judged = [each for each in family if each.baseline == baseline]
            said.append(f"{place_name(place)}: {_conclude(judged, results.study.label(baseline), results)}")
    return said


def _no_verdict(comparison: Comparison) -> str:
    """Return why there is no verdict, without a full stop."""
    failed = comparison.failed
    return f"no verdict, since runs of {failed} seed{'s' if failed > 1 else ''} failed" if failed else _FEW


def _conclude(family: Sequence[Comparison], base: str, results: Results) -> str:
    """Return the result of the variants with one baseline; the correction counts all variants of the study."""
    parts, corrected = [], results.num_comparisons
    for word, up in (("better", True), ("worse", False)):
        found = [each for each in family if each.differs and each.ahead == up]
        if found:
            parts.append(f"{word} than {base}: {_names(found, True)}")
    unjudged = [each for each in family if not each.has_verdict]
    for reason in dict.fromkeys(map(_no_verdict, unjudged)):
        names = _names([each for each in unjudged if _no_verdict(each) == reason], True)
        parts.append(f"{reason}; differences from {base}: {names}")
    if rest := [each for each in family if each.has_verdict and not each.differs]:
        smallest = _smallest(rest, corrected)
        if not parts:
            said = f"nothing can be told apart from {base} at this size. {smallest[0].upper()}{smallest[1:]}."
            known = [each for each in rest if each.has_interval]
            if known and max(each.detectable_difference for each in known) > TARGET:
                seeds = [each.seeds_for_target for each in known]
                wanted = max((each for each in seeds if each is not None), default=0)
                lacking = "more problems, not only more seeds" if None in seeds else f"about {wanted} seeds"
                said += f" For {TARGET} it would take {lacking}."
            return said
        parts.append(f"cannot be told apart from {base}: {_names(rest)} ({smallest})")
    return f"{'; '.join(parts)}."


def _names(comparisons: Sequence[Comparison], differences: bool = False) -> str:
    names = []
    for each in comparisons:
        said = number(each.difference, True) + _collapsed(each, "; ") if differences else _collapsed(each)
        names.append(f"{each.label} ({said})" if said else each.label)
    return ", ".join(names)


def _collapsed(comparison: Comparison, before: str = "") -> str:
    return f"{before}{comparison.collapsed} of {comparison.seeds} runs collapsed" if comparison.collapsed else ""


def _smallest(judged: Sequence[Comparison], corrected: int) -> str:
    """Return a clause on the smallest difference that a study detects, without a full stop.

    Args:
        judged: the variants that the clause is about.
        corrected: number of variants that the correction counts.
    """
    known = [each.detectable_difference for each in judged if each.has_interval]
    unknown = [each for each in judged if not each.has_interval]
    if not known:
        return f"what this study would detect is {_CONSTANT}"
    rates = judged[0].place.is_rate
    ends = (detectable(value, of_rates=rates) for value in (min(known), max(known)))
    low, high = (end.replace(">", "more than") for end in ends)
    span = low if low == high else f"{low} to {high}, depending on the variant"
    after = f", after correction for {corrected} variants" if corrected > 1 else ""
    said = (
        "the smallest difference that this study would detect with a probability of 80%, at 5% two-sided"
        f"{after}, is {span}"
    )
    if rates and min(known) > 1:
        said += f", so that it can find no difference here at all: {_RATES}"
    return said + (f"; for {_names(unknown)} it is {_CONSTANT}" if unknown else "")


def caveats(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """Return the limits of the comparisons: few seeds, few problems, runs that are missing or unlike others."""
    said = []
    if any(each.seeds == 1 for each in comparisons):
        said.append(
            "Where only one seed is paired, intervals cover the choice of problems only and not that of seeds: another "
            "training run might come out differently, and nothing here says by how much."
        )
    if any(each.seeds < MIN_SEEDS for each in comparisons):
        said.append(
            f"With fewer than {MIN_SEEDS} seeds hardly anything is known about how much runs vary, so the report has "
            "estimates and no verdict."
        )
    for name, benchmark in results.benchmarks.items():
        if len(benchmark.problems) == 1:
            said.append(f"{name} has one problem: intervals cover the choice of seeds only.")
    said += _of_runs(results)
    compared = (*results.compared, results.study.baseline)
    if left_out := [results.study.label(v.name) for v in results.study.variants if v.name not in compared]:
        said.append(f"Not compared, since no finished run shares a seed with its baseline: {', '.join(left_out)}.")
    return said


def _of_runs(results: Results) -> list[str]:
    """Return what must be known of the runs: which are missing, failed, collapsed, and what they have in common."""
    said, label = [], results.study.label
    if results.lacking:
        said.append(
            f"{len(results.lacking)} of {len(results.runs)} runs have not finished. A seed counts in a comparison only "
            "where both sides have it."
        )
    failed = {variant.name: len(results.failed(variant.name)) for variant in results.study.variants}
    if any(failed.values()):
        of_all = f"of {len(results.study.seeds)}"
        runs = ", ".join(f"{label(name)}: {count} {of_all}" for name, count in failed.items() if count)
        said.append(
            f"Runs that failed: {runs}. A comparison that lacks them has no verdict, since runs that diverge are among "
            "those that fail; `opdlab study run` tries them again, and shows the ends of their logs."
        )
    if results.collapsed:
        numbers = Counter(variant for variant, _ in results.collapsed)
        runs = ", ".join(f"{label(variant)}: {number}" for variant, number in sorted(numbers.items()))
        said.append(
            f"Runs in which training collapsed: {runs}. They count like all others; tables/runs.csv names them."
        )
    if unknown := len(results.may_have_collapsed):
        runs = "1 run, whose folder has" if unknown == 1 else f"{unknown} runs, whose folders have"
        said.append(f"Whether training collapsed is not known of {runs} no results.json.")
    if results.lacks_reverse_kl:
        said.append(
            "Reverse KL is left out, because only some evaluations have measured it: set model.evaluation.reverse_kl "
            "for the whole study."
        )
    versions = {json.dumps(run.versions, sort_keys=True) for run in results.runs.values() if run.state == FINISHED}
    if len(versions) > 1:
        said.append("Finished runs are of different versions of packages, which the facts name: run all with the same.")
    return said
