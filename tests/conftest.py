import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opdlab.diagnostics import find_metric
from opdlab.packages import is_installed, refusal
from tests.toy_run import Run

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Child processes of several tests share the cores: with a thread for each core they would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Lightning calls functions that jsonargparse has deprecated.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# A shell ignores Ctrl-C for its background processes; the tests send it to themselves and to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bit-for-bit comparisons hold on one thread; and two test processes share two cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _every_logged_scalar_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to log a name that is not in the table of metrics: module and callbacks log through this method."""
    log = pl.LightningModule.log

    def checked(module: pl.LightningModule, name: str, *args: Any, **options: Any) -> None:
        # "step" is no metric: Lightning takes it as the position on the axis.
        assert name == "step" or find_metric(name) is not None, (
            f"{name} is logged, but has no row in opdlab/diagnostics/metric_table.py"
        )
        log(module, name, *args, **options)

    monkeypatch.setattr(pl.LightningModule, "log", checked)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda **options: Run(tmp_path, **options)


@pytest.fixture(scope="session")
def peft_pair() -> None:
    """Skip tests of adapters where transformers refuses the installed peft; `test_packages.py` fails for our own."""
    if not is_installed("peft"):
        pytest.skip("peft is not installed: pip install 'opdlab[peft]'")
    if (reason := refusal("peft")) is not None:
        pytest.skip(reason)
