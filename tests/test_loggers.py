"""Histograms, images, text and hyperparameters, in what Weights & Biases, MLflow and other loggers take."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from opdlab.callbacks import GateMonitor, SampleLogger
from opdlab.cli.hparams import log_hyperparameters
from opdlab.cli.parsing import parse_fit
from opdlab.diagnostics.histograms import Binning, Histogram, bin_rows, read_histograms
from opdlab.loggers import MediaWriter, log_media, media_writer
from opdlab.training.run_trainer import MetricsFile
from tests.toy_run import Run

MakeRun = Callable[..., Run]
IMAGE = np.zeros((4, 6, 3), dtype=np.uint8)


def histogram() -> Histogram:
    values = torch.tensor([0.0, 0.5, 0.5, 2.0]).double()
    binning = Binning(0.0, 1.0, num_bins=4)
    (found,) = read_histograms(bin_rows(values, torch.zeros(4).long(), 1, binning), binning)
    assert found is not None
    return found


# -- Weights & Biases, with the classes of its API that are used -------------------------------------------------------


@dataclass
class FakeHistogram:
    np_histogram: tuple[list[int], list[float]]


@dataclass
class FakeImage:
    data_or_path: Any


@dataclass
class FakeTable:
    columns: list[str]
    data: list[list[str]]


class FakeWandb(WandbLogger):
    """Keeps what reaches the run; the package is not needed."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self._prefix, self._wandb_init = "", {}
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.run = SimpleNamespace(
            log=self.rows.append, config=SimpleNamespace(update=lambda values, **_: self.config.update(values))
        )

    @property
    def experiment(self) -> Any:
        return self.run

    @property
    def save_dir(self) -> None:
        return None

    name = version = "fake"

    def finalize(self, status: str) -> None: ...


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = SimpleNamespace(Histogram=FakeHistogram, Image=FakeImage, Table=FakeTable)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return FakeWandb()


def of_type(rows: list[dict[str, Any]], kind: type) -> dict[str, list[tuple[int, Any]]]:
    found: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        for tag, value in row.items():
            if isinstance(value, kind):
                found.setdefault(tag, []).append((row["trainer/global_step"], value))
    return found


def test_histograms_plots_and_text_of_a_run_reach_wandb(make_run: MakeRun, fake_wandb: FakeWandb) -> None:
    monitor, samples = GateMonitor(every_n_steps=2), SampleLogger(every_n_steps=4, num_rollouts=2)
    make_run(callbacks=(monitor, samples)).fit(4, logger=fake_wandb)
    histograms = of_type(fake_wandb.rows, FakeHistogram)
    assert {"gate/weights", "gate/token_drift", "gate/segment_drift", "gate/block/000"} <= set(histograms)
    assert [step for step, _ in histograms["gate/weights"]] == [2, 4]
    counts, edges = histograms["gate/weights"][-1][1].np_histogram
    assert len(edges) == len(counts) + 1
    assert edges == sorted(edges)
    images = of_type(fake_wandb.rows, FakeImage)
    assert set(images) == {"gate/heat_map/weight", "gate/heat_map/drift", "gate/by_age", "position/curves"}
    assert images["gate/by_age"][0][1].data_or_path.shape[2] == 3
    texts = of_type(fake_wandb.rows, FakeTable)
    assert set(texts) == {"rollouts/0", "rollouts/1"}
    assert "**response**" in texts["rollouts/0"][0][1].data[0][0]
    assert any("gate/gradient_cosine" in row for row in fake_wandb.rows)


def test_hyperparameters_reach_wandb(make_run: MakeRun, fake_wandb: FakeWandb) -> None:
    config = parse_fit(["-c", "quickstart"]).as_dict()
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[fake_wandb])
    log_hyperparameters(trainer, make_run().module, config, ["toy"])
    assert fake_wandb.config["gate"] == "block32"
    assert fake_wandb.config["lr"] == 2e-4


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed: pip install wandb")
@pytest.mark.filterwarnings("ignore")  # of wandb's dependencies
def test_wandb_itself_takes_them_offline(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="opdlab", offline=True)
    monitor, samples = GateMonitor(every_n_steps=2), SampleLogger(every_n_steps=2, num_rollouts=2)
    make_run(callbacks=(monitor, samples)).fit(2, logger=logger)
    logger.experiment.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("files/media/images/gate/*.png"))
    (table,) = folder.glob("files/media/table/rollouts/0*.json")
    assert "**response**" in json.loads(table.read_text())["data"][0][0]


# -- MLflow, and loggers that take nothing -----------------------------------------------------------------------------


class FakeMLflow(MLFlowLogger):
    """Keeps what reaches the client; the package is not needed."""

    def __init__(self) -> None:
        Logger.__init__(self)
        self.artifacts: dict[str, Any] = {}

    run_id = "7"

    @property
    def experiment(self) -> Any:
        def keep(run_id: str, artifact: Any, artifact_file: str) -> None:
            self.artifacts[artifact_file] = artifact

        return SimpleNamespace(log_image=keep, log_text=keep)


def media() -> dict[str, Any]:
    return {"histograms": {"gate/weights": histogram()}, "images": {"gate/by_age": IMAGE}, "texts": {"rollouts/0": "*"}}


def test_mlflow_takes_images_and_text_and_says_once_what_it_does_not(caplog: pytest.LogCaptureFixture) -> None:
    logger = FakeMLflow()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        for step in (1, 2):
            log_media([logger], step, **media())
    assert sorted(logger.artifacts) == [
        "gate/by_age/step-000001.png",
        "gate/by_age/step-000002.png",
        "rollouts/0/step-000001.md",
        "rollouts/0/step-000002.md",
    ]
    assert said(caplog) == ["FakeMLflow takes no histograms; left out: gate/weights"]


def test_a_logger_that_takes_nothing_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        for step in (1, 2):
            log_media([logger], step, **media())
    assert said(caplog) == [
        "CSVLogger takes no histograms; left out: gate/weights",
        "CSVLogger takes no images; left out: gate/by_age",
        "CSVLogger takes no texts; left out: rollouts/0",
    ]


def test_the_metrics_file_of_a_run_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        log_media([MetricsFile(tmp_path / "metrics.csv")], 1, **media())
    assert said(caplog) == []


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "takes no" in record.getMessage()]


def test_another_logger_may_be_registered() -> None:
    class Mine(CSVLogger):
        texts: list[Mapping[str, str]] = []  # noqa: RUF012

    @media_writer.register(Mine)
    class Writer(MediaWriter):
        takes = ("texts",)

        def texts(self, items: Mapping[str, str], step: int) -> None:
            self.logger.texts.append(items)

    log_media([Mine("unused")], 3, texts={"rollouts/0": "text"})
    assert Mine.texts == [{"rollouts/0": "text"}]
