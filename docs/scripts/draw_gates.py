"""Draws the pictures of the gate pages into ``docs/pictures/``, from the numbers in ``docs/example_rollouts.json``.

``python docs/scripts/draw_gates.py``. Needs matplotlib; trains nothing.
"""

import pathlib
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from example import NAMES, ROW, TAU, Example, load
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from torch import Tensor

from opdlab.gating import GateInputs, GateStrategy, build_gate

FOLDER = pathlib.Path(__file__).parents[1] / "pictures"
COLUMNS = 32  # tokens to a line
# Colour scales: drift in nats, cut off where single tokens would hide the rest; weights around their mean of one.
DRIFT = ScalarMappable(Normalize(-1.0, 1.0), "RdBu_r")
WEIGHT = ScalarMappable(Normalize(0.0, 2.0), "PRGn")
Segment = tuple[tuple[int, int], tuple[int, int]]
SHOWN = {"\n": "↵", "<eos>": "eos", "\\boxed{": "\\box{"}


def main() -> None:
    """Draw everything."""
    # The same bytes each time, and no date in them.
    matplotlib.rcParams |= {"svg.hashsalt": "opdlab", "font.size": 9, "figure.facecolor": "white"}
    FOLDER.mkdir(exist_ok=True)
    example = load()
    save(drift_picture(example), "drift")
    for name in NAMES:
        save(gate_picture(example, name), f"gate-{name}")
    save(gate_picture(example, "block", block_size=16), "gate-block")
    save(side_by_side(example), "gates-side-by-side")
    save(weight_curves(), "weight-curves")
    save(statistics_picture(example), "statistics")


def save(figure: Figure, name: str) -> None:
    """Write an SVG."""
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def drift_picture(example: Example) -> Figure:
    """The example rollout's drift, token by token."""
    figure, axes = plt.subplots(figsize=(9, 2), layout="constrained")
    drift = example.inputs.drift[ROW]
    draw_tokens(axes, example.texts[ROW], drift, DRIFT, torch.arange(len(drift)), border=0.3)
    figure.colorbar(DRIFT, ax=axes, extend="both", fraction=0.03, pad=0.01, label="drift, nats")
    return figure


def gate_picture(example: Example, name: str, **options: Any) -> Figure:
    """The same rollout under one gate: the drift of its segments, and its weights."""
    gates = example.gates(name, tau=TAU, **options)
    figure, (top, bottom) = plt.subplots(2, figsize=(9, 3.9), layout="constrained")
    texts, ids = example.texts[ROW], gates.segment_ids[ROW]
    for axes, values, scale, title, label, extend in (
        (top, gates.segment_drift[ROW], DRIFT, "mean drift of each segment", "drift, nats", "both"),
        (bottom, gates.weights[ROW], WEIGHT, f"weights at tau = {TAU:g}", "weight", "max"),
    ):
        draw_tokens(axes, texts, values, scale, ids)
        axes.set_title(title, loc="left", fontsize=10)
        figure.colorbar(scale, ax=axes, extend=extend, fraction=0.03, pad=0.01, label=label)
    return figure


