"""GateMonitor on real runs of the toy world, read back as TensorBoard reads them."""

import csv
import dataclasses
import io
import re
import signal
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from opdlab.callbacks import CollapseGuard, GateMonitor, SampleLogger, gate_monitor
from opdlab.callbacks.gate_monitor import DrawingTime
from opdlab.callbacks.step_callback import StepCallback
from opdlab.diagnostics import StepTrace, gate_plots
from opdlab.diagnostics.run_history import add_to_age_table, new_age_table, read_ages
from opdlab.diagnostics.trace import to_host
from opdlab.errors import Stopped, UsageError
from opdlab.gating import DriftGate, GateInputs, build_gate
from opdlab.loggers import layout
from opdlab.objectives import SampledTokenOPD, SupportDivergence
from opdlab.training import join_gate_inputs
from tests.test_resume import SaveAt
from tests.toy_run import Run

MakeRun = Callable[..., Run]


class Traces(StepCallback):
    """Keeps the traces of every step, by the number of steps taken."""

    def __init__(self) -> None:
        super().__init__(1)
        self.steps: dict[int, list[StepTrace]] = {}

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        self.steps[trainer.global_step] = list(traces)


class ThirdsGate(DriftGate):
    """A stranger's gate: thirds of the response."""

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        return 3 * (inputs.mask.cumsum(1) - 1) // inputs.mask.sum(1, keepdim=True).clamp(min=1)


def fit(make_run: MakeRun, folder: Path, steps: int, monitor: GateMonitor, **options: Any) -> tuple[Run, Traces]:
    """Train with the monitor and a TensorBoard log in ``folder``."""
    traces = Traces()
    logger = TensorBoardLogger(str(folder), name="", version="")
    gate = options.pop("custom_gate", None)
    ckpt_path, save_at = options.pop("ckpt_path", None), options.pop("save_at", None)
    run = make_run(callbacks=(monitor, traces, *options.pop("callbacks", ())), **options)
    if gate is not None:
        run.module.gate = gate
    if save_at is not None:
        run.trainer_options["callbacks"].append(SaveAt(*save_at))
    run.fit(steps, logger=logger, ckpt_path=ckpt_path)
    return run, traces


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("histograms", "scalars", "images", "tensors"), 0)
    )
    events.Reload()
    return events


def scalars_at(events: EventAccumulator, step: int, *prefixes: str) -> dict[str, float]:
    return {
        tag: event.value
        for tag in events.Tags()["scalars"]
        if tag.startswith(prefixes)
        for event in events.Scalars(tag)
        if event.step == step
    }


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("gate", ["block32", "span", "thirds"])
def test_every_block_has_a_histogram_of_its_weights(
    make_run: MakeRun, tmp_path: Path, gate: str, accumulate: int
) -> None:
    again = ThirdsGate(tau=5.0) if gate == "thirds" else build_gate(gate, tau=5.0)
    name = "block32" if gate == "thirds" else gate
    custom = ThirdsGate(tau=5.0) if gate == "thirds" else None
    monitor = GateMonitor(every_n_steps=2)
    run, traces = fit(make_run, tmp_path, 5, monitor, gate=name, accumulate=accumulate, custom_gate=custom)
    again.setup(run.module.student.tokenizer)
    events = read(tmp_path)
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for tag in events.Tags()["histograms"]:
        for event in events.Histograms(tag):
            found[event.step][tag] = event.histogram_value
    assert list(found) == [2, 4]
    for step, histograms in found.items():
        assert len(traces.steps[step]) == accumulate
        inputs = join_gate_inputs([trace.inputs for trace in traces.steps[step]])
        gates = again(inputs)
        blocks = [tag for tag in histograms if tag.startswith("gate/block/")]
        assert blocks == [f"gate/block/{n:03d}" for n in range(int(gates.segment_ids.max()) + 1)]
        assert len(blocks) >= 2
        for n, tag in enumerate(blocks):
            weights = gates.weights[gates.segment_ids == n].double()
            assert histograms[tag].num == len(weights)
            assert sum(histograms[tag].bucket) == len(weights)
            assert histograms[tag].sum / len(weights) == pytest.approx(float(weights.mean()), rel=1e-5)
        everything = {
            "gate/weights": gates.weights,
            "gate/token_drift": inputs.drift,
            "gate/segment_drift": gates.segment_drift,
        }
        for tag, values in everything.items():
            valid = values[inputs.mask.bool()].double()
            assert histograms[tag].num == len(valid)
            assert histograms[tag].sum == pytest.approx(float(valid.sum()), rel=1e-4, abs=1e-4)
            assert histograms[tag].sum_squares == pytest.approx(float(valid.square().sum()), rel=1e-4, abs=1e-4)
            assert histograms[tag].min == pytest.approx(float(valid.min()), rel=1e-5)
            below = [int((valid <= limit).sum()) for limit in histograms[tag].bucket_limit]
            # Values on an edge may be on either side.
            assert np.cumsum(histograms[tag].bucket) == pytest.approx(below, abs=2)


