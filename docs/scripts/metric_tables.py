"""Writes the tables of ``docs/metrics.md`` from the table of metrics: ``python docs/scripts/metric_tables.py``.

A table stands between ``<!-- metrics: PATTERN … -->`` and ``<!-- end of metrics -->``; the patterns, as of file names,
choose its rows.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from opdlab.diagnostics import Metric, metric_rows

PAGE = Path(__file__).parents[1] / "metrics.md"
TABLE = re.compile(r"(<!-- metrics: ([^\n]*?) -->\n).*?(<!-- end of metrics -->)", re.DOTALL)
HEAD = ("scalar", "meaning", "unit", "healthy", "chart", "computed by")


def page(text: str) -> str:
    """Return the page with its tables made anew.

    Args:
        text: of the page.

    Raises:
        ValueError: a row of opdlab is in none of the tables, or in several.
    """
    shown = [row.name for _, patterns, _ in TABLE.findall(text) for row in _chosen(patterns)]
    wrong = [row.name for row in _rows() if shown.count(row.name) != 1]
    if wrong:
        raise ValueError(f"not in exactly one table of {PAGE.name}: {', '.join(wrong)}")
    return TABLE.sub(lambda found: f"{found[1]}\n{_table(_chosen(found[2]))}\n\n{found[3]}", text)


def _rows() -> list[Metric]:
    return [row for row in metric_rows() if row.source.startswith(("opdlab.", "lightning."))]


def _chosen(patterns: str) -> list[Metric]:
    return [row for row in _rows() if any(fnmatchcase(row.name, pattern) for pattern in patterns.split())]


def _table(rows: list[Metric]) -> str:
    cells = [HEAD, tuple("---" for _ in HEAD), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cells(row: Metric) -> tuple[str, ...]:
    unit, page = row.unit or "\N{EN DASH}", row.chart.page if row.chart else ""
    return f"`{row.name}`", row.meaning, unit, row.healthy, page, f"`{row.source.removeprefix('opdlab.')}`"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
