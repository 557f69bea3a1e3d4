"""The table of metrics against the logs of runs, and against its outputs."""

import pkgutil
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from opdlab.callbacks import CollapseGuard, EvaluationTable, GateMonitor, LabProgressBar, PoolRecorder, SampleLogger
from opdlab.data import ReuseConfig
from opdlab.diagnostics import Chart, Metric, find_metric, metric_rows, metric_table, register_metric
from opdlab.diagnostics.metric_table import progress_items, progress_names
from opdlab.errors import UsageError
from opdlab.evaluation import EvaluationConfig
from opdlab.loggers import layout
from opdlab.objectives import SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import LocalTeacher, SamplingConfig
from opdlab.tau import LinearTau
from opdlab.viewer import quantities
from tests.toy_run import Run


class Names(Logger):
    """Keeps the names of everything that reaches a logger, whoever logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    name = version = "names"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not looked at."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.names |= metrics.keys()


def logged_names(folder: Path, **options: Any) -> set[str]:
    """The names that a run of three steps with evaluations logs, with all callbacks that look at a step."""
    looking = (GateMonitor(1), SampleLogger(1), PoolRecorder(every_n_steps=1), CollapseGuard())
    callbacks = (*looking, EvaluationTable(), LabProgressBar())
    run, logger = Run(folder, callbacks=callbacks, max_new_tokens=48, **options), Names()
    # Long enough for some answers: where nothing is extracted, maj@n is left out.
    run.module.evaluator.sampling = SamplingConfig(num_samples=2, max_new_tokens=150)
    validation: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = run.fit(3, logger=logger, enable_progress_bar=True, num_sanity_val_steps=0, **validation)
    assert isinstance(run.module.teacher, LocalTeacher)
    with run.module.evaluating("teacher", run.module.teacher.model):
        trainer.validate(run.module, datamodule=run.data, verbose=False)
    return logger.names


@pytest.mark.parametrize("gate", ["none", "block64", "span"])
@pytest.mark.parametrize("objective", ["opd", "lsm"])
def test_every_scalar_of_the_papers_variants_has_a_row(tmp_path: Path, objective: str, gate: str) -> None:
    names = logged_names(tmp_path, gate=gate, objective=SampledTokenOPD() if objective == "opd" else TeacherTopK(8))
    assert {"train/loss", "gate/gradient_cosine", "age/drift/001", "val/toy/pass@2", "teacher/toy/pass@1"} <= names
    assert sorted(name for name in names if find_metric(name) is None) == []


def test_every_row_is_of_a_scalar_that_is_logged(tmp_path: Path) -> None:
    names = set()
    sampled = SampledTokenOPD(baseline="support_kl", k=8, reward_weight=0.5)
    for number, objective in enumerate((sampled, SupportDivergence(support="union", k=8))):
        evaluation = EvaluationConfig(pass_at=(1, 2), reverse_kl=True)
        names |= logged_names(
            tmp_path / str(number),
            objective=objective,
            tau=LinearTau(1.0, 2.0, 2),
            evaluation=evaluation,
            data={"reuse": ReuseConfig(8, 2, 8, overlap=number)},
        )
    missing = {row.name for row in metric_rows() if not any(row.matches(name) for name in names)}
    # Those of a cache, of several teachers, of demonstrations and of samplers are logged in the tests of these.
    elsewhere = ("targets/", "teacher-", "train/sampler_")
    assert {name for name in missing if not name.startswith(elsewhere)} == {"rollout/demonstration_share"}


def test_the_rows_name_what_computes_them() -> None:
    for row in metric_rows():
        assert callable(pkgutil.resolve_name(row.source)), row.source


def test_labels_tell_the_rows_of_a_group_apart() -> None:
    labels = Counter((row.name.split("/")[0], row.label) for row in metric_rows())
    assert [label for label, count in labels.items() if count > 1] == []


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("val/mean/pass@8", "val/mean/pass@<k>"),
        ("val/mean/length", "val/mean/<metric>"),
        ("val/toy-2/pass@16", "val/<benchmark>/pass@<k>"),
        ("val/toy/pass@16_se", "val/<benchmark>/<metric>_se"),
        ("teacher/mean/pass@1_se", "teacher/<benchmark or mean>/<metric>"),
        ("age/drift/063", "age/drift/<age>"),
    ],
)
def test_members_of_a_family_are_found(name: str, row: str) -> None:
    found = find_metric(name)
    assert found is not None
    assert found.name == row


@pytest.mark.parametrize("name", ["train/los", "train/loss/x", "gate/min2", "val/toy/bleu", "age/drift/x"])
def test_other_names_have_no_row(name: str) -> None:
    assert find_metric(name) is None


# -- rows of plug-ins -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers: the table belongs to the process, and no row can be taken out of it."""
    monkeypatch.setattr(metric_table, "_TABLE", dict(metric_table._TABLE))