def test_segments_beyond_the_limit_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run, tmp_path, 1, GateMonitor(every_n_steps=1, max_blocks=3), gate="token")
    tags = read(tmp_path).Tags()["histograms"]
    assert [tag for tag in tags if "block" in tag] == ["gate/block/000", "gate/block/001", "gate/block/002"]


def test_effects_agree_with_what_the_module_logs(make_run: MakeRun, tmp_path: Path) -> None:
    run, _ = fit(make_run, tmp_path, 4, GateMonitor(every_n_steps=1), accumulate=2, reduction="sequence_mean")
    events = read(tmp_path)
    for step in (2, 3, 4):
        found = scalars_at(events, step, "gate/")
        gated = found["gate/loss_ratio"] * found["gate/ungated_loss"]
        assert gated == pytest.approx(run.recorder.steps[step]["train/loss"], rel=1e-4)
        assert 0 < found["gate/gradient_cosine"] < 1
        assert -1 <= found["gate/correlation/teacher_gap"] <= 1
    # With a fresh snapshot and a fresh buffer all weights are 1.
    fresh = scalars_at(events, 1, "gate/")
    assert fresh["gate/gradient_cosine"] == pytest.approx(1, abs=1e-6)
    assert fresh["gate/loss_ratio"] == pytest.approx(1, abs=1e-4)
    assert "gate/correlation/position_loss" not in fresh


def test_gradients_are_asked_for_at_monitored_steps_only(make_run: MakeRun, tmp_path: Path) -> None:
    _, traces = fit(make_run, tmp_path, 5, GateMonitor(every_n_steps=2), accumulate=2)
    asked = {step: [trace.gradient_norms is not None for trace in parts] for step, parts in traces.steps.items()}
    assert asked == {step: [step % 2 == 0] * 2 for step in range(1, 6)}


class Alive(Callback):
    """Counts the traces that are still there when an optimizer step begins."""

    def __init__(self) -> None:
        self.traces: list[weakref.ref[StepTrace]] = []
        self.counts: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch.position == 0:
            self.counts.append(sum(trace() is not None for trace in self.traces))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.traces.append(weakref.ref(outputs["trace"]))


def test_traces_are_let_go_with_their_step(make_run: MakeRun, tmp_path: Path) -> None:
    alive = Alive()  # first, so that it counts before the others drop their traces
    make_run(callbacks=(alive, GateMonitor(every_n_steps=1), SampleLogger(every_n_steps=2)), accumulate=2).fit(4)
    assert alive.counts == [0] * 4
    assert len(alive.traces) == 8


@pytest.mark.parametrize("keeps", [False, True])
def test_targets_stay_with_those_that_ask_for_them(make_run: MakeRun, keeps: bool) -> None:
    class Own(StepCallback):
        keeps_targets = keeps

        def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
            found.extend(trace.targets is not None for trace in traces)

    found: list[bool] = []
    make_run(callbacks=(Own(1),), accumulate=2).fit(1)
    assert found == [keeps] * 2


# A buffer lasts 4 steps, two passes of 2; the snapshot is refreshed after every 3. Buffers begin at steps 0, 4, 8, 12
# and are sampled from the snapshots of steps 0, 3, 6, 12.
AGES = [0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1]
EPOCHS = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


