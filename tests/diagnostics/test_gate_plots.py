"""Plots: their content, and that drawing leaves matplotlib's state unchanged."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from opdlab.diagnostics.gate_plots import block_heat_map, by_age, position_curves, render
from opdlab.diagnostics.run_history import AgeMetrics
from tests.children import run_child


def mesh_of(figure: Figure) -> QuadMesh:
    (mesh,) = [child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh)]
    return mesh


def test_heat_map_has_a_column_for_each_step() -> None:
    values = torch.tensor([[1.0, 0.5, 1.25], [1.0, torch.nan, 0.75], [torch.nan] * 3])
    figure = block_heat_map([10, 20, 40], values, "weight")
    mesh = mesh_of(figure)
    drawn = mesh.get_array()
    assert drawn is not None
    np.testing.assert_array_equal(np.ma.filled(drawn, np.nan), values[:2])  # without segments that no rollout has
    corners = np.asarray(mesh.get_coordinates())
    assert corners[0, :, 0].tolist() == [5, 15, 30, 50]
    assert corners[:, 0, 1].tolist() == [-0.5, 0.5, 1.5]
    # Equal distances from a weight of 1 have equally strong colours, and 1 the palest.
    low, middle, high = mesh.to_rgba(np.array([0.5, 1.0, 1.5]))[:, :3]
    assert middle.min() > 0.9
    assert low[2] > low[0]  # blue
    assert high[0] > high[2]  # red
    texts = [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel(), figure.axes[1].get_ylabel()]
    assert texts[:2] == ["optimizer step", "segment of the response"]
    assert "weight" in texts[2]


def test_heat_map_of_drift_has_its_unit_and_takes_zeros() -> None:
    figure = block_heat_map([10], torch.tensor([[0.0], [0.2]]), "drift")
    assert "nats" in figure.axes[1].get_ylabel()
    assert mesh_of(figure).norm.vmax == pytest.approx(0.2)
    assert render(figure).ndim == 3
    render(block_heat_map([10], torch.zeros(1, 1), "drift"))
    render(block_heat_map([10], torch.full((1, 1), torch.nan), "drift"))


def test_by_age_shows_drift_and_spread() -> None:
    figure = by_age(AgeMetrics([0, 1, 4], [10, 10, 10], [0.0, 0.1, 0.3], [1.0, 1.0, 0.9], [0.0, 0.1, 0.2]))
    upper, lower = figure.axes
    assert upper.lines[0].get_xydata().tolist() == [[0, 0], [1, 0.1], [4, 0.3]]  # type: ignore[union-attr]
    band = lower.collections[0].get_paths()[0].vertices
    assert (np.max(band[:, 1]), np.min(band[:, 1])) == pytest.approx((1.1, 0.7))  # type: ignore[index]
    assert "nats" in upper.get_ylabel()
    assert "refresh" in lower.get_xlabel()


def test_curves_along_the_response_have_a_point_for_each_known_bin() -> None:
    scalars = {"position/entropy/00": 0.5, "position/entropy/31": 0.25, "position/weight/16": 1.0}
    upper, lower = position_curves(scalars).axes
    assert upper.lines[0].get_xydata().tolist() == [[1 / 64, 0.5], [63 / 64, 0.25]]  # type: ignore[union-attr]
    assert lower.lines[0].get_xydata().tolist() == [[33 / 64, 1.0]]  # type: ignore[union-attr]
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("entropy, nats", "weight")


def test_a_figure_becomes_pixels() -> None:
    image = render(by_age(AgeMetrics([3], [10], [0.1], [1.0], [0.1])))
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.min() < 100 < 255 == image.max()
    assert max(image.shape) <= 800


def test_matplotlib_is_imported_late_and_without_pyplot() -> None:
    # Only imports by opdlab count: torchmetrics imports it as well.
    code = """
import builtins
ours, imported = builtins.__import__, []
def watching(name, namespace=None, *rest, **options):
    if name.startswith("matplotlib") and str((namespace or {}).get("__name__")).startswith("opdlab"):
        imported.append(name)
    return ours(name, namespace, *rest, **options)
builtins.__import__ = watching
import opdlab.callbacks, opdlab.cli.app, torch
from opdlab.diagnostics import gate_plots
assert imported == [], imported
gate_plots.render(gate_plots.block_heat_map([1], torch.ones(1, 1), "weight"))
assert "matplotlib.figure" in imported
assert "matplotlib.pyplot" not in imported
"""
    run_child([sys.executable, "-c", code], check=True)
