"""Plots of a study, from numbers to matplotlib figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opdlab.report.drawing import new_figure, short_name
from opdlab.report.study.compare import Comparison, Place, run_means
from opdlab.report.study.load import Results
from opdlab.report.study.sentences import place_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3


def forest(comparisons: Sequence[Comparison], results: Results) -> "Figure":
    """Return a forest plot: differences to baselines with 95% intervals, a row each, in the order of the study.

    Args:
        comparisons: the variants of one place.
        results: of the study.
    """
    one = len(results.baselines) == 1
    figure = new_figure(7.0, 1.5 + (0.36 if one else 0.56) * len(comparisons))
    axes = figure.subplots()
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--")
    for row, each in enumerate(comparisons):
        colour = "0.45" if not each.differs else "tab:blue" if each.ahead else "tab:red"
        if each.has_interval:
            axes.plot([each.low, each.high], [row, row], color=colour, linewidth=2)
        # A filled marker distinguishes them without colour.
        filling = colour if each.differs else "white"
        axes.plot(each.difference, row, "o", markersize=7, color=colour, markerfacecolor=filling)
    names = [(short_name(each.label), short_name(results.study.label(each.baseline))) for each in comparisons]
    rows = [name if one else f"{name}\nto {baseline}" for name, baseline in names]
    to = f" to {names[0][1]}" if one else ""
    _label(axes, rows, f"difference{to}, 95% interval (filled: p < 0.05 after Holm)", comparisons[0].place)
    return figure


def every_run(results: Results, place: Place) -> "Figure":
    """Return a plot of the metric of every run, a row for each variant, so that collapsed runs are visible.

    Within a row the height is given by the seed, so that runs of one seed have the same height in all rows.

    Args:
        results: of the study.
        place: metric, benchmark and step.
    """
    variants = [each.name for each in results.study.variants if results.finished(each.name)]
    figure = new_figure(7.0, 1.3 + 0.45 * len(variants))
    axes = figure.subplots()
    heights = dict(zip(results.study.seeds, np.linspace(-0.3, 0.3, len(results.study.seeds)), strict=True))
    for row, variant in enumerate(variants):
        runs = run_means(results, variant, place)
        seeds = results.finished(variant)
        axes.plot(runs, [row + heights[seed] for seed in seeds], "o", color="tab:blue", alpha=0.5)
        for seed, value in zip(seeds, runs, strict=True):
            if (variant, seed) in results.collapsed:
                axes.plot(value, row + heights[seed], "x", color="tab:red", markersize=9)
        axes.plot([runs.mean()] * 2, [row - 0.4, row + 0.4], color="0.2", linewidth=1.5)
    rows = [short_name(results.study.label(each)) for each in variants]
    crosses = "; crosses: collapsed" if results.collapsed else ""
    _label(axes, rows, f"dots: runs, one below the other by seed{crosses}; line: their mean", place)
    return figure


def learning_curves(results: Results, metric: str, benchmark: str) -> "Figure":
    """Return a plot of the mean over seeds at each step, ± one standard deviation, a panel for each variant.

    Args:
        results: of the study.
        metric: ``pass@1``.
        benchmark: name, or ``mean``.
    """
    columns = min(_COLUMNS, len(results.compared))
    rows = -(-len(results.compared) // columns)
    one = len(results.baselines) == 1
    figure = new_figure(max(5.0, 3.1 * columns), 0.7 + (2.5 if one else 2.7) * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, variant in zip(panels, results.compared, strict=False):
        for name, colour, style in ((results.study.baseline_of(variant), "0.45", "--"), (variant, "tab:blue", "-")):
            places = [Place(metric, benchmark, step) for step in results.steps]
            runs = np.stack([run_means(results, name, place) for place in places])
            mean = runs.mean(1)
            if runs.shape[1] > 1:
                spread = runs.std(1, ddof=1)
                axes.fill_between(results.steps, mean - spread, mean + spread, alpha=0.2, color=colour, linewidth=0)
            axes.plot(results.steps, mean, style, marker="o", markersize=4, color=colour)
        beside = "" if one else f"\nbeside {short_name(results.study.label(results.study.baseline_of(variant)))}"
        axes.set_title(short_name(results.study.label(variant)) + beside, fontsize=11)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=10)
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(results.compared))
        axes.tick_params(labelbottom=place + columns >= len(results.compared))  # nothing below
    figure.supxlabel("optimizer step", fontsize=11)
    figure.supylabel(short_name(place_name(Place(metric, benchmark, 0))), fontsize=11)
    base = short_name(results.study.label(results.baselines[0])) if one else "what it is compared with"
    figure.suptitle(f"solid: variant; dashed: {base}; band: ± 1 std over seeds", fontsize=11)
    return figure


def _label(axes: "Axes", rows: Sequence[str], label: str, place: Place) -> None:
    """Label the rows of a plot, the first on top, its horizontal axis and its place."""
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label, fontsize=10)
    axes.tick_params(labelsize=11)
    axes.set_title(f"{short_name(place_name(place))}, step {place.step}", fontsize=12)
