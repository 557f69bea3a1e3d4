"""The part of a report that is about a study."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from opdlab.report.drawing import Picture, drawing, picture
from opdlab.report.files import MARKDOWN, Part, encoded, picture_files, table_files, template
from opdlab.report.study.compare import TARGET, Comparison, compare, metric_names
from opdlab.report.study.figures import every_run, forest, learning_curves
from opdlab.report.study.load import Results, load_results
from opdlab.report.study.sentences import caveats, conclusion, place_name, sentence
from opdlab.report.study.statistics import MIN_SEEDS
from opdlab.report.study.tables import (
    comparison_table,
    facts,
    metric_records,
    metric_table,
    missing_table,
    paper_table,
    variants_table,
)
from opdlab.report.table import Table, csv_text
from opdlab.viewer.text import visible


@dataclass(frozen=True)
class Section:
    """All variants at one place.

    Args:
        title: of the section.
        table: a row for each variant.
        sentences: one for each variant.
        pictures: forest plot, every run, and learning curves if there are several budgets.
    """

    title: str
    table: Table
    sentences: Sequence[str]
    pictures: Sequence[Picture]


def study_part(folder: Path) -> Part:
    """Return what a report says of a study: a comparison of its variants.

    Args:
        folder: of the study.

    Raises:
        UsageError: there is nothing to compare, or the runs cannot be compared.
    """
    results = load_results(folder)
    comparisons = compare(results)
    last = [each for each in comparisons if each.place.step == results.steps[-1]]
    sections = _sections(results, last)
    content = _table_files(results, comparisons, last)
    content |= picture_files([each for section in sections for each in section.pictures])
    labels = " or ".join(map(results.study.label, results.baselines))
    number = len(results.study.variants) - 1
    counts = sorted({benchmark.num_samples for benchmark in results.benchmarks.values()})
    method = template("method.txt").render(
        averages=[f"avg@{count}" for count in counts],
        left_out=[f"pass@{k}" for k in results.pass_at if f"pass@{k}" not in metric_names(results)],
        fewest=counts[0],
        several=len(results.benchmarks) > 1,
        reverse_kl=bool(results.reverse_kl),
        least=MIN_SEEDS,
        target=TARGET,
    )
    known: dict[str, Any] = {
        "results": results,
        "final": results.steps[-1],
        "title": f"Study {results.study.name}: {number} variant{'s' if number > 1 else ''} against {labels}",
        "conclusion": conclusion([each for each in last if each.place.benchmark == last[0].place.benchmark], results),
        "caveats": caveats(results, comparisons),
        "sections": sections,
        "facts": facts(results),
        "variants": variants_table(results),
        "missing": missing_table(results) if results.lacking else None,
        "method": method.strip().split("\n\n"),
        "sources": template("sources.txt").render().splitlines(),
    }
    content[MARKDOWN] = encoded(template("report.md").render(known))
    heading = f"at optimizer step {known['final']}:"
    lines = [heading, *(f"- {text}" for text in known["conclusion"]), *known["caveats"]]
    shown = [" ".join(visible(line).split()) for line in lines]
    return Part(known["title"], template("study.html").render(known), content, shown)


def _sections(results: Results, comparisons: Sequence[Comparison]) -> list[Section]:
    averages = sorted({f"avg@{benchmark.num_samples}" for benchmark in results.benchmarks.values()})
    labels = list(map(results.study.label, results.baselines))
    found = []
    with drawing():
        for number, (place, group) in enumerate(groupby(comparisons, key=lambda each: each.place), 1):
            family, name = list(group), place_name(place)
            alt = f"Differences in {name} to {' and '.join(labels)}, with 95% intervals"
            drawn = {"forest": (forest(family, results), alt)}
            drawn["runs"] = (every_run(results, place), f"{name} of every run, by variant and seed")
            if len(results.steps) > 1:
                alt = f"{name} by optimizer step, each variant beside {' or '.join(labels)}"
                drawn["curves"] = (learning_curves(results, place.metric, place.benchmark), alt)
            # File names are valid on any file system; the number keeps them unique.
            benchmark = re.sub(r"[^A-Za-z0-9._-]", "-", place.benchmark)[:60]
            names = {kind: f"{number:02d}-{kind}-{place.metric.replace('@', '')}-{benchmark}" for kind in drawn}
            pictures = [picture(figure, names[kind], alt) for kind, (figure, alt) in drawn.items()]
            also = f" (the same as {', '.join(averages)})" if place.metric == "pass@1" else ""
            also = also if place.is_rate else " (nats per token; less is better)"
            table = comparison_table(family, results, with_places=False)
            found.append(Section(f"{name}{also}", table, [sentence(each, results) for each in family], pictures))
    return found


def _table_files(results: Results, comparisons: Sequence[Comparison], last: Sequence[Comparison]) -> dict[str, bytes]:
    means, runs = metric_records(results)
    records = {"comparisons": [each.record() for each in comparisons], "metrics": means, "runs": runs}
    texts = {f"tables/{name}.csv": csv_text(rows) for name, rows in records.items()}
    found = {name: encoded(text) for name, text in texts.items()}
    found["tables/comparisons.md"] = encoded(comparison_table(comparisons, results, with_places=True).markdown())
    found["tables/comparisons.tex"] = encoded(paper_table(last, results).latex())
    return found | table_files("metrics", metric_table(means))
