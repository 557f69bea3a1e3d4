"""Signals and full disks: a run stops within a step or a sampling call, says how to go on, and loses nothing."""

import csv
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opdlab.checkpoints import check_checkpoint
from opdlab.cli import main
from opdlab.cli.commands import COMMANDS, EXIT_FAILED
from tests.children import run_child
from tests.stops import stopper

ROOT = Path(__file__).parents[2]
SMALL = """
trainer: {max_steps: 6, val_check_interval: 3, enable_progress_bar: false, enable_model_summary: false}
model:
  sampling: {max_new_tokens: 12}
  eval_sampling: {num_samples: 2, max_new_tokens: 12, batch_size: 4}
  evaluation: {pass_at: [1, 2]}
data:
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 4}}
  benchmarks:
    toy: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 4, split: held_out}}
  reuse: {prompts_per_pool: 4, epochs: 2, batch_size: 4}
  eval_batch_size: 2
checkpoint: {every_n_train_steps: 100}
gate_monitor: {every_n_steps: 1}
"""
Fit = Callable[..., int]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fit]:
    """Run ``opdlab fit -c quickstart -c small …``: an epoch is a buffer of 4 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield lambda *arguments, command="fit": main([command, "-c", "quickstart", "-c", "small.yaml", *arguments])
    for signum, handler in before.items():  # Lightning leaves Ctrl-C ignored
        signal.signal(signum, handler)


def left_behind(run: Path) -> dict[str, Any]:
    """Return what a run left: weights, sample lines, and metrics except those that measure time."""
    with (run / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    timed = re.compile("time/|seconds|per_second")
    return {
        "metrics": [{name: value for name, value in row.items() if not timed.search(name)} for row in rows],
        "weights": (run / "student/model.safetensors").read_bytes(),
        "samples": {path.relative_to(run): path.read_text() for path in run.glob("evaluations/*/*.jsonl")},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(SMALL)
    arguments = ["-c", "quickstart", "-c", str(folder / "small.yaml"), f"--trainer.default_root_dir={folder}"]
    assert main(["fit", *arguments]) == 0
    return left_behind(folder / "version_0")


@pytest.mark.parametrize(
    ("place", "name", "count", "said"),
    [
        ("setup", "SIGTERM", 1, r"; to go on, run the same command$"),
        ("sampling", "SIGUSR1", 2, r"; to go on, run the same command$"),
        ("on_validation_batch_start", "SIGHUP", 2, r"the samples so far are in .*val-step-0; .* run the same command$"),
        ("scoring (teacher)", "SIGUSR2", 1, r"at step 0, saved .*interrupted\.ckpt; .* --ckpt_path last$"),
        ("scoring (teacher)", "SIGTERM", 2, r"at step 4, saved .*interrupted\.ckpt"),
        ("on_train_batch_start", "SIGINT", 2, r"by Ctrl-C at step 2, saved .*interrupted\.ckpt"),
        ("on_validation_batch_start", "SIGTERM", 4, r"at step 3, saved .*interrupted\.ckpt"),
        ("on_validation_batch_start", "SIGTERM", 6, r"at step 6, saved .*final\.ckpt"),
        ("on_fit_end", "SIGUSR1", 1, r"at step 6, saved .*final\.ckpt"),
        ("on_validation_batch_start", "SIGTERM", 8, r"in the evaluation after training at step 6, saved .*final\.ckpt"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    fit: Fit,
    whole: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    place: str,
    name: str,
    count: int,
    said: str,
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    assert fit(*stopper(place, name, count)) == 128 + getattr(signal, name)
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("opdlab: stopped by ")
    assert re.search(said, line)
    assert fit(*(["--ckpt_path", "last"] if "last" in line else [])) == 0
    runs = sorted((tmp_path / "runs/quickstart").iterdir())
    assert len(runs) == 1 + ("last" not in line)
    assert left_behind(runs[-1]) == whole
    assert list(tmp_path.rglob("*.partial")) == []
    if place == "on_validation_batch_start":
        assert "1 batch taken up from" in caplog.text


def test_an_evaluation_alone_goes_on_too(
    fit: Fit, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    assert fit(*stopper("on_validation_batch_start", "SIGUSR1", 2), command="validate") == 128 + signal.SIGUSR1
    assert re.search("the samples so far are in runs/.*; to go on, run the same command", capfd.readouterr().err)
    assert fit(command="validate") == 0
    assert "1 batch taken up" in caplog.text


@pytest.mark.parametrize("stage", ["on_train_epoch_end", "on_validation_end"])
def test_what_ends_training_after_a_validation_leaves_a_checkpoint_and_a_reason(
    fit: Fit, whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    flags = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.mode=max"]
    flags += ["--trainer.callbacks.monitor=val/toy/length", "--trainer.callbacks.stopping_threshold"]
    at_epoch_end = str(stage == "on_train_epoch_end").lower()
    assert fit(*flags, "1", f"--trainer.callbacks.check_on_train_epoch_end={at_epoch_end}") == 0
    step = 4 if stage == "on_train_epoch_end" else 3
    said = (
        rf"training ended at step {step}: EarlyStopping: Stopping threshold reached: val/toy/length = 12.*final\.ckpt"
    )
    assert re.search(said, caplog.text)
    run = tmp_path / "runs/quickstart/version_0"
    assert (run / "student/model.safetensors").is_file()
    assert fit(*flags, "99", "--ckpt_path", "last", "--model.evaluation.teacher=false") == 0
    losses = [[row.get("train/loss") for row in rows] for rows in (left_behind(run)["metrics"], whole["metrics"])]
    assert losses[0] == losses[1]
    assert left_behind(run)["weights"] == whole["weights"]


def test_signals_are_heard_while_the_libraries_load_and_stay_ignored_under_nohup(tmp_path: Path) -> None:
    loading = "import signal\nsignal.raise_signal(signal.{name})\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "opdlab", "gates"]
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which children inherit
    for name, code in {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}.items():
        (tmp_path / "torch.py").write_text(loading.format(name=name))
        shown = "Ctrl-C" if name == "SIGINT" else name
        stopped = run_child(command, env=environment, cwd=tmp_path)
        line = f"opdlab: stopped by {shown}; to go on, run the same command\n"
        assert (stopped.returncode, stopped.stdout, stopped.stderr) == (code, "", line)
    signal.signal(signal.SIGHUP, hangup)
    (tmp_path / "torch.py").write_text(loading.format(name="SIGHUP") + "raise SystemExit(7)")
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]
    code = run_child(ignoring, env=environment, cwd=tmp_path).returncode
    assert code == 7


def test_an_ignored_signal_stays_ignored_in_training(fit: Fit, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Lightning installs a handler of its own
    try:
        assert (
            fit(*stopper("on_train_batch_start"), "--trainer.max_steps", "2", "--model.evaluation.teacher=false") == 0
        )
    finally:
        assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN
    assert "stopp" not in capfd.readouterr().err.replace("`Trainer.fit` stopped", "")


def test_the_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look(_: object) -> int:
        inside.append(signal.getsignal(signal.SIGTERM))
        return 0

    monkeypatch.setitem(COMMANDS, "look", look)
    assert main(["look"]) == 0
    assert inside != [before]
    assert signal.getsignal(signal.SIGTERM) is before


# -- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "rank", "said"),
    [
        ("on_train_batch_start", 1, r"opdlab: stopped by SIGTERM at step 1, saved .*; .* --ckpt_path last\n"),
        # The first process may not have begun to sample.
        ("on_validation_batch_start", 1, r"opdlab: stopped by SIGTERM(, the samples so far .*)?; .*same command\n"),
    ],
)
def test_one_signalled_process_stops_all(tmp_path: Path, place: str, rank: int, said: str) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "opdlab", "fit", "-c", "quickstart", "-c", "small.yaml", "--trainer.devices=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--data.train.num_problems=8", *stopper(place, rank=rank)]
    run = run_child(command, cwd=tmp_path, env=environment)
    assert run.returncode == 143, run.stderr
    assert re.search(said, run.stderr)


# -- full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: two checkpoints of the toy student, and what else a run writes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # TensorBoard leaves its file open if it cannot write what it has not written yet
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see `small_disk`
def test_a_full_disk_with_the_event_files_alone(
    fit: Fit, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All else is on another disk: the folder of the events is named, and what a checkpoint has is in the curves."""
    fill = ["--trainer.callbacks+=tests.stops.Filler", "--trainer.callbacks.place=on_train_batch_start"]
    fill += [f"--trainer.callbacks.folder={small_disk}", "--trainer.callbacks.count=4"]
    every = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={small_disk}"]
    every += ["--checkpoint.every_n_train_steps=1", "--model.evaluation.teacher=false"]
    assert fit(*fill, *every) == EXIT_FAILED
    error = capfd.readouterr().err
    line = error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert re.match(rf"opdlab: error: {small_disk}/\S+ cannot be written, because the disk is full", line)
    kept = re.search(r"\(at step \d; the newest checkpoint is (\S+\.ckpt), of step (\d)\)", line)
    assert kept is not None
    assert check_checkpoint(Path(kept[1])) == int(kept[2]) >= 3
    (small_disk / "filler").unlink()
    assert fit("--ckpt_path", "last", *every) == 0
    steps: list[int] = []
    for folder in sorted((small_disk / "lightning_logs").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        steps += [event.step for event in events.Scalars("train/loss")]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "runs/quickstart/version_0/metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see `small_disk`
@pytest.mark.parametrize(
    ("place", "count", "flags", "said"),
    [
        ("on_train_batch_start", 3, "", r"step-3\.ckpt|version_0"),  # the checkpoint; its folder for metrics and events
        (
            "on_train_batch_start",
            3,
            "--sample_logger.every_n_steps=1 --gate_monitor.every_n_steps=9",
            r"rollouts/(step-000003|index)\.html",
        ),
        ("on_validation_batch_start", 3, "", r"evaluations/val-step-3/toy-0\.jsonl"),
        ("on_fit_end", 1, "", "student"),
        (
            "on_train_batch_start",
            3,
            "--save_pools=true --pool_recorder.every_n_steps=1 --gate_monitor.every_n_steps=9",
            "pools/step-000003",
        ),
    ],
    ids=["checkpoint", "page", "sample lines", "export", "record"],
)
def test_a_full_disk_is_one_line_and_the_newest_checkpoint_stays(
    fit: Fit, small_disk: Path, capfd: pytest.CaptureFixture[str], place: str, count: int, flags: str, said: str
) -> None:
    root = small_disk / "runs"
    fill = ["--trainer.callbacks+=tests.stops.Filler", f"--trainer.callbacks.place={place}"]
    fill += [f"--trainer.callbacks.folder={small_disk}", f"--trainer.callbacks.count={count}"]
    every = [f"--trainer.default_root_dir={root}", "--checkpoint.every_n_train_steps=1", *flags.split()]
    assert fit(*fill, *every) == EXIT_FAILED
    error = capfd.readouterr().err
    line = error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert re.match("opdlab: error: .* cannot be written, because the disk is full", line)
    assert re.search(said, line)
    step = {"on_train_batch_start": 2, "on_validation_batch_start": 3, "on_fit_end": 6}[place]
    kept = re.search(r"\(at step (\d); the newest checkpoint is (\S+\.ckpt), of step (\d)\)", line)
    assert kept is not None
    assert check_checkpoint(Path(kept[2])) == int(kept[3]) == step
    (small_disk / "filler").unlink()
    assert list(root.rglob("*.partial")) == []
    assert fit("--ckpt_path", "last", *every) == 0
