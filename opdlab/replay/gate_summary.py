"""Results of a replay for each gate over all recorded steps, as a table on the console, CSV and Markdown."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from opdlab.replay.steps import ReplayedStep, Row

PAPER = {"statistic": "signed_mean", "normalization": "mean"}
_KEYS = ("gate", "statistic", "normalization", "tau")


@dataclass(frozen=True)
class GateSummary:
    """Means of a gate over the recorded steps with stale rollouts.

    Args:
        key: gate, statistic, normalisation and tau; None if the gate has none.
        own: True for the gate that the run was trained with.
        num_steps: recorded steps.
        sample_size: mean effective sample size.
        norm_ratio: mean of |gradient| / |ungated gradient|.
        ungated_cosine: mean cosine with the ungated gradient.
        cosine: mean cosine with a fresh gradient.
        change: mean of ``cosine`` minus the ungated gradient's, paired by step.
        change_se: standard error of ``change`` over the steps; None with a single step.
    """

    key: tuple[str | None, ...]
    own: bool
    num_steps: int
    sample_size: float
    norm_ratio: float
    ungated_cosine: float
    cosine: float
    change: float
    change_se: float | None

    @property
    def label(self) -> str:
        """Return gate and options in one string."""
        *rest, tau = self.key
        return " ".join(part for part in (*rest, tau and f"tau {tau}") if part)

    @property
    def is_paper(self) -> bool:
        """True if statistic and normalisation are the paper's, or the gate has none."""
        _, statistic, normalization, _ = self.key
        return normalization in (None, PAPER["normalization"]) and statistic in (None, PAPER["statistic"])


def summarise(steps: Sequence[ReplayedStep], reference: str = "fresh") -> list[GateSummary]:
    """Return averages over the steps with stale rollouts; on fresh ones every gate on drift has weights of 1.

    Args:
        steps: of one replay.
        reference: ``fresh`` or ``other``.

    Returns:
        A summary for each gate whose gradient is never zero, in the order of the rows.
    """
    stale = [step for step in steps if step.age > 0]
    groups: dict[tuple[str | None, ...], list[Row]] = {}
    for step in stale:
        for row in step.rows:
            groups.setdefault(_key(row), []).append(row)
    return [
        _summary(key, rows, reference)
        for key, rows in groups.items()
        if len(rows) == len(stale) and all(row[f"{reference}_change"] is not None for row in rows)
    ]


def _key(row: Row) -> tuple[str | None, ...]:
    return tuple(f"{value:g}" if isinstance(value := row[name], float) else _text(value) for name in _KEYS)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _summary(key: tuple[str | None, ...], rows: Sequence[Row], reference: str) -> GateSummary:
    def average(name: str) -> float:
        return mean(_numbers(rows, name))

    changes = _numbers(rows, f"{reference}_change")
    return GateSummary(
        key=key,
        own=any(bool(row["own"]) for row in rows),
        num_steps=len(rows),
        sample_size=average("effective_sample_size"),
        norm_ratio=average("ungated_norm_ratio"),
        ungated_cosine=average("ungated_cosine"),
        cosine=average(f"{reference}_cosine"),
        change=mean(changes),
        change_se=stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
    )


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if isinstance(value := row[name], float)]


_COLUMNS = (
    *("gate", "statistic", "normalization", "tau", "effective sample size", "norm / ungated", "cosine with ungated"),
    *("cosine with fresh", "change"),
)
_SHORT = ("gate", "tau", "ESS", "norm", "ungated", "fresh", "change")
_CAPTION = (
    "Means over stale steps. ESS: effective sample size. norm: of the gradient, over that of the ungated one. ungated, "
    "fresh: cosine with the ungated gradient and with a fresh one. change: of the latter from no gate, paired by step, "
    "± standard error over the steps. All statistics and normalizations: replay.md."
)


def _cells(summary: GateSummary) -> list[str]:
    gate, *options = summary.key
    change = f"{summary.change:+.3f}" + ("" if summary.change_se is None else f" ± {summary.change_se:.3f}")
    figures = (summary.sample_size, summary.norm_ratio, summary.ungated_cosine, summary.cosine)
    return [
        f"{gate}{' (the run)' if summary.own else ''}",
        *(option or "" for option in options),
        *(f"{figure:.3f}" for figure in figures),
        change,
    ]


def console_table(summaries: Sequence[GateSummary]) -> Table:
    """Return the table of the gates with the paper's statistic and weights of mean 1, and of the run's own gate."""
    table = Table(title="Gated gradients of stale rollouts", caption=_CAPTION, caption_justify="left")
    for name in _SHORT:
        table.add_column(name, justify="left" if name in _KEYS else "right", no_wrap=True)
    for summary in summaries:
        if summary.is_paper or summary.own:
            gate, _, _, *rest = _cells(summary)
            table.add_row(gate, *rest)
    return table


def write_rows(path: Path, steps: Sequence[ReplayedStep]) -> None:
    """Write every gate at every step as CSV; undefined values are empty."""
    rows = [row for step in steps for row in step.rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(summaries: Sequence[GateSummary]) -> str:
    """Return all summaries as a table, the largest change first."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    ordered = sorted(summaries, key=lambda summary: -summary.change)
    return "\n".join([*lines, *(f"| {' | '.join(_cells(summary))} |" for summary in ordered)])


def step_table(steps: Sequence[ReplayedStep]) -> str:
    """Return the steps as Markdown: age, losses, the ungated gradient, and the ceiling."""
    names = ("step", "age", "loss, recorded", "loss, replayed", "gradient norm", "ungated cosine with fresh", "ceiling")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for step in steps:
        ungated = step.rows[0]
        cosine, error = ungated["fresh_cosine"], ungated["fresh_cosine_se"]
        shown = f"{cosine:.3f} ± {error:.3f}" if isinstance(cosine, float) and isinstance(error, float) else ""
        cells = (
            *(str(step.number), f"{step.age:g}", repr(step.recorded_loss), repr(step.replayed_loss)),
            *(f"{step.replayed_norm:.4g}", shown, f"{step.ceilings['fresh']:.3f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