def test_ages_are_those_counted_by_hand(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run, tmp_path, len(AGES), GateMonitor(every_n_steps=1))
    events = read(tmp_path)
    for step, (age, epoch) in enumerate(zip(AGES, EPOCHS, strict=True), start=1):
        found = scalars_at(events, step, "age/drift/", "reuse_epoch/drift/")
        assert set(found) == {f"age/drift/{age:03d}", f"reuse_epoch/drift/{epoch}"}
        assert all(value < 1e-6 if age == 0 else value > 1e-4 for value in found.values())
        spread = scalars_at(events, step, "age/weight_std/")
        assert all(value < 1e-5 if age == 0 else value > 1e-4 for value in spread.values())


def by_age(traces: Traces, steps: range) -> dict[str, float]:
    """Metrics by age and epoch, from the kept traces."""
    groups: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for step in steps:
        for trace in traces.steps[step]:
            for row, age in enumerate(trace.age.tolist()):
                valid = trace.inputs.mask[row].bool()
                values = torch.stack([trace.inputs.drift[row].abs()[valid], trace.gates.weights[row][valid]])
                groups["age", f"{age:03d}"].append(values)
                groups["reuse_epoch", str(trace.reuse_epoch)].append(values)
    metrics = {}
    for (family, place), pieces in groups.items():
        drift, weights = torch.cat(pieces, 1).double().numpy()
        metrics[f"{family}/drift/{place}"] = drift.mean()
        metrics[f"{family}/weight_mean/{place}"] = weights.mean()
        metrics[f"{family}/weight_std/{place}"] = weights.std()
    return metrics


@pytest.mark.parametrize("accumulate", [1, 4])
def test_ages_are_of_all_steps_since_the_last_that_was_shown(
    make_run: MakeRun, tmp_path: Path, accumulate: int
) -> None:
    _, traces = fit(make_run, tmp_path, 10, GateMonitor(every_n_steps=5), accumulate=accumulate)
    events = read(tmp_path)
    for last in (5, 10):
        found = scalars_at(events, last, "age/", "reuse_epoch/")
        assert found == pytest.approx(by_age(traces, range(last - 4, last + 1)), rel=1e-4, abs=1e-6)
        assert len(found) > 12


# After step 7, and within step 7: its second micro-batch of 4.
@pytest.mark.parametrize(("accumulate", "micro_batch"), [(1, 7), (4, 26)])
def test_a_resumed_run_shows_the_whole(make_run: MakeRun, tmp_path: Path, accumulate: int, micro_batch: int) -> None:
    path = tmp_path / "stopped.ckpt"
    whole, resumed = GateMonitor(every_n_steps=5), GateMonitor(every_n_steps=5)
    fit(make_run, tmp_path / "a", 11, whole, accumulate=accumulate, save_at=(path, micro_batch))
    fit(make_run, tmp_path / "b", 11, resumed, accumulate=accumulate, ckpt_path=path)
    for step in (10,):
        expected = scalars_at(read(tmp_path / "a"), step, "age/", "reuse_epoch/", "gate/")
        assert scalars_at(read(tmp_path / "b"), step, "age/", "reuse_epoch/", "gate/") == expected
        assert expected
    first, second = whole.state_dict(), resumed.state_dict()
    assert first["history"]["steps"] == second["history"]["steps"] == [5, 10]
    for name in ("ages", "recent_ages"):
        assert torch.equal(first[name], second[name])
        assert first[name].any()
    torch.testing.assert_close(first["history"]["values"], second["history"]["values"], equal_nan=True)