def draw_tokens(
    axes: Axes, texts: list[str], values: Tensor, scale: ScalarMappable, ids: Tensor, border: float = 1.4
) -> None:
    """Draw a response as lines of coloured cells, a cell a token, with a border around each segment.

    Args:
        axes: to draw on.
        texts: of the tokens.
        values: [T], at least as many as texts.
        scale: turns values into colours.
        ids: [T], the segment of each token.
        border: width of a segment's border, points.
    """
    colors = scale.to_rgba(values.numpy())
    for index, text in enumerate(texts):
        line, column = divmod(index, COLUMNS)
        axes.add_patch(Rectangle((column, line), 1, 1, facecolor=colors[index], edgecolor="0.8", linewidth=0.3))
        dark = sum(colors[index][:3]) < 1.4
        shown = SHOWN.get(text, text)
        size = 9 if len(shown) == 1 else 10 / len(shown) + 2
        place = {"ha": "center", "va": "center", "family": "monospace", "fontsize": size}
        axes.text(column + 0.5, line + 0.5, shown, color="white" if dark else "black", **place)
    edges = Path.make_compound_path(*map(Path, borders(ids[: len(texts)].tolist())))
    axes.add_patch(PathPatch(edges, fill=False, edgecolor="black", linewidth=border))
    axes.set(xlim=(-0.1, COLUMNS + 0.1), ylim=((len(texts) - 1) // COLUMNS + 1.1, -0.1))
    axes.set_axis_off()


def borders(ids: list[int]) -> list[Segment]:
    """Edges of cells on whose other side there is another segment; one that goes on in the next line stays open there.

    Example:
        >>> borders([0, 0])
        [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((2, 0), (2, 1)), ((1, 0), (2, 0)), ((1, 1), (2, 1))]
    """
    found: dict[Segment, None] = {}  # each edge once, though two cells share it
    for index, segment in enumerate(ids):
        y, x = divmod(index, COLUMNS)
        edges = {
            -1: ((x, y), (x, y + 1)),
            1: ((x + 1, y), (x + 1, y + 1)),
            -COLUMNS: ((x, y), (x + 1, y)),
            COLUMNS: ((x, y + 1), (x + 1, y + 1)),
        }
        for step, edge in edges.items():
            other = index + step
            if not 0 <= other < len(ids) or ids[other] != segment:
                found[edge] = None
    return list(found)


def side_by_side(example: Example) -> Figure:
    """Weights along the response, one line of the picture for each gate."""
    length = len(example.texts[ROW])
    rows = [("drift", example.inputs.drift[ROW], DRIFT)]
    rows += [(name, example.gates(name, tau=TAU).weights[ROW], WEIGHT) for name in NAMES]
    figure, grid = plt.subplots(len(rows), figsize=(9, 3.6), sharex=True, layout="constrained")
    for axes, (name, values, scale) in zip(grid, rows, strict=True):
        axes.imshow(values[None, :length], cmap=scale.cmap, norm=scale.norm, aspect="auto", interpolation="nearest")
        axes.set_yticks([0], [name])
        axes.tick_params(left=False, bottom=False)
    for index, text in enumerate(example.texts[ROW]):
        if text == "\n":
            grid[0].axvline(index + 0.5, color="black", linewidth=0.6)
    grid[-1].tick_params(bottom=True)
    grid[-1].set_xticks(range(0, length, 32))
    grid[-1].set_xlabel("position in the response, tokens")
    figure.colorbar(DRIFT, ax=grid[:3], extend="both", label="drift, nats")
    figure.colorbar(WEIGHT, ax=grid[3:], extend="max", label="weight")
    return figure


def weight_curves() -> Figure:
    """Weight against a segment's drift: for several tau, and for each normalization."""
    drift = torch.linspace(0, 1, 201)
    inputs = GateInputs(
        torch.zeros(1, len(drift), dtype=torch.long), torch.ones(1, len(drift)), torch.zeros(1, len(drift)), drift[None]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for tau in (0.0, 1.0, 2.0, 5.0, 20.0):
        left.plot(drift, _weights("none", inputs, tau=tau), label=f"{tau:g}")
    left.set(title="normalization none: exp(-tau s)", ylabel="weight")
    left.legend(title="tau, per nat")
    for normalization in ("none", "mean", "residual", "clipped"):
        right.plot(drift, _weights(normalization, inputs, tau=5.0), label=normalization)
    right.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    right.set(title="tau = 5, drifts spread evenly from 0 to 1")
    right.legend(title="normalization")
    for axes in (left, right):
        axes.set_xlabel("segment statistic s, nats")
        axes.set_ylim(0)
    return figure


def _weights(normalization: str, inputs: GateInputs, tau: float) -> Tensor:
    gate: GateStrategy = build_gate("token", tau=tau, normalization=normalization)
    return gate(inputs).weights[0]


def statistics_picture(example: Example) -> Figure:
    """What each statistic makes of the example's blocks of 32 tokens."""
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    statistics = ("signed_mean", "abs_mean", "rms", "max")
    for place, statistic in enumerate(statistics):
        gates = example.gates("block32", tau=1.0, normalization="none", statistic=statistic)
        ids = gates.segment_ids[ROW]
        values = [-gates.weights[ROW][ids == block][0].log().item() for block in range(int(ids.max()) + 1)]
        axes.bar([block + 0.2 * (place - 1.5) for block in range(len(values))], values, width=0.18, label=statistic)
    axes.set(yscale="log", ylabel="s, nats", xlabel="block of 32 tokens", xticks=range(len(values)))
    axes.legend(title="statistic", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


if __name__ == "__main__":
    main()
