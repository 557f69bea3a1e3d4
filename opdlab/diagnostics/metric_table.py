"""The table of logged scalars: name, label, unit, meaning, source, and charts.

The progress line, TensorBoard's page "Custom scalars", the labels of rollout pages and the tables of
``docs/metrics.md`` are made from its rows. :mod:`opdlab.diagnostics.built_in_metrics` registers opdlab's own; a plug-in
adds rows with :func:`register_metric`. A scalar that is logged without a row fails the tests.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from opdlab.errors import require

# Placeholders of a name and their regular expressions; all others match anything without a slash.
_PLACEHOLDERS = {
    "<benchmark>": "(?!mean/)[^/]+",  # "mean" is the mean over the benchmarks
    "<k>": r"\d+",
    "<n>": r"\d+",
    "<age>": r"\d+",
    "<epoch>": r"\d+",
    "<bin>": r"\d+",
}
# The order of TensorBoard's pages; pages of plug-ins follow.
_PAGES = ("drift", "gate", "gated against ungated step", "age", "loss", "position", "rollout", "validation")


@dataclass(frozen=True)
class Chart:
    """A chart on TensorBoard's page "Custom scalars".

    Args:
        page: group of charts.
        title: rows with the same page and title share a chart; by default the title of the row.
        band: draw the chart's rows as a line within a band; they are its value, lower and upper bound, in this order.
    """

    page: str
    title: str = ""
    band: bool = False


@dataclass(frozen=True)
class Metric:
    """A row of the table: one logged scalar, or a family of them.

    Args:
        name: name in the log. ``<word>`` stands for the variable part of a family: ``age/drift/<age>``.
        label: short name, without the unit.
        unit: ``nats``, ``tokens``, ``share``, …; empty for a number without a unit.
        meaning: one line.
        source: dotted path of the function or class that computes it.
        healthy: expected value in a healthy run; may be empty.
        chart: chart in TensorBoard besides the page of all scalars, or None.
        progress: format of its item in the progress line; rows with the same format share the item and fill it in
            the order of the table. Empty: not in the line.

    Raises:
        UsageError: ``chart`` is not a :class:`Chart`, or ``progress`` is not a format of a number.

    Example:
        >>> row = Metric("age/drift/<age>", "drift by age", "nats", "mean abs(d)", "my_gate.MyGate")
        >>> row.title, row.matches("age/drift/003"), row.matches("age/drift/003/x")
        ('drift by age, nats', True, False)
    """

    name: str
    label: str
    unit: str
    meaning: str
    source: str
    healthy: str = ""
    chart: Chart | None = None
    progress: str = ""

    def __post_init__(self) -> None:
        row = f"metric '{self.name}'"
        kind = type(self.chart).__name__
        require(self.chart is None or isinstance(self.chart, Chart), f"{row}: chart is a {kind}, but must be a Chart")
        number = "1k" if self.unit == "tokens/s" else 0.5
        try:
            fits = not self.progress or self.progress.format(*[number] * 10) != self.progress  # rows may share an item
        except (ValueError, LookupError, AttributeError, TypeError):
            fits = False
        example = "loss {:.3f}"
        require(fits, f"{row}: progress is '{self.progress}', but must be a format of a number, such as '{example}'")

    @property
    def title(self) -> str:
        """Return the label with the unit."""
        return self.label if self.unit in ("", "share") else f"{self.label}, {self.unit}"

    @cached_property
    def pattern(self) -> str:
        """Return the regular expression of the names in the log, to be matched from their start."""
        parts = re.split(r"(<[^<>]+>)", self.name)
        return "".join(_PLACEHOLDERS.get(p, "[^/]+") if p.startswith("<") else re.escape(p) for p in parts) + "$"

    def matches(self, name: str) -> bool:
        """True if ``name`` is this scalar, or one of this family."""
        return re.match(self.pattern, name) is not None


_TABLE: dict[str, Metric] = {}


def register_metric(metric: Metric) -> None:
    """Add a row to the table.

    Call it at the top level of the module that defines the gate, objective, callback or benchmark: opdlab imports the
    module when a configuration names its class, so the row is there before anything is logged.

    Args:
        metric: the row. A row of the same name and source is replaced, as when a notebook cell runs again.

    Raises:
        UsageError: a row of this name has another source.
    """
    known = _TABLE.setdefault(metric.name, metric)
    require(
        known.source == metric.source,
        f"metric '{metric.name}' of {metric.source} has a row already, of {known.source}: log it under another name",
    )
    _TABLE[metric.name] = metric


def metric_rows() -> list[Metric]:
    """Return all rows, those of opdlab first."""
    return list(_TABLE.values())


def find_metric(name: str) -> Metric | None:
    """Return the row of a logged name, the first one if several families match, or None.

    Example:
        >>> find_metric("val/toy/pass@8").label, find_metric("train/typo")
        ('pass@k', None)
    """
    return _TABLE.get(name) or next((metric for metric in _TABLE.values() if metric.matches(name)), None)


def metric_title(name: str) -> str:
    """Return label and unit of a logged name; the name itself if it has no row.

    Example:
        >>> metric_title("rollout/age")
        'age, steps'
    """
    row = find_metric(name)
    return name if row is None else row.title


def chart_layout() -> dict[str, dict[str, list[Metric]]]:
    """Return the rows of each chart, by page and title, in TensorBoard's order."""
    pages: dict[str, dict[str, list[Metric]]] = {page: {} for page in _PAGES}
    for row in _TABLE.values():
        if row.chart is not None:
            pages.setdefault(row.chart.page, {}).setdefault(row.chart.title or row.title, []).append(row)
    return pages


def progress_names() -> list[str]:
    """Return the names of the scalars in the progress line."""
    return [row.name for row in _TABLE.values() if row.progress]


def progress_items(values: Mapping[str, float]) -> list[str]:
    """Return the items of the progress line, in the order of the table; items without a value are left out.

    Args:
        values: by their name in the log. Rates are shortened: 1234 tokens/s is 1.2k.

    Example:
        >>> progress_items({"train/loss": 0.01234, "gate/min": 0.71, "rollout/age": 3.0})
        ['loss 0.0123', 'age 3']
    """
    items: dict[str, list[float | str | None]] = {}
    for row in _TABLE.values():
        if row.progress:
            value: float | str | None = values.get(row.name)
            if value is not None and row.unit == "tokens/s":
                size, suffix = next(((s, x) for s, x in ((1e6, "M"), (1e3, "k")) if values[row.name] >= s), (1, ""))
                value = f"{values[row.name] / size:.1f}{suffix}"
            items.setdefault(row.progress, []).append(value)
    return [form.format(*shown) for form, shown in items.items() if None not in shown]
