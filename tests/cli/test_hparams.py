"""The HParams tab, read back as TensorBoard's own plugin reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from opdlab.cli import main
from tests.cli.test_fit import SMALL

RUNS = Path("runs/quickstart")
ALL_STATUSES = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]

# Enough for metrics that are not 0, and that training changes.
LIVELY = (
    *("--model.sampling.max_new_tokens", "176", "--model.eval_sampling.max_new_tokens", "176"),
    *("--model.eval_sampling.num_samples", "4", "--data.benchmarks.toy.num_problems", "8"),
    *("--model.optimizer.lr", "2e-3"),
)

Fit = Callable[..., int]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run ``opdlab fit -c quickstart -c small …`` in an empty folder; the teacher is not evaluated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *more: main(
        ["fit", "-c", "quickstart", "-c", "small.yaml", "--model.evaluation.teacher", "false", *more]
    )


class Tab:
    """What the tab shows of all runs: columns, and by run its hyperparameters and metrics."""

    def __init__(self) -> None:
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(RUNS))
        multiplexer.Reload()
        context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(RUNS))))
        experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
        self.columns = [info.name for info in experiment.hparam_infos]
        self.metric_columns = [info.name.tag for info in experiment.metric_infos]
        request = api_pb2.ListSessionGroupsRequest(slice_size=10, allowed_statuses=ALL_STATUSES)
        groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
        self.sessions = {group.name: [session.name for session in group.sessions] for group in groups}
        self.values: dict[str, dict[str, Any]] = {
            group.name: {key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()}
            for group in groups
        }
        self.metrics = {
            group.name: {metric.name.tag: metric.value for metric in group.metric_values} for group in groups
        }


def scalars(run: str, tag: str) -> list[float]:
    events = EventAccumulator(str(RUNS / run))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def test_hyperparameters_stand_beside_the_last_pass_at_k(fit: Fit) -> None:
    assert fit("--model.gate", "span", "--model.gate.tau", "2.5", *LIVELY) == 0
    tab = Tab()
    assert tab.sessions == {"version_0": ["version_0"]}
    values = tab.values["version_0"]
    config = yaml.safe_load((RUNS / "version_0/config.yaml").read_text())
    assert (values["gate"], values["gate.tau"], values["gate.statistic"]) == ("span", 2.5, "signed_mean")
    assert values["gate.normalization"] == "mean"
    assert not {"gate.rho", "gate.low", "gate.high"} & set(values)  # of other normalizations
    assert (values["objective"], values["objective.k"]) == ("teacher_topk", 32)
    assert values["lr"] == pytest.approx(config["model"]["optimizer"]["init_args"]["lr"])
    assert (values["optimizer"], values["lr_scheduler"]) == ("AdamW", "LinearLR")
    assert (values["reuse.epochs"], values["reuse.batch_size"], values["reuse.prompts_per_pool"]) == (2, 4, 4)
    assert (values["refresh.every_n_steps"], values["sampling.max_new_tokens"]) == (8, 176)
    assert (values["max_steps"], values["accumulate"], values["clip"]) == (2, 1, 1)
    # The last two are null in the configuration, and follow the first.
    assert (values["seed"], values["data.seed"], values["evaluation.seed"]) == (0, 0, 0)
    assert values["student"] == config["model"]["student"]["init_args"]["path"]
    assert values["teacher"] == config["model"]["teacher"]["init_args"]["path"]
    assert values["precision"] == "32-true"
    assert set(values) <= set(tab.columns)
    assert tab.columns[:5] == ["gate", "gate.tau", "lr", "objective", "reuse.epochs"]  # shown at first
    assert tab.metric_columns == ["val/mean/pass@2", "val/mean/pass@1", "val/toy/pass@2", "val/toy/pass@1"]
    for tag in tab.metric_columns:
        before, *_, last = scalars("version_0", tag)
        assert before != last
        assert tab.metrics["version_0"][tag] == last
    events = EventAccumulator(str(RUNS / "version_0"))
    events.Reload()
    assert "hp_metric" not in events.Tags()["scalars"]


def test_a_run_that_was_killed_and_resumed_is_one_session(fit: Fit) -> None:
    assert fit("--trainer.val_check_interval", "1", *LIVELY) == 0
    killed = sorted((RUNS / "version_0").glob("events.out.tfevents.*"))
    events = killed[-1]
    events.write_bytes(events.read_bytes()[:-7])  # left by a kill in the middle of writing
    before = scalars("version_0", "val/mean/pass@2")
    assert fit("--ckpt_path", "last", "--trainer.max_steps", "4", *LIVELY) == 0
    after = scalars("version_0", "val/mean/pass@2")
    assert after[: len(before)] == before
    assert after[-1] != before[-1]
    tab = Tab()
    assert tab.sessions == {"version_0": ["version_0"]}
    assert tab.values["version_0"]["gate"] == "block64"
    assert tab.metrics["version_0"]["val/mean/pass@2"] == after[-1]


def test_runs_with_other_options_stand_side_by_side(fit: Fit) -> None:
    assert fit("--trainer.max_steps", "1", "--model.gate.normalization", "clipped") == 0
    assert fit("--model.objective", "sampled_token", "--model.objective.clip", "0.3", "--model.gate", "none") == 0
    tab = Tab()
    assert set(tab.sessions) == {"version_0", "version_1"}
    assert {"objective.k", "objective.clip", "gate.tau"} <= set(tab.columns)  # whichever run TensorBoard reads
    assert "objective.clip" not in tab.values["version_0"]
    assert tab.values["version_1"]["objective.clip"] == 0.3
    assert "objective.k" not in tab.values["version_1"]
    assert tab.values["version_0"]["gate.high"] == 2.0
    assert not [name for name in tab.values["version_1"] if name.startswith("gate.")]  # `none` uses no option
    assert set(tab.metrics["version_0"]) == set(tab.metrics["version_1"]) == set(tab.metric_columns)


def test_the_columns_do_not_depend_on_the_run(fit: Fit) -> None:
    columns = []
    for objective in ("teacher_topk", "sampled_token"):
        assert fit("--model.objective", objective, "--trainer.max_steps", "1") == 0
        columns.append(Tab().columns)
        (RUNS / "version_0").rename(f"{objective}")
    assert columns[0] == columns[1]


class Look(Callback):
    """Reads the tab after each training step."""

    seen: ClassVar[list[Tab]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(Tab())


def test_the_tab_is_filled_while_the_run_goes_on(fit: Fit) -> None:
    Look.seen.clear()
    assert fit("--trainer.max_steps", "1", f"--trainer.callbacks+={__name__}.Look") == 0
    (tab,) = Look.seen
    assert tab.values["version_0"]["gate"] == "block64"
    assert tab.metrics["version_0"]["val/mean/pass@2"] == scalars("version_0", "val/mean/pass@2")[0]


def test_other_loggers_get_the_same_values(fit: Fit, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps", "1", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv") == 0
    (file,) = (tmp_path / "csv").rglob("hparams.yaml")
    assert yaml.safe_load(file.read_text())["gate"] == "block64"
