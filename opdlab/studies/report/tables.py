"""Tables of a report in three formats: Markdown, CSV with all digits, LaTeX with booktabs."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import numpy as np

from opdlab.studies.report.compare import Comparison, Place, benchmark_names, figure_names, run_figures
from opdlab.studies.report.load import Results
from opdlab.studies.report.sentences import detectable, number, p_value
from opdlab.studies.report.statistics import Array
from opdlab.viewer.text import visible

_MARKDOWN = {ord(char): f"\\{char}" for char in r"\`*_{}[]#|~$!"} | {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
}
_LATEX = {ord(char): f"\\{char}" for char in "&%$#_{}"} | {
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
    ord("\\"): r"\textbackslash{}",
    ord("<"): r"\textless{}",
    ord(">"): r"\textgreater{}",
    ord("|"): r"\textbar{}",
    ord('"'): r"\textquotedbl{}",
    ord("⟨"): r"\textlangle{}",
    ord("⟩"): r"\textrangle{}",
}


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


_COMPARED = ("variant", "compared with", "baseline's", "variant's", "difference", "95% interval")
_JUDGED = ("P(better)", "p", "p (Holm)", "seeds", "ahead in", "detectable", "seeds for 0.05")


def comparison_table(comparisons: Sequence[Comparison], results: Results) -> Table:
    """Return the table of the variants at one place, a row each."""
    return Table((*_COMPARED, *_JUDGED), [_cells(each, results) for each in comparisons], num_names=2)


def comparisons_table(comparisons: Sequence[Comparison], results: Results) -> Table:
    """Return the table of the variants at many places, which the first columns name."""
    rows = [[*map(str, astuple(each.place)), *_cells(each, results)] for each in comparisons]
    return Table(("figure", "benchmark", "step", *_COMPARED, *_JUDGED), rows, num_names=5)


def _cells(each: Comparison, results: Results) -> list[str]:
    bounds = each.interval
    span = f"{number(bounds.low, True)} to {number(bounds.high, True)}" if each.found.varies else "-"
    return [
        *(results.label(each.variant), results.label(each.baseline)),
        *(number(each.baseline_mean), number(each.variant_mean), number(each.found.difference, True), span),
        *(number(bounds.probability), p_value(bounds.p), p_value(each.adjusted_p)),
        *(str(each.num_seeds), str(each.seeds_ahead), detectable(each.detectable), str(each.seeds_needed or "-")),
    ]


def comparison_records(comparisons: Sequence[Comparison], results: Results) -> list[dict[str, Any]]:
    """Return all fields of each comparison, for CSV."""
    return [
        {
            "figure": each.place.figure,
            "benchmark": each.place.benchmark,
            "step": each.place.budget,
            "variant": each.variant,
            "label": results.label(each.variant),
            "baseline": each.baseline,
            "baseline_mean": each.baseline_mean,
            "variant_mean": each.variant_mean,
            "difference": each.found.difference,
            "low": each.interval.low,
            "high": each.interval.high,
            "probability_of_improvement": each.interval.probability,
            "p": each.interval.p,
            "p_holm": each.adjusted_p,
            "standard_error": each.found.standard_error,
            "degrees_of_freedom": each.found.degrees_of_freedom,
            "bootstrap_low": each.interval.plain_low,
            "bootstrap_high": each.interval.plain_high,
            "seeds": each.num_seeds,
            "seeds_ahead": each.seeds_ahead,
            "detectable_difference": each.detectable,
            "seeds_for_0.05": each.seeds_needed,
        }
        for each in comparisons
    ]


def figure_records(results: Results) -> list[dict[str, Any]]:
    """Return mean and spread over runs of every variant at every budget, for CSV."""
    records = []
    for known, runs in _figures(results):
        spread = float(runs.std(ddof=1)) if len(runs) > 1 else np.nan
        records.append(known | {"mean": float(runs.mean()), "std_over_seeds": spread, "seeds": len(runs)})
    return records


def run_records(results: Results) -> list[dict[str, Any]]:
    """Return the metrics of every run at every budget, for CSV."""
    return [
        known | {"seed": seed, "value": float(value)}
        for known, runs in _figures(results)
        for seed, value in zip(results.finished(known["variant"]), runs, strict=True)
    ]


def _figures(results: Results) -> Iterator[tuple[dict[str, Any], Array]]:
    """Yield each metric of each variant with finished runs: its place, and its value for each run, [S]."""
    for budget, figure, benchmark in product(results.budgets, figure_names(results), benchmark_names(results)):
        for variant in results.study.variants:
            if results.finished(variant.name):
                names = {"variant": variant.name, "label": results.label(variant.name)}
                known = {"figure": figure, "benchmark": benchmark, "step": budget, **names}
                yield known, run_figures(results, variant.name, Place(figure, benchmark, budget))


def figures_table(records: Sequence[dict[str, Any]]) -> Table:
    """Return the displayed table of :func:`figure_records`."""
    rows = [
        [
            *map(str, (row["figure"], row["benchmark"], row["step"], row["label"])),
            number(row["mean"]),
            number(row["std_over_seeds"]),
            str(row["seeds"]),
        ]
        for row in records
    ]
    return Table(("figure", "benchmark", "step", "variant", "mean", "std over seeds", "seeds"), rows, num_names=4)
