"""Plots of runs beside each other, from numbers to matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opdlab.diagnostics.metric_table import metric_title
from opdlab.diagnostics.positions import CURVES, NUM_BINS
from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX, figures_of
from opdlab.report.drawing import new_figure, short_name
from opdlab.report.run.load import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beside the evaluations.
_TRAINING = (
    *("train/loss", "train/teacher_gap", "train/entropy", "train/drift/token_mean"),
    *("gate/effective_sample_size", "rollout/length"),
)
_MOST_POINTS = 400
_HISTOGRAMS = {"gate/weights": "weight", "gate/token_drift": "drift, nats"}


def curves(runs: Sequence[Run]) -> "Figure | None":
    """Return the metrics of the runs by optimizer step, a panel each; None if nothing was logged."""
    known = {name for run in runs for row in run.metrics.values() for name in row}
    benchmarks = {f"val/{name}" for run in runs for row in run.metrics.values() for name in figures_of(row, "val/")}
    names = [*sorted(name for name in benchmarks if "/pass@" in name and not name.endswith(ERROR_SUFFIX))]
    names += [name for name in _TRAINING if name in known]
    if not names:
        return None
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=False):
        for number, run in enumerate(runs):
            points = {step: row[name] for step, row in run.metrics.items() if name in row}
            steps = list(points)[:: -(-len(points) // _MOST_POINTS) or 1]
            errors = [1.96 * run.metrics[step].get(name + ERROR_SUFFIX, 0.0) for step in steps]
            colour, label = f"C{number % 10}", short_name(run.name)
            values = [points[step] for step in steps]
            if name.startswith("val/"):
                axes.errorbar(steps, values, errors, color=colour, label=label, marker="o", markersize=4, capsize=3)
            else:
                axes.plot(steps, values, color=colour, label=label, linewidth=1.2)
        axes.set_title(_title(name), fontsize=11)
    figure.supxlabel("optimizer step", fontsize=11)
    _legend(figure, panels, runs)
    return figure


def histograms(runs: Sequence[Run]) -> "Figure | None":
    """Return the histograms of weights and drifts of each run, early, in the middle and late; None without any."""
    found = [run for run in runs if run.histograms]
    tags = [tag for tag in _HISTOGRAMS if any(tag in row for run in found for row in run.histograms.values())]
    if not tags:
        return None
    figure, panels = _panels(len(found) * len(tags), columns=len(tags))
    for place, axes in enumerate(panels[: len(found) * len(tags)]):
        run, tag = found[place // len(tags)], tags[place % len(tags)]
        steps = sorted(step for step, row in run.histograms.items() if tag in row)
        for colour, step in zip(("0.7", "tab:orange", "tab:blue"), _three(steps), strict=False):
            _draw(axes, run.histograms[step][tag], colour, f"step {step}")
        axes.set_title(f"{short_name(run.name)}: {_HISTOGRAMS[tag]}", fontsize=11)
        axes.set_yscale("log")
        # Powers are mathematics by default, which names in reports must not be.
        axes.yaxis.set_major_formatter(lambda count, _: f"{count:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(fontsize=9, frameon=False)
    figure.supylabel("positions in a bin", fontsize=11)
    return figure


def _three(steps: Sequence[int]) -> list[int]:
    """Return the first, the middle and the last of some steps, each once."""
    return list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]])) if steps else []


def _draw(axes: "Axes", histogram: Mapping[str, Any], colour: str, label: str) -> None:
    edges = [histogram["min"], *histogram["limits"]]
    if edges[0] >= edges[1]:  # all values are equal, or the first bin begins with its only value
        edges[0] = edges[1] - max(abs(edges[1]) * 1e-3, 1e-6)
    axes.stairs(histogram["counts"], edges, color=colour, label=label, linewidth=1.3)


def positions(runs: Sequence[Run]) -> "Figure | None":
    """Return the curves along the response at the last monitored step of each run; None without any."""
    last: list[tuple[int, Mapping[str, float]]] = []
    for run in runs:
        rows = [(step, row) for step, row in run.metrics.items() if any(each.startswith("position/") for each in row)]
        last.append(rows[-1] if rows else (0, {}))
    names = [name for name in CURVES if any(f"position/{name}/00" in row for _, row in last)]
    if not names:
        return None
    figure, panels = _panels(len(names))
    for axes, name in zip(panels, names, strict=False):
        for number, (run, (step, row)) in enumerate(zip(runs, last, strict=True)):
            values = {n: row.get(f"position/{name}/{n:02d}") for n in range(NUM_BINS)}
            known = {(n + 0.5) / NUM_BINS: value for n, value in values.items() if value is not None}
            label = f"{short_name(run.name)}, step {step}"
            axes.plot(list(known), list(known.values()), color=f"C{number % 10}", marker="o", markersize=3, label=label)
        axes.set_title(metric_title(f"position/{name}/00").replace(" by position", ""), fontsize=11)
    figure.supxlabel("part of the response", fontsize=11)
    _legend(figure, panels, runs)
    return figure


def _panels(number: int, columns: int = 2) -> "tuple[Figure, list[Axes]]":
    columns = min(columns, number)
    rows = -(-number // columns)
    figure = new_figure(4.4 * columns, 0.6 + 2.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for place, axes in enumerate(panels):
        axes.set_visible(place < number)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=10)
    return figure, panels


def _legend(figure: "Figure", panels: "Sequence[Axes]", runs: Sequence[Run]) -> None:
    if len(runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", fontsize=10, ncols=min(3, len(runs)), frameon=False)


def _title(name: str) -> str:
    """Return a metric's title; one of an evaluation names the benchmark."""
    parts = name.split("/")
    return short_name(f"{parts[2]} on {parts[1]}" if parts[0] == "val" and len(parts) == 3 else metric_title(name))
