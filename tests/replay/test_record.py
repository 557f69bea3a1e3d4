"""Recording of steps: files equal the step's data, and damaged files are refused."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opdlab.callbacks import PoolRecorder
from opdlab.errors import UsageError
from opdlab.objectives import FullDivergence, SampledTokenOPD
from opdlab.policies import AdapterConfig, LanguageModel, LocalTeacher
from opdlab.replay import read_record, record_folders
from opdlab.replay.record import trained_weights, write_record
from opdlab.replay.step_gradients import StepGradients
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]


class Watcher(pl.Callback):
    """Keeps the student before each step, and the norm that Lightning finds when it clips."""

    def __init__(self) -> None:
        self.students: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.position == 0:
            self.students.append({k: v.clone() for k, v in trained_weights(pl_module.student).items()})


def record_run(make_run: MakeRun, steps: list[int], max_steps: int, **options: Any) -> tuple[Run, Path, Watcher]:
    watcher = Watcher()
    recorder = PoolRecorder(steps=steps, **options.pop("recorder", {}))
    run = make_run(callbacks=(recorder, watcher), **options)
    trainer = run.fit(max_steps)
    assert trainer.log_dir is not None
    return run, Path(trainer.log_dir), watcher


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_record_is_what_the_step_used(make_run: MakeRun, accumulate: int) -> None:
    run, folder, watcher = record_run(make_run, [1, 3], 4, accumulate=accumulate, objective=SampledTokenOPD())
    assert list(record_folders(folder)) == [1, 3]
    for number, path in record_folders(folder).items():
        record = read_record(path)
        assert (record.number, record.facts.step) == (number, number - 1)
        assert len(record.batches) == accumulate
        assert record.facts.loss == run.recorder.steps[number]["train/loss"]  # equal to the bit
        assert float(sum(batch.shares.sum() for batch in record.batches)) == pytest.approx(1)
        record.load_weights(run.module.student)
        before = watcher.students[number - 1]
        assert all(torch.equal(v, before[k]) for k, v in trained_weights(run.module.student).items())
        assert record.age == (0 if number == 1 else 2)
        assert record.facts.reuse_epoch == (number - 1) // 2


def test_behavior_logprobs_that_the_step_fills_in_are_recorded(make_run: MakeRun) -> None:
    run, folder, _ = record_run(make_run, [1], 1, objective=SampledTokenOPD())
    record = read_record(record_folders(folder)[1])
    record.load_weights(run.module.student)
    rollouts = record.batches[0].rollouts
    with torch.no_grad():
        scored = run.module.student.score(rollouts)
        own = scored.padded(scored.statistics().logprobs)
    assert bool((own[rollouts.mask] < 0).any())
    assert torch.equal(rollouts.behavior_logprobs, own)


def test_hidden_states_of_a_narrow_teacher_are_recorded(make_run: MakeRun) -> None:
    teacher = LocalTeacher(TEACHER, dtype="bfloat16")
    run, folder, _ = record_run(make_run, [2], 2, objective=FullDivergence("jsd"), teacher=teacher)
    record = read_record(record_folders(folder)[2])
    (batch,) = record.batches
    states = batch.targets.hidden
    assert states is not None
    assert states.dtype == torch.bfloat16
    record.load_weights(run.module.student)
    replayed = StepGradients(run.module, record.batches, record.facts.step, nullcontext)
    gates = run.module.gate(replayed.inputs[0])
    assert replayed.losses([gates.weights]) == record.facts.losses


@pytest.mark.usefixtures("peft_pair")
def test_only_the_adapter_is_recorded(make_run: MakeRun) -> None:
    student = LanguageModel(STUDENT, adapter=AdapterConfig(r=2, target_modules=["q_proj"]))
    run, folder, watcher = record_run(make_run, [2], 2, student=student)
    record = read_record(record_folders(folder)[2])
    assert set(watcher.students[1]) == {n for n, p in student.named_parameters() if p.requires_grad}
    assert (record.folder / "weights.safetensors").stat().st_size < 20_000
    record.load_weights(run.module.student)
    assert all(torch.equal(v, watcher.students[1][k]) for k, v in trained_weights(student).items())


def test_the_newest_records_are_kept(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, folder, _ = record_run(make_run, [1, 2, 3, 4], 4, recorder={"keep_last": 2})
    assert list(record_folders(folder)) == [3, 4]
    (said,) = [message for message in caplog.messages if "MiB a step" in message]
    assert "2 records kept by the end" in said


def test_nothing_is_recorded_unless_asked(make_run: MakeRun) -> None:
    _, folder, _ = record_run(make_run, [1], 1, recorder={"enabled": False})
    assert not (folder / "pools").exists()


@pytest.mark.parametrize("options", [{"every_n_steps": 3}, {"steps": [3, 8]}])
def test_a_run_too_short_for_a_record_warns(make_run: MakeRun, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"save_pools is true, but nothing will be recorded: .* the last step is 2"):
        make_run(callbacks=(PoolRecorder(**options),)).fit(2)
    assert not list(tmp_path.rglob("pools"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"steps": [0, 3]}, r"steps is \[0, 3\]"),
        ({"keep_last": 0}, "keep_last is 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PoolRecorder(**options)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f / "rollouts.safetensors"), "cannot be read, it may have been changed or cut off"),
        (lambda f: (f / "rollouts.safetensors").unlink(), "cannot be read"),
        (lambda f: cut(f / "record.json"), "cannot be read"),
        (lambda f: (f / "record.json").write_text("[]"), "cannot be read"),
        (lambda f: change(f / "record.json", format=99), "has format 99"),
        (lambda f: change(f / "record.json", step="one"), "are not integers"),
        (lambda f: change(f / "record.json", losses=[1.0, 2.0]), "do not fit together"),
        (lambda f: change(f / "record.json", micro_batches=[{"temperature": 1.0}] * 2), "cannot be read"),
    ],
)
def test_damaged_records_are_refused(make_run: MakeRun, damage: Callable[[Path], None], words: str) -> None:
    _, folder, _ = record_run(make_run, [1], 1)
    path = record_folders(folder)[1]
    damage(path)
    with pytest.raises(UsageError, match=words):
        read_record(path)


@pytest.mark.usefixtures("peft_pair")
def test_weights_that_are_damaged_or_of_another_model_are_refused(make_run: MakeRun) -> None:
    run, folder, watcher = record_run(make_run, [1], 1)
    record = read_record(record_folders(folder)[1])
    student = LanguageModel(STUDENT, adapter=AdapterConfig(r=1, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="is of another model: model"):
        record.load_weights(student)
    cut(record.folder / "weights.safetensors")
    with pytest.raises(UsageError, match="weights.safetensors"):
        record.load_weights(run.module.student)
    narrow = {name: tensor[:1] for name, tensor in watcher.students[0].items()}
    write_record(record.folder, record.facts, record.batches, narrow)
    with pytest.raises(UsageError, match=r"torch.float32 \(1, 96\) in it and torch.float32 \(38, 96\)"):
        record.load_weights(run.module.student)


def test_every_kind_of_tensor_comes_back(make_run: MakeRun) -> None:
    _, folder, watcher = record_run(make_run, [1], 1)
    record = read_record(record_folders(folder)[1])
    batch = record.batches[0]
    assert batch.targets.support_ids is not None
    wide = replace(batch.targets, support_ids=batch.targets.support_ids.to(torch.uint16))
    judged = replace(batch.rollouts, correct=torch.ones(len(batch.rollouts), dtype=torch.int8), temperature=0.7)
    write_record(record.folder, record.facts, [replace(batch, targets=wide, rollouts=judged)], watcher.students[0])
    again = read_record(record.folder).batches[0]
    for ours, theirs in ((judged, again.rollouts), (wide, again.targets)):
        for name, value in ours.state_dict().items():
            other = getattr(theirs, name)
            same = torch.equal(value.int(), other.int()) if torch.is_tensor(value) else value == other
            assert same, name
            assert not torch.is_tensor(value) or value.dtype == other.dtype, name
