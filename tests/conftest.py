import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opdlab.diagnostics import find_metric
from tests.toy_run import Run

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Lightning calls functions that jsonargparse has deprecated.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bit-for-bit comparisons hold on one thread; and two test processes share two cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _every_logged_scalar_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to log a name that is not in the table of metrics: module and callbacks log through this method."""
    log = pl.LightningModule.log

    def checked(module: pl.LightningModule, name: str, *args: Any, **options: Any) -> None:
        assert find_metric(name) is not None, f"{name} is logged, but has no row in opdlab/diagnostics/metric_table.py"
        log(module, name, *args, **options)

    monkeypatch.setattr(pl.LightningModule, "log", checked)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda **options: Run(tmp_path, **options)
