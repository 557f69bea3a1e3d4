"""Facts and tables of a study."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from opdlab.report.study.compare import TARGET, Comparison, places, run_means
from opdlab.report.study.load import Results
from opdlab.report.study.sentences import detectable, number, p_text
from opdlab.report.table import Table
from opdlab.studies.schema import FINISHED


def comparison_table(comparisons: Sequence[Comparison], results: Results, *, with_places: bool) -> Table:
    """Return the displayed table of comparisons, a row each; ``with_places`` names their places in columns."""
    first = ("metric", "benchmark", "step") if with_places else ()
    compared = ("variant", "compared with", "baseline's", "variant's", "difference", "95% interval")
    judged = ("P(better)", "p", "p (Holm)", "seeds", "ahead in", "detectable", f"seeds for {TARGET}")
    rows = [
        [
            *(map(str, astuple(each.place)) if with_places else ()),
            *(each.label, results.study.label(each.baseline)),
            *(number(each.baseline_mean), number(each.variant_mean), number(each.difference, True)),
            f"{number(each.low, True)} to {number(each.high, True)}" if each.has_interval else "-",
            *(number(each.probability_of_improvement), p_text(each.p), p_text(each.p_holm)),
            *(str(each.seeds), str(each.seeds_ahead)),
            detectable(each.detectable_difference, of_rates=each.place.is_rate),
            str(each.seeds_for_target or "-"),
        ]
        for each in comparisons
    ]
    return Table((*first, *compared, *judged), rows, num_names=2 + len(first))


def paper_table(comparisons: Sequence[Comparison], results: Results) -> Table:
    """Return the table of a paper: seven columns, a row for each baseline and variant at each place.

    Args:
        comparisons: at one step, place after place.
        results: of the study.
    """
    rows = []
    for place, group in groupby(comparisons, key=lambda each: each.place):
        family = list(group)
        where = (place.metric_name, place.benchmark)
        for baseline in dict.fromkeys(each.baseline for each in family):
            mean = float(run_means(results, baseline, place).mean())
            label = results.study.label(baseline)
            rows.append((*where, label, number(mean), "-", "-", "-"))
            against = "" if len(results.baselines) == 1 else f" (to {label})"
            for each in family:
                if each.baseline == baseline:
                    interval = f"[{number(each.low, True)}, {number(each.high, True)}]" if each.has_interval else "-"
                    scores = number(each.variant_mean), number(each.difference, True), interval, p_text(each.p_holm)
                    # Of an unfinished study a row may have fewer seeds than its baseline's, and another mean.
                    some = each.seeds < len(results.finished(baseline))
                    rows.append((*where, each.label + against + f" ({each.seeds} seeds)" * some, *scores))
    header = ("metric", "benchmark", "variant", "score", "difference", "95% interval", "p (Holm)")
    return Table(header, rows, num_names=3)


def metric_records(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return mean and spread over runs of every variant at every place, and the metric of every run, for CSV."""
    means, runs = [], []
    for place, variant in product(places(results), results.study.variants):
        if seeds := results.finished(variant.name):
            known = asdict(place) | {"variant": variant.name, "label": results.study.label(variant.name)}
            values = run_means(results, variant.name, place)
            spread = float(values.std(ddof=1)) if len(values) > 1 else np.nan
            means.append(known | {"mean": float(values.mean()), "std_over_seeds": spread, "seeds": len(values)})
            for seed, value in zip(seeds, values, strict=True):
                key = (variant.name, seed)
                collapsed = "" if key in results.may_have_collapsed else key in results.collapsed
                runs.append(known | {"seed": seed, "value": float(value), "collapsed": collapsed})
    return means, runs


def metric_table(records: Sequence[dict[str, Any]]) -> Table:
    """Return the displayed table of the first of :func:`metric_records`."""
    rows = [
        [
            *(str(row[key]) for key in ("metric", "benchmark", "step", "label")),
            *(number(row["mean"]), number(row["std_over_seeds"]), str(row["seeds"])),
        ]
        for row in records
    ]
    return Table(("metric", "benchmark", "step", "variant", "mean", "std over seeds", "seeds"), rows, num_names=4)


def variants_table(results: Results) -> Table:
    """Return the table of variants: labels, names, baselines, and overrides."""
    rows = []
    for each in results.study.variants:
        base = results.study.baseline_of(each.name)
        other = results.study.label(base) if base != each.name else "-"
        rows.append((results.study.label(each.name), each.name, other, " ".join(each.overrides) or "-"))
    return Table(("variant", "folder", "compared with", "overrides"), rows, num_names=4)


def missing_table(results: Results) -> Table:
    """Return the table of runs that do not count, with reasons."""
    rows = [(results.study.label(run.variant), str(run.seed), run.state) for run in results.lacking]
    return Table(("variant", "seed", "state"), rows, num_names=3)


def facts(results: Results) -> dict[str, str]:
    """Return size, time, machine and versions of a study, by name."""
    runs = [run for run in results.runs.values() if run.state == FINISHED]
    sizes = [f"{name}: {len(b.problems)} problems x {b.num_samples}" for name, b in results.benchmarks.items()]
    # Reports that share runs share their samples. A copied run names STUDY/runs/VARIANT/seed-N.
    studies = Counter(Path(run.taken_from).parents[2].name for run in runs if run.taken_from)
    taken_over = "".join(f", {count} of them taken over from {study}" for study, count in studies.items())
    found = {
        "base": ", ".join(results.study.base),
        "baseline": ", ".join(map(results.study.label, results.baselines)),
        "seeds": _numbers(results.study.seeds),
        "budgets, optimizer steps": _numbers(results.steps),
        "evaluated on": ", ".join(sizes),
        "runs": f"{len(runs)} of {len(results.runs)} finished{taken_over}",
        "time": f"{sum(run.seconds for run in runs) / 3600:.2f} hours in all runs together",
        "machine": _distinct(run.machine for run in runs),
        "versions": _distinct(run.versions for run in runs),
    }
    # The command of the baseline's first run; the others differ by overrides, seed and folder.
    first = results.runs[results.study.baseline, results.finished(results.study.baseline)[0]]
    return found | ({"command of a run": shlex.join(first.command)} if first.command else {})


def _numbers(values: Sequence[int]) -> str:
    """Return numbers as text, with ranges for three or more consecutive ones.

    Example:
        >>> _numbers([0, 1, 2, 3, 7, 9])
        '0-3, 7, 9'
    """
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][-1] + 1:
            ranges[-1].append(value)
        else:
            ranges.append([value])
    parts = [[f"{each[0]}-{each[-1]}"] if len(each) > 2 else map(str, each) for each in ranges]
    return ", ".join(text for part in parts for text in part)


def _distinct(values: Iterable[Mapping[str, Any]]) -> str:
    texts = (", ".join(f"{key} {part}" for key, part in value.items()) for value in values)
    return "; ".join(dict.fromkeys(filter(None, texts))) or "-"
