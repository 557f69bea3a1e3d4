"""Facts and tables of a report, in three formats: Markdown, CSV with all digits, LaTeX with booktabs."""

import csv
import io
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from opdlab.studies.report.compare import TARGET, Comparison, places, run_means
from opdlab.studies.report.load import Results
from opdlab.studies.report.sentences import detectable, number, p_text
from opdlab.studies.schema import FINISHED
from opdlab.viewer.text import visible

_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", **{char: f"\\{char}" for char in r"\`*_{}[]#|~$!"}})
_LATEX_NAMES = {"~": "asciitilde", "^": "asciicircum", "\\": "backslash", "<": "less", ">": "greater", "|": "bar"}
_LATEX_NAMES |= {'"': "quotedbl", "⟨": "langle", "⟩": "rangle"}
_LATEX = str.maketrans(
    {**{char: f"\\{char}" for char in "&%$#_{}"}, **{char: f"\\text{it}{{}}" for char, it in _LATEX_NAMES.items()}}
)


def markdown_text(text: str) -> str:
    r"""Return text escaped for Markdown, on one line.

    Example:
        >>> markdown_text("a|b <i>*c*")
        'a\\|b &lt;i&gt;\\*c\\*'
    """
    return " ".join(visible(text).split()).translate(_MARKDOWN)


def latex_text(text: str) -> str:
    r"""Return text escaped for LaTeX.

    Example:
        >>> latex_text("50% of a_b")
        '50\\% of a\\_b'
    """
    return " ".join(visible(text).split()).translate(_LATEX)


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        header: names of the columns.
        rows: displayed cells; names come first.
        num_names: columns of text; the others are numbers, right-aligned.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = [":--" if column < self.num_names else "--:" for column in range(len(self.header))]
        rows = [[markdown_text(cell) for cell in row] for row in (self.header, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])) + "\n"

    def latex(self) -> str:
        """Return the table as a LaTeX tabular; it needs the package booktabs."""
        columns = "l" * self.num_names + "r" * (len(self.header) - self.num_names)
        # LaTeX would read a bracket after \\ as its argument.
        head, *body = [r"{}" + " & ".join(map(latex_text, row)) + r" \\" for row in (self.header, *self.rows)]
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def csv_text(records: Sequence[dict[str, Any]]) -> str:
    """Return records as CSV: all digits, empty for unknown numbers."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: None if value != value else value for key, value in row.items()} for row in records)
    return file.getvalue()


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
            *(detectable(each.detectable_difference), str(each.seeds_for_target or "-")),
        ]
        for each in comparisons
    ]
    return Table((*first, *compared, *judged), rows, num_names=2 + len(first))


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
                collapsed = (variant.name, seed) in results.collapsed
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
