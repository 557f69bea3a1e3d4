"""The folder of a run: what is in it whatever the logger, and two runs at the same moment."""

import csv
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlab.cli import EXIT_USAGE, main
from opdlab.run_folder import RunFolder
from tests.cli.test_fit import SMALL

Opdlab = Callable[..., int]
NO_TEACHER = ("--model.evaluation.teacher", "false")

LOGGERS = '''
import os
from lightning.pytorch.loggers.logger import Logger


class Cloud(Logger):
    """A logger of another package: it has a folder by default, and fails when told to."""

    name, version = "cloud", "1"

    def __init__(self, save_dir: str = "cloud"):
        super().__init__()
        self.folder = save_dir
        os.makedirs(save_dir, exist_ok=True)

    @property
    def save_dir(self):
        return self.folder

    def log_hyperparams(self, *args, **options): ...

    def log_metrics(self, metrics, step=None):
        if os.path.exists("fail") and step == 2 and "train/loss" in metrics:
            raise RuntimeError("the cloud is gone")
'''


@pytest.fixture
def opdlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opdlab:
    """Run ``opdlab fit -c quickstart -c small …`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "lab_loggers.py").write_text(LOGGERS)
    return lambda *arguments: main(["fit", "-c", "quickstart", "-c", "small.yaml", *arguments])


def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def results_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def test_results_and_metrics_are_files_that_any_program_reads(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opdlab("--trainer.val_check_interval", "1", "--seed_everything", "3") == 0
    folder = tmp_path / "runs/quickstart/version_0"
    results, rows = results_of(folder), rows_of(folder)
    assert (results["state"], results["steps"], results["after_step"]) == ("finished", 2, 2)
    assert results["seeds"]["seed_everything"] == 3
    assert results["seconds"] > 0
    assert results["tokens"] > 0
    shown = capsys.readouterr().out
    for column in ("before", "after", "teacher"):
        assert f"{results[column]['toy/pass@1']['value']:.3f} ± " in shown
        assert results[column]["toy/pass@1"]["standard_error"] >= 0
    assert list(rows) == [0, 1, 2]
    assert rows[0]["train/loss"] == ""
    assert float(rows[2]["val/toy/pass@1"]) == results["after"]["toy/pass@1"]["value"]
    assert float(rows[2]["teacher/toy/pass@1"]) == results["teacher"]["toy/pass@1"]["value"]
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("train/loss", "val/toy/length", "gate/mean"):
        logged = {step: float(row[name]) for step, row in rows.items() if row[name]}
        assert logged == pytest.approx({event.step: event.value for event in events.Scalars(name)})


@pytest.mark.parametrize(
    "logger",
    [
        "false",
        "{class_path: lab_loggers.Cloud}",
        "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: tables}}",
        "[{class_path: lab_loggers.Cloud}, "
        "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: .}}]",
    ],
)
def test_the_folder_is_the_runs_whatever_the_logger(opdlab: Opdlab, tmp_path: Path, logger: str) -> None:
    (tmp_path / "logger.yaml").write_text(f"trainer: {{logger: {logger}}}")
    pages = ("--sample_logger.every_n_steps", "1", "--save_pools", "true", "--pool_recorder.every_n_steps", "1")
    with_logger = ("-c", "logger.yaml", *NO_TEACHER, *pages)
    for number in range(2):
        assert opdlab(*with_logger) == 0
        folder = tmp_path / f"runs/quickstart/version_{number}"
        for name in ("config.yaml", "metrics.csv", "results.json", "student", "rollouts", "pools", "checkpoints"):
            assert (folder / name).exists(), name
        assert (folder / "cloud").exists() == ("Cloud" in logger)
    assert opdlab(*with_logger, "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    assert results_of(tmp_path / "runs/quickstart/version_0")["steps"] == 2
    assert results_of(tmp_path / "runs/quickstart/version_1")["steps"] == 3
    assert list(rows_of(tmp_path / "runs/quickstart/version_1")) == [0, 1, 2, 3]


def test_a_saved_configuration_starts_a_run_of_its_own(opdlab: Opdlab, tmp_path: Path) -> None:
    assert opdlab(*NO_TEACHER) == 0
    folder = tmp_path / "runs/quickstart/version_0"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["fit", "-c", str(folder / "config.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    again = folder.with_name("version_1")
    assert rows_of(again)[2]["train/loss"] == rows_of(folder)[2]["train/loss"]
    assert (again / "config.yaml").read_text() == (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model.student.path", "no/such/model"),
        ("--data.reuse.batch_size", "3"),
        ("--data.train", "opdlab.data.JsonlProblems", "--data.train.path", "missing.jsonl"),
    ],
)
def test_a_refused_command_leaves_no_folder(opdlab: Opdlab, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert opdlab(*arguments) == EXIT_USAGE
    assert not (tmp_path / "runs").exists()


def test_two_runs_that_start_together_get_two_folders(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path).path.name, range(32)))
    assert sorted(made) == sorted(f"version_{number}" for number in range(8, 40))


def test_a_run_is_resumed_by_one_process_at_a_time(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opdlab(*NO_TEACHER) == 0
    folder = RunFolder(tmp_path / "runs/quickstart/version_0")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != "lock"}
    capsys.readouterr()
    with folder.in_use():
        assert opdlab("--ckpt_path", "last", "--trainer.max_steps", "3") == EXIT_USAGE
    assert "ckpt_path is of the run in runs/quickstart/version_0, which process" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.name != "lock"} == before
    assert opdlab("--ckpt_path", "last", "--trainer.max_steps", "3", *NO_TEACHER) == 0


def test_an_error_while_a_step_is_logged_leaves_no_hole(opdlab: Opdlab, tmp_path: Path) -> None:
    tensorboard = "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: events, name: ''}}"
    (tmp_path / "logger.yaml").write_text(f"trainer: {{logger: [{{class_path: lab_loggers.Cloud}}, {tensorboard}]}}")
    steps = ("-c", "logger.yaml", *NO_TEACHER, "--trainer.max_steps", "3", "--checkpoint.save_top_k=-1")
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="the cloud is gone"):
        opdlab(*steps)
    folder = tmp_path / "runs/quickstart/version_0"
    assert results_of(folder)["state"] == "failed"
    assert list(rows_of(folder)) == [0, 1]
    assert not (folder / "checkpoints/step-2.ckpt").exists()  # a checkpoint follows its step's metrics
    (tmp_path / "fail").unlink()
    (tmp_path / "runs/quickstart/version_0/cloud").rmdir()
    (tmp_path / "logger.yaml").write_text(f"trainer: {{logger: {tensorboard.replace('name', 'version: 0, name')}}}")
    assert opdlab(*steps, "--ckpt_path", "last") == 0
    assert results_of(folder)["state"] == "finished"
    assert list(rows_of(folder)) == [0, 1, 2, 3]
    events = EventAccumulator(str(tmp_path / "events/version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert opdlab(*NO_TEACHER, "--trainer.max_steps", "3") == 0
    whole = rows_of(folder.with_name("version_1"))
    timed = {name for name in whole[2] if name.startswith("time/") or name.endswith("per_second")}
    assert {k: v for k, v in rows_of(folder)[2].items() if k not in timed} == {
        k: v for k, v in whole[2].items() if k not in timed
    }


def test_a_collapsed_run_says_so(opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collapse = ("--model.optimizer.lr", "1000", "--trainer.gradient_clip_val", "null", "--trainer.max_steps", "6")
    assert opdlab(*collapse, *NO_TEACHER) == 0
    results = results_of(tmp_path / "runs/quickstart/version_0")
    assert results["state"] == "collapsed"  # it has gone on to its end
    assert results["steps"] == 6
    assert results["warnings"]
    assert all(message.startswith("collapse: ") for message in results["warnings"])
    capsys.readouterr()
    assert opdlab(*collapse, "--collapse_guard.stop", "true", *NO_TEACHER) == 3
    folder = tmp_path / "runs/quickstart/version_1"
    results = results_of(folder)
    assert results["state"] == "collapsed"
    assert results["steps"] < 6
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert list((folder / "rollouts").glob("*.html"))
    assert "training has collapsed" in capsys.readouterr().err


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_start", "on_validation_end"])
def test_a_kill_between_a_checkpoint_and_the_evaluation_after_it(opdlab: Opdlab, tmp_path: Path, hook: str) -> None:
    """Before the evaluation, within it, and after its metrics were logged; that after training is due once more too."""
    (tmp_path / f"lab_killed_{hook}.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Killed(Callback):\n"
        f"    def {hook}(self, trainer, *_):\n"
        "        if trainer.global_step == 2:\n"
        "            raise RuntimeError('killed')\n"
    )
    steps = (*NO_TEACHER, "--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--checkpoint.save_top_k=-1")
    with pytest.raises(RuntimeError, match="killed"):
        opdlab(*steps, f"--trainer.callbacks+=lab_killed_{hook}.Killed")
    folder = tmp_path / "runs/quickstart/version_0"
    assert (folder / "checkpoints/step-2.ckpt").exists()
    for _ in range(2):
        assert opdlab(*steps, "--ckpt_path", "last") == 0
    assert opdlab(*steps) == 0
    whole = rows_of(folder.with_name("version_1"))
    assert set(whole) == {0, 1, 2, 3, 4, 5}
    timed = {name for name in whole[2] if name.startswith("time/") or name.endswith("per_second")}
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows_of(folder).values()] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole.values()
    ]
    curves = [EventAccumulator(str(folder.with_name(f"version_{number}"))) for number in range(2)]
    for events in curves:
        events.Reload()
    for name in set(curves[1].Tags()["scalars"]) - timed:
        killed, other = ([(event.step, event.value) for event in events.Scalars(name)] for events in curves)
        assert killed == other, name


def test_a_refused_resume_changes_no_file(opdlab: Opdlab, tmp_path: Path) -> None:
    assert opdlab(*NO_TEACHER) == 0
    folder = tmp_path / "runs/quickstart/version_0"
    before = {name: (folder / name).read_bytes() for name in ("results.json", "metrics.csv", "config.yaml")}
    refused = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--trainer.max_steps", "3")
    assert opdlab("--ckpt_path", "last", *refused) == EXIT_USAGE
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_resume_is_refused_before_models_are_loaded(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs no model is compared first: the student's folder does not exist, and is never missed."""
    assert opdlab("--trainer.max_steps", "4", "--checkpoint.save_top_k", "-1", *NO_TEACHER) == 0
    checkpoints = tmp_path / "runs/quickstart/version_0/checkpoints"
    gone = ("--trainer.max_steps", "9", "--model.student.path", "gone")
    inside, end = str(checkpoints / "step-1.ckpt"), str(checkpoints / "step-4.ckpt")
    never = [
        ("--trainer.max_steps 0", "trainer.max_steps is 0, but ckpt_path has done"),
        ("--model.optimizer torch.optim.SGD --model.optimizer.lr 0.1", "model.optimizer is torch.optim.sgd.SGD"),
        ("--model.optimizer.lr 0.5", "model.optimizer.lr is 0.5, but"),
        ("--model.lr_scheduler StepLR --model.lr_scheduler.step_size 3", "model.lr_scheduler is torch.optim"),
        ("--data.seed 5", "data.seed (seed_everything, if it is null) is 5, but 0 in ckpt_path"),
        ("--data.max_prompt_tokens 99", "data.max_prompt_tokens is 99, but"),
    ]
    at_the_end = [
        ("--model.sampling.temperature 0.5", "model.sampling.temperature is 0.5, but"),
        ('--model.mask_first ["1"]', "model.mask_first is ['1'], but []"),
        ("--model.objective sampled_token", "model.objective is opdlab.objectives"),
        ("--model.objective.k 3", "model.objective.k is 3, but"),
        ("--data.reuse.prompts_per_pool 2", "data.reuse.prompts_per_pool is 2, but"),
        ("--trainer.devices 3", "which 3 processes (trainer.devices * trainer.num_nodes) with"),
        ("--data.reuse.batch_size 8", "data.reuse.batch_size is 8, but the checkpoint is inside a pass"),
    ]
    capsys.readouterr()
    for path, cases in ((inside, never + at_the_end), (end, never)):
        for arguments, words in cases:
            assert opdlab("--ckpt_path", path, *gone, *arguments.split()) == EXIT_USAGE
            error = capsys.readouterr().err
            assert words in error, error
            assert "gone" not in error
    # What may change there is told only after the models: here, that one is missing.
    for arguments, _ in at_the_end[:4]:
        assert opdlab("--ckpt_path", end, *gone, *arguments.split()) == EXIT_USAGE
        assert "gone" in capsys.readouterr().err
