from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import opdlab.scoring.full_divergence
import opdlab.scoring.head
import opdlab.scoring.head_gradients


@pytest.fixture(params=[(1, 1), (5, 40), (13, 14 * 13), (4096, 1 << 24)], ids=["logits", "5 x 8", "13 x 14", "whole"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one logit each; of some rows and columns with rests; of all rows and some columns; of everything."""
    rows, logits = request.param  # the constants are for real models: tests would fit into one tile
    monkeypatch.setattr(opdlab.scoring.head, "_MAX_TILE_ROWS", rows)
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", logits)
    monkeypatch.setattr(opdlab.scoring.head_gradients, "MAX_PIECE", logits)
    monkeypatch.setattr(opdlab.scoring.full_divergence, "MAX_PIECE", max(1, logits // 2))


@pytest.fixture(params=[0, 1000], ids=["rows gathered", "whole head"])
def _backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit between the two ways is for real heads; both are tested on small ones.
    monkeypatch.setattr(opdlab.scoring.head_gradients, "_DENSE", request.param)


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
