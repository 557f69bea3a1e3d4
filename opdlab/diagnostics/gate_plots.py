"""Plots of weights and drift, as pure functions from numbers to matplotlib figures.

matplotlib is imported when a figure is made, and its global state stays unchanged: no ``pyplot``, no
``rcParams``. Figures are small with large type, for the cards of TensorBoard.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from opdlab.diagnostics.age_metrics import AgeMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_SIZE = (6.0, 3.9)  # inches
_DPI = 110
_GREY = "0.85"  # where there is no value
# A smaller range of weights than this is shown as nearly white, so that rounding does not get strong colours.
_LEAST_RANGE = 0.01
# Drift colours span from the greatest value down to this share of it; smaller values look the same.
_DRIFT_RANGE = 1000.0
_LEAST_DRIFT = 1e-5  # nats: below is rounding


def _figure() -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    from matplotlib.ticker import MaxNLocator

    shown = values[: _num_used(values)].double().numpy()
    figure = _figure()
    axes = figure.subplots()
    norm, colours, label = _weight_scale(shown) if quantity == "weight" else _drift_scale(shown)
    rows = np.arange(shown.shape[0] + 1) - 0.5
    mesh = axes.pcolormesh(_edges(steps), rows, np.ma.masked_invalid(shown), norm=norm, cmap=colours, rasterized=True)
    axes.set_facecolor(_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    _label(axes, "optimizer step", "segment of the response")
    _title(axes, "Mean weight of each segment" if quantity == "weight" else "Mean drift of each segment")
    bar = figure.colorbar(mesh, ax=axes, extend="neither" if quantity == "weight" else "min")
    bar.set_label(label, fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure


def by_age(metrics: AgeMetrics) -> "Figure":
    """Return a plot of drift (above) and spread of weights (below) against the age of the rollouts.

    Args:
        metrics: by age, at least one.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    upper, lower = figure.subplots(2, 1, sharex=True)
    ages, mean, std = (np.array(column) for column in (metrics.ages, metrics.weight_mean, metrics.weight_std))
    upper.plot(ages, metrics.drift, marker="o", markersize=4, color="tab:purple")
    upper.set_ylim(bottom=0)
    _label(upper, "", "mean |drift|, nats")
    _title(upper, "Drift and weights by age of the rollouts")
    lower.axhline(1, color="0.5", linewidth=1, linestyle="--")
    lower.fill_between(ages, mean - std, mean + std, alpha=0.3, color="tab:blue", linewidth=0, label="± 1 std")
    lower.plot(ages, mean, marker="o", markersize=4, color="tab:blue", label="mean")
    lower.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    _label(lower, "optimizer steps since the snapshot's refresh", "weight")
    lower.legend(fontsize=10, loc="upper left", ncols=2, frameon=False)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
    return figure


def _num_used(values: Tensor) -> int:
    used = values.isfinite().any(1).nonzero()
    return int(used.max()) + 1 if used.numel() else 1


def _weight_scale(values: NDArray[np.float64]) -> tuple["Normalize", str, str]:
    from matplotlib.colors import CenteredNorm

    finite = values[np.isfinite(values)]
    reach = max(float(np.abs(finite - 1).max(initial=0.0)), _LEAST_RANGE)
    return CenteredNorm(1.0, reach), "RdBu_r", "mean weight (1: as without a gate)"


def _drift_scale(values: NDArray[np.float64]) -> tuple["Normalize", str, str]:
    from matplotlib.colors import LogNorm

    finite = values[np.isfinite(values)]
    # Drift varies by orders of magnitude in a run, and is 0 after a refresh.
    greatest = max(float(finite.max(initial=0.0)), _LEAST_DRIFT)
    return LogNorm(greatest / _DRIFT_RANGE, greatest, clip=True), "viridis", "mean |drift|, nats (logarithmic)"


def _edges(steps: Sequence[int]) -> NDArray[np.float64]:
    """Return the edges between the columns: half-way between steps, which may have unequal distances."""
    centres = np.asarray(steps, dtype=np.float64)
    gaps = np.diff(centres) if len(centres) > 1 else np.array([1.0])
    between = centres[:-1] + np.diff(centres) / 2
    return np.concatenate([[centres[0] - gaps[0] / 2], between, [centres[-1] + gaps[-1] / 2]])


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, fontsize=13)