def test_a_step_that_was_resumed_within_is_shown_whole(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    options: dict[str, Any] = {"accumulate": 4, "gate": "block32"}
    fit(make_run, tmp_path / "a", 8, GateMonitor(every_n_steps=1), save_at=(path, 26), **options)
    fit(make_run, tmp_path / "b", 8, GateMonitor(every_n_steps=1), ckpt_path=path, **options)
    whole, resumed = read(tmp_path / "a"), read(tmp_path / "b")
    for step in (7, 8):
        expected = scalars_at(whole, step, "gate/", "age/")
        assert scalars_at(resumed, step, "gate/", "age/") == expected
        assert "gate/correlation/teacher_gap" in expected


def test_a_monitor_used_twice_begins_anew(make_run: MakeRun, tmp_path: Path) -> None:
    monitor = GateMonitor(every_n_steps=1)
    for folder in ("a", "b"):
        fit(make_run, tmp_path / folder, 2, monitor)
    assert monitor.state_dict()["history"]["steps"] == [1, 2]


def test_pictures_are_there_at_the_end(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run, tmp_path, 3, GateMonitor(every_n_steps=2))
    events = read(tmp_path)
    pictures = ["gate/heat_map/weight", "gate/heat_map/drift", "gate/by_age", "position/curves"]
    assert events.Tags()["images"] == pictures
    for tag in pictures:
        (event,) = events.Images(tag)
        assert event.step == 3
        assert event.encoded_image_string.startswith(b"\x89PNG")
        assert event.width > 400


class StopAt(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise Stopped


def test_a_stopped_run_has_its_pictures(make_run: MakeRun, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(make_run, tmp_path, 9, GateMonitor(every_n_steps=2), callbacks=(StopAt(),))
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    (event,) = read(tmp_path).Images("gate/heat_map/weight")
    assert event.step == 2


def test_the_picture_by_age_is_of_all_steps(make_run: MakeRun, tmp_path: Path) -> None:
    _, traces = fit(make_run, tmp_path, 7, GateMonitor(every_n_steps=3))  # the last step is not a logged one
    table = new_age_table()
    for parts in traces.steps.values():
        for trace in parts:
            add_to_age_table(table, trace)
    (event,) = read(tmp_path).Images("gate/by_age")
    expected = gate_plots.render(gate_plots.by_age(read_ages(table)["age"]))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), expected)


def test_drawing_keeps_to_its_share_of_the_time() -> None:
    clock = 0.0
    time = DrawingTime(clock=lambda: clock)
    drawn = []
    while clock < 100_000:
        clock += 10.0
        if time.may_draw():
            with time.drawing():
                clock += 2.0
            drawn.append(clock)
            assert 2.0 * len(drawn) <= 0.005 * clock or len(drawn) == 1
    assert drawn[0] == pytest.approx(212, abs=15)  # the first drawing is expected to take a second
    assert all(later >= 1.05 * earlier for earlier, later in pairwise(drawn))
    assert 50 < len(drawn) < 120


def test_the_layout_can_be_read(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run, tmp_path, 3, GateMonitor(every_n_steps=1), objective=SampledTokenOPD())
    events = read(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    written = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in written.category] == list(layout())
    scalars = set(events.Tags()["scalars"])
    margins = [chart.margin for category in written.category for chart in category.chart if chart.HasField("margin")]
    assert [[s.value, s.lower, s.upper] for m in margins for s in m.series] == [["gate/mean", "gate/min", "gate/max"]]
    assert {"gate/mean", "gate/min", "gate/max"} <= scalars


def test_every_scalar_has_a_chart_and_every_chart_a_scalar(make_run: MakeRun, tmp_path: Path) -> None:
    """Regular expressions match from a tag's start, as in TensorBoard's plugin."""
    tags: set[str] = {"rollout/accuracy", "val/mean/pass@1", "val/toy/pass@8", "val/toy/length", "train/reward_share"}
    # Of a sampler with log-probabilities of its own.
    tags |= {f"train/sampler_{name}" for name in ("gap", "gap_max", "correction", "correction_share")}
    objectives = (None, SampledTokenOPD(baseline="support_kl", k=4), SupportDivergence(support="union", k=4))
    for number, objective in enumerate(objectives):
        folder = tmp_path / str(number)
        fit(make_run, folder, 3, GateMonitor(every_n_steps=1), objective=objective, callbacks=(CollapseGuard(),))
        tags |= set(read(folder).Tags()["scalars"])
    charts = [chart for charts in layout().values() for chart in charts.values()]
    patterns = [pattern for _, patterns in charts for pattern in patterns]
    for pattern in patterns:
        assert any(re.match(pattern, tag) for tag in tags), pattern
    for tag in tags:
        if tag.startswith(("gate/", "age/", "position/", "reuse_epoch/", "train/drift", "val/mean")):
            assert any(re.match(pattern, tag) for pattern in patterns), tag


def test_other_loggers_get_the_scalars(make_run: MakeRun, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="csv")
    run = make_run(callbacks=(GateMonitor(every_n_steps=2),))
    run.fit(4, logger=logger)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("gate/gradient_cosine")]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["age/drift/002"]) > 0
    entropies = [float(rows[1][f"position/entropy/{n:02d}"]) for n in range(32)]
    assert all(value > 0 for value in entropies)