@pytest.mark.usefixtures("own_table")
def test_a_row_of_a_plug_in_is_shown_everywhere() -> None:
    row = Metric("train/depth", "tree depth", "levels", "depth", "mine.Objective", "", Chart("trees"), "depth {:.1f}")
    register_metric(row)
    assert layout()["trees"] == {"tree depth, levels": ("Multiline", ["train/depth$"])}
    assert list(layout())[-1] == "trees"
    assert progress_names()[-1] == "train/depth"
    assert progress_items({"train/depth": 2.5, "rollout/age": 1.0}) == ["age 1", "depth 2.5"]
    (quantity,) = quantities(["depth"])
    assert (quantity.label, quantity.unit, quantity.meaning) == ("tree depth", "levels", "depth")


@pytest.mark.usefixtures("own_table")
def test_a_row_may_be_registered_again_but_not_taken() -> None:
    register_metric(Metric("train/depth", "depth", "", "first", "mine.Objective"))
    register_metric(Metric("train/depth", "depth", "", "second", "mine.Objective"))
    assert [row.meaning for row in metric_rows() if row.name == "train/depth"] == ["second"]
    with pytest.raises(UsageError, match=r"'train/loss' of mine\.Objective has a row already, of opdlab\.module"):
        register_metric(Metric("train/loss", "loss", "nats", "mine", "mine.Objective"))


def test_rates_in_the_progress_line_are_short() -> None:
    shown = [progress_items({"train/tokens_per_second": rate})[0] for rate in (0.4, 12.34, 1234.0, 2_345_678.0)]
    assert shown == ["0.4 tok/s", "12.3 tok/s", "1.2k tok/s", "2.3M tok/s"]


def test_a_scalar_without_a_row_fails_where_it_is_logged(tmp_path: Path) -> None:
    class Typo(TeacherTopK):
        def position_losses(self, *args: Any) -> Any:
            positions = super().position_losses(*args)
            positions.metrics["entropi"] = torch.zeros_like(positions.losses)
            return positions

    with pytest.raises(AssertionError, match="train/entropi is logged"):
        Run(tmp_path, objective=Typo(8), max_new_tokens=8).fit(1)


def test_charts_match_as_tensorboard_does() -> None:
    """Regular expressions match from a name's start; the mean over the benchmarks has a chart of its own."""
    charts = layout()["validation"]
    matched = {title: bool(re.match(patterns[0], "val/mean/pass@8")) for title, (_, patterns) in charts.items()}
    assert matched == {"pass@k, mean of the benchmarks": True, "pass@k": False, "length, tokens": False}


@pytest.mark.parametrize("progress", ["loss", "loss {:.3z}", "loss {", "loss {name}"])
def test_a_progress_item_that_shows_no_number_is_refused(progress: str) -> None:
    with pytest.raises(UsageError, match="metric 'my/metric': progress is '.*', but must be a format of a number"):
        register_metric(Metric("my/metric", "mine", "", "first", "mine.Objective", progress=progress))
    assert find_metric("my/metric") is None


def test_a_chart_that_is_only_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match="metric 'my/metric': chart is a str, but must be a Chart"):
        register_metric(Metric("my/metric", "mine", "", "first", "mine.Objective", chart="drift"))  # type: ignore[arg-type]
