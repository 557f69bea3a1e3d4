"""Plots of weights and drift, as pure functions from numbers to matplotlib figures.

matplotlib is imported when a figure is made, and its global state stays unchanged: no ``pyplot``, no
``rcParams``. Figures are small with large type, for the cards of TensorBoard.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opdlab.diagnostics.metric_table import metric_title
from opdlab.diagnostics.positions import CURVES, NUM_BINS
from opdlab.diagnostics.run_history import AgeMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A smaller range of weights than this is shown as nearly white, so that rounding does not get strong colours.
_LEAST_RANGE = 0.01
# Drift colours span from the greatest value down to this share of it; smaller values look the same.
_DRIFT_RANGE = 1000.0
_LEAST_DRIFT = 1e-5  # nats: below is rounding


def _figure(title: str, xlabel: str, *ylabels: str) -> "tuple[Figure, list[Axes]]":
    """Return a figure with one pair of axes per y label, from the top, that share the x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.0, 3.9), dpi=110, layout="constrained")  # inches
    FigureCanvasAgg(figure)
    rows = list(figure.subplots(len(ylabels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, label in zip(rows, ylabels, strict=True):
        axes.set_ylabel(label, fontsize=12)
        axes.tick_params(labelsize=11)
    rows[0].set_title(title, fontsize=13)
    rows[-1].set_xlabel(xlabel, fontsize=12)
    rows[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    return figure, rows


def render(figure: "Figure") -> NDArray[np.uint8]:
    """Return the pixels of a figure, [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


def block_heat_map(steps: Sequence[int], values: Tensor, quantity: Literal["weight", "drift"]) -> "Figure":
    """Return a heat map: segments upwards, optimizer steps to the right.

    Args:
        steps: S optimizer steps, ascending, at least one.
        values: [segments, S]: mean weights, or mean absolute drifts in nats; NaN (grey) where no rollout has the
            segment.
        quantity: of the values. Weights get diverging colours around 1, drift a logarithmic scale.
    """
    from matplotlib.colors import CenteredNorm, LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    used = values.isfinite().any(1).nonzero()
    shown = values[: int(used.max()) + 1 if used.numel() else 1].double().numpy()
    finite = shown[np.isfinite(shown)]
    if quantity == "weight":
        reach = max(float(np.abs(finite - 1).max(initial=0.0)), _LEAST_RANGE)
        norm: Normalize = CenteredNorm(1.0, reach)
        colours, extend = "RdBu_r", "neither"
        label = "mean weight (1: as without a gate)"
    else:  # drift varies by orders of magnitude in a run, and is 0 after a refresh
        greatest = max(float(finite.max(initial=0.0)), _LEAST_DRIFT)
        norm = LogNorm(greatest / _DRIFT_RANGE, greatest, clip=True)
        colours, extend = "viridis", "min"
        label = "mean |drift|, nats (logarithmic)"
    figure, (axes,) = _figure(f"Mean {quantity} of each segment", "optimizer step", "segment of the response")
    # Edges of columns: half-way between steps, which may have unequal distances.
    centres = np.asarray(steps, dtype=np.float64)
    gaps = np.diff(centres) if len(centres) > 1 else np.array([1.0])
    between = (centres[:-1] + centres[1:]) / 2
    edges = np.concatenate([[centres[0] - gaps[0] / 2], between, [centres[-1] + gaps[-1] / 2]])
    rows = np.arange(shown.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, np.ma.masked_invalid(shown), norm=norm, cmap=colours, rasterized=True)
    axes.set_facecolor("0.85")  # grey, where there is no value
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    bar = figure.colorbar(mesh, ax=axes, extend=extend)
    bar.set_label(label, fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def by_age(metrics: AgeMetrics) -> "Figure":
    """Return a plot of drift (above) and spread of weights (below) against the age of the rollouts.

    Args:
        metrics: by age, at least one.
    """
    title, xlabel = "Drift and weights by age of the rollouts", "optimizer steps since the snapshot's refresh"
    figure, (upper, lower) = _figure(title, xlabel, "mean |drift|, nats", "weight")
    ages, mean, std = (np.array(column) for column in (metrics.ages, metrics.weight_mean, metrics.weight_std))
    upper.plot(ages, metrics.drift, marker="o", markersize=4, color="tab:purple")
    upper.set_ylim(bottom=0)
    lower.axhline(1, color="0.5", linewidth=1, linestyle="--")
    lower.fill_between(ages, mean - std, mean + std, alpha=0.3, color="tab:blue", linewidth=0, label="± 1 std")
    lower.plot(ages, mean, marker="o", markersize=4, color="tab:blue", label="mean")
    lower.legend(fontsize=10, loc="upper left", ncols=2, frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
    return figure


def position_curves(scalars: Mapping[str, float]) -> "Figure":
    """Return a plot of each curve of :mod:`opdlab.diagnostics.positions` along the response, one above the other.

    Args:
        scalars: of a step by name; bins without a value are left out, curves without any too.
    """
    from matplotlib.ticker import FixedLocator

    found: dict[str, tuple[list[float], list[float]]] = {}
    for name in CURVES:
        named = {n: scalars.get(f"position/{name}/{n:02d}") for n in range(NUM_BINS)}
        known = {n: value for n, value in named.items() if value is not None}
        if known:
            found[name] = [(n + 0.5) / NUM_BINS for n in known], list(known.values())
    labels = [metric_title(f"position/{name}/00").replace(" by position", "") for name in found]
    figure, rows = _figure("Along the response", "part of the response", *labels)
    figure.set_figheight(1.3 + 1.3 * len(rows))
    for axes, (places, values) in zip(rows, found.values(), strict=True):
        axes.plot(places, values, marker="o", markersize=3, color="tab:blue")
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.3)
    rows[-1].xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    return figure