def test_a_run_without_a_logger_does_no_work(make_run: MakeRun) -> None:
    traces = Traces()
    make_run(callbacks=(GateMonitor(every_n_steps=1), traces)).fit(1, logger=False)
    assert traces.steps[1][0].gradient_norms is None


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="every_n_steps is 0"):
        GateMonitor(every_n_steps=0)
    with pytest.raises(UsageError, match="max_blocks is 0"):
        GateMonitor(max_blocks=0)


# -- device operations -----------------------------------------------------------------------------------------------


def without_values(trace: StepTrace, mode: FakeTensorMode) -> StepTrace:
    def fake(tensor: Any) -> Any:
        return mode.from_tensor(tensor) if isinstance(tensor, Tensor) else tensor

    def fields(value: Any) -> dict[str, Any]:
        return {f.name: fake(getattr(value, f.name)) for f in dataclasses.fields(value)}

    parts: dict[str, Any] = {
        "rollouts": trace.rollouts.map(fake),
        "inputs": dataclasses.replace(trace.inputs, **fields(trace.inputs)),
        "gates": dataclasses.replace(trace.gates, **fields(trace.gates)),
    }
    return dataclasses.replace(trace, **{**fields(trace), **parts})


def test_one_copy_at_a_monitored_step_and_none_at_others(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that have no values, as those of an accelerator have none yet: whoever reads one gets an error.

    ``to_host`` is patched, because only it may hand out values, which there are none of: ones instead. Within it copies
    are counted.
    """
    run, kept = fit(make_run, tmp_path, 3, GateMonitor(every_n_steps=1), accumulate=2)
    copies: list[int] = []
    num_copies, copy = 0, Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        nonlocal num_copies
        num_copies += 1
        return copy(tensor)

    def with_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = to_host(tensors)
        return {name: torch.ones(tensor.shape, dtype=torch.float64) for name, tensor in found.items()}

    monkeypatch.setattr(Tensor, "cpu", counted)
    monkeypatch.setattr(gate_monitor, "to_host", with_values)
    monitor = GateMonitor(every_n_steps=3)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # for constants
    state = monitor.state_dict()
    monitor.load_state_dict({**state, "recent_ages": mode.from_tensor(state["recent_ages"])})
    for trace in [trace for parts in kept.steps.values() for trace in parts]:
        position = len(copies) % 2
        step = trace.step + position
        trainer: Any = SimpleNamespace(is_global_zero=True, loggers=[DummyLogger()], global_step=step, world_size=1)
        batch = SimpleNamespace(position=position, micro_batches=(1, 2))
        before = num_copies
        monitor.on_train_batch_end(trainer, run.module, {"trace": without_values(trace, mode)}, batch, 0)
        copies.append(num_copies - before)

    assert copies == [0, 0, 0, 0, 0, 1]
    assert monitor.state_dict()["history"]["steps"] == [3]


def test_tensors_without_values_notice_who_reads_them() -> None:
    with FakeTensorMode():
        tensor = torch.ones(3)
        for reading in (
            lambda: tensor.sum().item(),
            lambda: tensor.tolist(),
            lambda: bool(tensor.any()),
            lambda: tensor[tensor > 0],
            lambda: tensor.nonzero(),
            lambda: torch.bincount(tensor.long()),
            lambda: tensor.numpy(),
        ):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
                reading()


def test_means_of_the_heat_map_are_those_of_the_blocks(make_run: MakeRun, tmp_path: Path) -> None:
    monitor = GateMonitor(every_n_steps=2)
    _, traces = fit(make_run, tmp_path, 4, monitor, accumulate=2)
    values = monitor.state_dict()["history"]["values"]
    assert values.shape == (2, 64, 2)
    for column, step in enumerate((2, 4)):
        parts = traces.steps[step]
        for n in (0, 1):
            chosen = [trace.gates.segment_ids == n for trace in parts]
            weights = torch.cat([t.gates.weights[c] for t, c in zip(parts, chosen, strict=True)])
            drift = torch.cat([t.inputs.drift[c] for t, c in zip(parts, chosen, strict=True)])
            np.testing.assert_allclose(values[0, n, column], weights.mean(), rtol=1e-5)
            np.testing.assert_allclose(values[1, n, column], drift.abs().mean(), rtol=1e-4)
    assert values[:, 2:].isnan().all()
