"""Plots of a replay, as pure functions to matplotlib figures; matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from opdlab.replay.comparison import PLOTTED_TAUS, ReplayedStep, Row
from opdlab.replay.variants import has_papers_form

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE, _DPI = (7.5, 5.4), 110  # inches
_UNGATED = "0.35"


def _figure(height: float = _SIZE[1]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def cosines_by_age(steps: Sequence[ReplayedStep], tau: float, reference: str = "fresh") -> "Figure":
    """Return a figure: above, the ungated gradient's cosine and the ceiling; below, each gate's change of the cosine.

    Steps of one age are averaged. Bars are standard errors: over the steps if an age has several, otherwise over the
    fresh draws.

    Args:
        steps: at least one.
        tau: of the shown gates, which have the paper's statistic and normalisation.
        reference: ``fresh`` or ``other``.
    """
    figure = _figure()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    ages = sorted({step.age for step in steps})
    ceilings = [mean(step.ceilings[reference] for step in steps if step.age == age) for age in ages]
    upper.plot(ages, ceilings, color="black", linestyle="--", marker="_", label="between two fresh gradients")
    _plot(upper, steps, [step.rows[0] for step in steps], reference, "cosine", color=_UNGATED, label="ungated")
    lower.axhline(0, color=_UNGATED, linewidth=1)
    gates = dict.fromkeys(str(row["gate"]) for step in steps for row in step.rows if _shown(row, tau))
    for place, gate in enumerate(gates):
        rows = [next((row for row in step.rows if row["gate"] == gate and _shown(row, tau)), None) for step in steps]
        # Side by side, so that bars of one age do not overlap.
        shift = 0.3 * (place / max(len(gates) - 1, 1) - 0.5)
        _plot(lower, steps, rows, reference, "change", shift, color=f"C{place}", label=gate)
    _finish(upper, "", "cosine", f"Cosine with fresh gradients ({'same' if reference == 'fresh' else 'other'} prompts)")
    upper.legend(fontsize=9, frameon=False)
    label = "age of the rollouts: optimizer steps since the snapshot's refresh"
    _finish(lower, label, "change from ungated", f"What a gate changes (tau {tau:g}, signed mean, mean-one weights)")
    if gates:
        lower.legend(fontsize=9, frameon=False, ncols=4)
    return figure


def _shown(row: Row, tau: float) -> bool:
    return row["tau"] == tau and has_papers_form(row)


def _plot(
    axes: "Axes",
    steps: Sequence[ReplayedStep],
    rows: Sequence[Row | None],
    reference: str,
    metric: str,
    shift: float = 0.0,
    **style: str,
) -> None:
    points: dict[float, list[tuple[float, float]]] = {}
    for step, row in zip(steps, rows, strict=True):
        value, error = (row[f"{reference}_{metric}{end}"] if row else None for end in ("", "_se"))
        if isinstance(value, float) and isinstance(error, float):
            points.setdefault(step.age, []).append((value, error))
    ages = sorted(points)
    values = [mean(value for value, _ in points[age]) for age in ages]
    errors = [
        stdev(value for value, _ in found) / len(found) ** 0.5 if len(found := points[age]) > 1 else found[0][1]
        for age in ages
    ]
    axes.errorbar([age + shift for age in ages], values, errors, marker="o", markersize=3.5, capsize=2, **style)  # type: ignore[arg-type] # colours and labels


def sample_sizes(steps: Sequence[ReplayedStep]) -> "Figure":
    """Return a plot of each gate's effective sample size against tau, mean over the stale steps.

    Args:
        steps: at least one.
    """
    figure = _figure(4.0)
    axes = figure.subplots()
    stale = [step for step in steps if step.age > 0] or list(steps)
    for gate in dict.fromkeys(gate for step in stale for gate in step.sample_sizes):
        sizes = [step.sample_sizes[gate] for step in stale if gate in step.sample_sizes]
        axes.plot(PLOTTED_TAUS, [mean(column) for column in zip(*sizes, strict=True)], label=gate)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    _finish(axes, "tau, per nat of drift", "effective sample size", "Share of the positions that the weights rest on")
    if stale[0].sample_sizes:
        axes.legend(fontsize=9, frameon=False)
    return figure


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write a figure as PNG, SVG and PDF."""
    # Without the date, so that equal replays give equal files.
    for kind, metadata in {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}.items():
        figure.savefig(folder / f"{name}.{kind}", metadata=metadata)


def _finish(axes: "Axes", x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=11)
    axes.set_ylabel(y, fontsize=11)
    axes.set_title(title, fontsize=12)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.3)
