"""The report of a study as files: two pages, tables, plots."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from opdlab.errors import UsageError
from opdlab.studies.report.compare import PASS_AT, TARGET, Comparison, compare, metric_names
from opdlab.studies.report.figures import drawing, every_run, forest, learning_curves, save
from opdlab.studies.report.load import Results, load_results
from opdlab.studies.report.sentences import caveats, conclusion, place_name, sentence
from opdlab.studies.report.statistics import MIN_SEEDS
from opdlab.studies.report.tables import (
    Table,
    comparison_table,
    csv_text,
    facts,
    markdown_text,
    metric_records,
    metric_table,
    missing_table,
    variants_table,
)
from opdlab.studies.schema import REPORT
from opdlab.viewer.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = ("png", "svg", "md", "csv", "tex")


@dataclass(frozen=True)
class Picture:
    """A plot in the report.

    Args:
        name: of its files, without extension.
        alt: text alternative.
        png: content of the PNG file.
        svg: content of the SVG file.
    """

    name: str
    alt: str
    png: bytes
    svg: bytes

    @property
    def source(self) -> str:
        """Return the plot as a data URL, so that the page needs no other file."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


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


@dataclass(frozen=True)
class Report:
    """The report of a study, ready to be written.

    Args:
        folder: output folder.
        files: content, by name inside the folder.
        conclusion: lines of its first section; control characters are written as code points.
    """

    folder: Path
    files: Mapping[str, bytes]
    conclusion: Sequence[str]

    def write(self) -> Path:
        """Write all files, and delete files of an earlier report that are no longer part of it.

        Returns:
            Path of ``report.md``.

        Raises:
            UsageError: the folder cannot be written.
        """
        try:
            for name, content in self.files.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.name}.part")
                part.write_bytes(content)
                part.replace(path)
            for path in (path for part in ("tables", "figures") for path in (self.folder / part).iterdir()):
                if path.suffix[1:] in _KINDS and path.relative_to(self.folder).as_posix() not in self.files:
                    path.unlink()
        except OSError as error:
            fault = f"{self.folder} cannot be written ({error.strerror or error}): mend that, and report again"
            raise UsageError(fault) from error
        return self.folder / "report.md"


def make_report(folder: Path) -> Report:
    """Return the report that compares a study's variants.

    The report has ``report.md`` and ``report.html``, which needs no other file; ``tables/`` as Markdown, CSV and LaTeX;
    ``figures/`` as PNG and SVG. Equal samples give equal files, byte for byte.

    Args:
        folder: of the study; the report goes to ``report`` inside it.

    Raises:
        UsageError: there is nothing to compare, or the runs cannot be compared.
    """
    results = load_results(folder)
    comparisons = compare(results)
    last = [each for each in comparisons if each.place.step == results.steps[-1]]
    sections = _sections(results, last)
    content = _table_files(results, comparisons)
    for picture in (each for section in sections for each in section.pictures):
        content[f"figures/{picture.name}.png"], content[f"figures/{picture.name}.svg"] = picture.png, picture.svg
    labels = " or ".join(map(results.study.label, results.baselines))
    number = len(results.study.variants) - 1
    counts = sorted({benchmark.num_samples for benchmark in results.benchmarks.values()})
    method = _template("method.txt").render(
        averages=[f"avg@{count}" for count in counts],
        left_out=[f"pass@{k}" for k in PASS_AT if f"pass@{k}" not in metric_names(results)],
        fewest=counts[0],
        several=len(results.benchmarks) > 1,
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
        "sources": _template("sources.txt").render().splitlines(),
    }
    for name in ("report.md", "report.html"):
        # A name from a YAML file may hold a lone surrogate, which has no UTF-8 encoding; visible() has replaced it.
        content[name] = _template(name).render(known).encode("utf-8", "replace")
    heading = f"at optimizer step {known['final']}:"
    lines = [heading, *(f"- {text}" for text in known["conclusion"]), *known["caveats"]]
    return Report(folder / REPORT, content, [" ".join(visible(line).split()) for line in lines])


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
            pictures = [_picture(figure, names[kind], alt) for kind, (figure, alt) in drawn.items()]
            also = f" (the same as {', '.join(averages)})" if place.metric == "pass@1" else ""
            table = comparison_table(family, results, with_places=False)
            found.append(Section(f"{name}{also}", table, [sentence(each, results) for each in family], pictures))
    return found


def _picture(figure: "Figure", name: str, alt: str) -> Picture:
    png = save(figure, "png")
    figure.set_layout_engine("none")  # The layout is already computed, and it is most of the work.
    return Picture(name, alt, png, save(figure, "svg"))


def _table_files(results: Results, comparisons: Sequence[Comparison]) -> dict[str, bytes]:
    means, runs = metric_records(results)
    records = {"comparisons": [each.record() for each in comparisons], "metrics": means, "runs": runs}
    texts = {f"tables/{name}.csv": csv_text(rows) for name, rows in records.items()}
    compared = comparison_table(comparisons, results, with_places=True)
    for name, table in {"comparisons": compared, "metrics": metric_table(means)}.items():
        texts |= {f"tables/{name}.md": table.markdown(), f"tables/{name}.tex": table.latex()}
    return {name: text.encode("utf-8", "replace") for name, text in texts.items()}


# -- templates ------------------------------------------------------------------------------------------------------


def _template(name: str) -> Template:
    """Return a template that escapes for its format everything except text that is marked as such.

    HTML pages forbid requests, scripts and foreign styles.
    """
    kind = name.rpartition(".")[2]
    escapes: dict[str, Callable[[str], str]] = {"md": markdown_text, "html": visible, "txt": str}
    environment = Environment(
        loader=PackageLoader("opdlab.studies.report"),
        autoescape=kind == "html",
        finalize=lambda value: value if isinstance(value, Markup) else escapes[kind](str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = lambda table: Markup(table.markdown())
    css = files("opdlab.studies.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return environment.get_template(name, globals={"css": Markup(css), "policy": Markup(policy)})
