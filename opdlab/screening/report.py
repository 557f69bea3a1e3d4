"""A screening as a table, as JSON, and as a page."""

import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from opdlab.errors import printable
from opdlab.files import replacing
from opdlab.records import write_json
from opdlab.screening.charts import Chart, charts
from opdlab.screening.outcome import Screening
from opdlab.screening.pair import Missing
from opdlab.screening.thresholds import LIMITS, Limits
from opdlab.screening.verdicts import Check
from opdlab.viewer.page import page_templates

JSON, PAGE = "screen.json", "screen.html"
"""Files of a screening."""
_STYLES = {"bad": "bold red", "look": "yellow", "good": "green", "not measured": "dim"}


def console_table(screening: Screening) -> Table:
    """Return the checks as a table that 80 columns hold: verdict and number share one."""
    table = Table(title=screening.summary)
    for name in ("check", "verdict", "finding"):
        table.add_column(name, overflow="fold")
    for check in screening.checks:
        finding = Text(printable(check.finding))
        if check.mend:
            finding.append(f"\n→ {printable(check.mend)}", style="bold")
        verdict = Text(check.verdict, _STYLES[check.verdict])
        if check.number is not None:
            verdict.append(f"\n{number_text(check)} {check.unit}", style="default")
        table.add_row(Text(printable(check.title)), verdict, finding)
    return table


def number_text(check: Check) -> str:
    """Return a check's number in a few digits; nothing if it has none."""
    return "" if check.number is None else f"{check.number:.3g}"


def limits_text(limits: Limits) -> str:
    """Return limits in words.

    Example:
        >>> limits_text(LIMITS["overlap"]), limits_text(LIMITS["thinking"])
        ('look below 0.97, bad below 0.5', 'bad above 0')
    """
    side = "below" if limits.below else "above"
    pairs = (("look", limits.look), ("bad", limits.bad))
    return ", ".join(f"{verdict} {side} {limit:g}" for verdict, limit in pairs if limit is not None)


def as_json(screening: Screening, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all of a screening as plain values; numbers that are not finite become null.

    Args:
        screening: the result.
        facts: settings of the screening.
    """
    return {
        "settings": facts,
        "summary": screening.summary,
        "checks": [_plain(asdict(check)) for check in screening.checks],
        "measurements": {name: _plain(value) for name, value in vars(screening.measurements).items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Missing):
        return {"not_measured": value.reason}
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(each) for name, each in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_page(screening: Screening, facts: dict[str, str]) -> str:
    """Return the HTML page of a screening: one file that loads no other file; texts are escaped.

    Args:
        screening: the result.
        facts: settings of the screening, for the head of the page.
    """
    environment, assets = page_templates(("opdlab.screening", "opdlab.viewer"), ("page.css", "screen.css"), "screen.js")
    rows = [(check, number_text(check), _limits_of(check)) for check in screening.checks]
    drawn: list[Chart] = charts(screening.measurements)
    return environment.get_template("screen.html").render(
        **assets, facts=facts, rows=rows, charts=drawn, summary=screening.summary, found=screening.measurements
    )


def _limits_of(check: Check) -> str:
    limits = LIMITS[check.name.partition(":")[0]]
    return limits_text(limits) + ("" if check.unit in ("", limits.unit) else f" {limits.unit}")


def write_results(folder: Path, screening: Screening, facts: dict[str, Any]) -> None:
    """Write the page and the JSON file.

    Args:
        folder: made if it is missing.
        screening: the result.
        facts: settings of the screening.

    Raises:
        OSError: the folder cannot be written.
        FullDiskError: the disk is full.
    """
    write_json(folder / JSON, as_json(screening, facts))
    page = render_page(screening, {name: str(value) for name, value in facts.items()})
    with replacing(folder / PAGE) as file:
        file.write(page.encode("utf-8", "replace"))
