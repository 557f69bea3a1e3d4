"""Two processes on one machine: they end together, whoever stops them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opdlab.checkpoints import newest_checkpoint
from opdlab.cli.app import EXIT_COLLAPSED
from opdlab.records import read_json
from tests.cli.test_stopping import SMALL

ROOT = Path(__file__).parents[2]
Fit = Callable[..., tuple[int, str]]


def send(first: "subprocess.Popen[bytes]", rank: int, seconds: float) -> None:
    pids = [str(first.pid)]
    while rank and len(pids) < 2 and first.poll() is None:
        time.sleep(0.05)
        found = subprocess.run(["pgrep", "-P", pids[0], "-f", "opdlab"], capture_output=True, text=True, check=False)
        pids += found.stdout.split()
    time.sleep(seconds)
    if first.poll() is None:
        os.kill(int(pids[rank]), signal.SIGTERM)


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Run ``opdlab fit`` with two processes, and return its exit code and its messages; both must end.

    ``signalled`` is the process that gets a SIGTERM, and when, in seconds since it has started.
    """
    (tmp_path / "small.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "opdlab", "fit", "-c", "quickstart", "-c", "small.yaml", "--trainer.devices=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, signalled: tuple[int, float] | None = None) -> tuple[int, str]:
        # A file: a pipe would also wait for a process that is left behind.
        with (tmp_path / "messages.txt").open("w+") as messages:
            process = subprocess.Popen(
                [*command, "--data.train.num_problems=8", *arguments],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,
            )
            try:
                if signalled is not None:
                    send(process, *signalled)
                code = process.wait(timeout=120)
                with pytest.raises(ProcessLookupError):  # no process of the group is left
                    os.killpg(process.pid, 0)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            messages.seek(0)
            return code, messages.read()

    return run


def test_a_signal_to_the_second_process_before_it_joins_stops_both(fit: Fit) -> None:
    code, said = fit("--data.train=tests.stops.StoppingProblems")
    assert code == 128 + signal.SIGTERM, said
    assert "opdlab: stopped by SIGTERM; to go on, run the same command\n" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seconds", [1.5, 5, 7, 9, 11])
def test_a_signal_at_any_moment_to_any_process_stops_both(fit: Fit, rank: int, seconds: float) -> None:
    code, said = fit(signalled=(rank, seconds))
    assert code in (128 + signal.SIGTERM, 0), said
    assert ("opdlab: stopped by SIGTERM" in said) == (code != 0)
    assert "killed" not in said


def test_an_error_of_the_first_process_leaves_no_other_behind(fit: Fit, tmp_path: Path) -> None:
    fill = ["--trainer.callbacks+=tests.stops.Breaker", "--trainer.callbacks.place=on_train_batch_start"]
    code, said = fit(*fill)
    assert code == 2, said
    assert said.count("opdlab: error:") == said.count("broken on purpose") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("UsageError", "broken on purpose", 2),
        ("KeyError", "KeyError: 'broken on purpose'", 1),
        ("SIGKILL", "killed by SIGKILL, as a system does that lacks memory", 1),
    ],
)
def test_an_error_of_the_second_process_ends_both_with_its_line(
    fit: Fit, tmp_path: Path, kind: str, message: str, expected: int
) -> None:
    values = {"place": "on_train_batch_start", "count": 2, "rank": 1, "kind": kind}
    flag = "--trainer.callbacks"
    code, said = fit(f"{flag}+=tests.stops.Breaker", *(f"{flag}.{key}={value}" for key, value in values.items()))
    assert code == expected, said
    assert said.count("opdlab: error:") == 1
    assert said.rstrip().endswith(f"opdlab: error: process 1: {message}")
    assert said.count("Traceback") == (kind == "KeyError")
    assert read_json(tmp_path / "runs/quickstart/version_0/results.json")["state"] == "failed"


def test_an_error_of_the_second_process_before_it_joins_ends_both(fit: Fit) -> None:
    code, said = fit("--data.train=tests.stops.BreakingProblems")
    assert code == 2, said
    assert said.rstrip().endswith("opdlab: error: process 1: broken on purpose")
    assert "Traceback" not in said


def test_a_collapsed_run_ends_in_both_processes(fit: Fit, tmp_path: Path) -> None:
    limits = ["--collapse_guard.min_weight=2", "--collapse_guard.patience=1"]  # every weight counts as none
    code, said = fit("--collapse_guard.stop=true", *limits)
    assert code == EXIT_COLLAPSED, said
    run = tmp_path / "runs/quickstart/version_0"
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found[1] == 1
    assert read_json(run / "results.json")["state"] == "collapsed"
    assert (run / "rollouts/step-000001.html").is_file()


def test_early_stopping_ends_both_processes(fit: Fit, tmp_path: Path) -> None:
    flags = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.mode=max"]
    flags += ["--trainer.callbacks.monitor=val/toy/length", "--trainer.callbacks.stopping_threshold=1"]
    code, said = fit(*flags, "--trainer.callbacks.check_on_train_epoch_end=false")
    assert code == 0, said
    assert re.search(r"training ended at step 3: EarlyStopping: Stopping threshold reached", said)
    run = tmp_path / "runs/quickstart/version_0"
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found[1] == 3
    assert read_json(run / "results.json")["state"] == "finished"


def test_a_run_with_sharded_weights_ends_with_its_files(fit: Fit, tmp_path: Path) -> None:
    """With evaluations before, between and after the steps, of the teacher too, and another run from its checkpoint."""
    code, said = fit("--trainer.strategy=model_parallel", "--model.evaluation.teacher=true")
    assert code == 0, said
    run = tmp_path / "runs/quickstart/version_0"
    assert read_json(run / "results.json")["state"] == "finished"
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found[1] == 6
    exported = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    saved = torch.load(found[0], weights_only=True)["state_dict"]
    assert all(torch.equal(weight, saved[f"student.model.{name}"]) for name, weight in exported.items())
    code, said = fit("--trainer.strategy=model_parallel", "--trainer.max_steps=8", "--ckpt_path=last")
    assert code == 0, said
    assert read_json(run / "results.json")["steps"] == 8
