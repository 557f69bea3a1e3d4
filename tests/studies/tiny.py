"""A study of a few seconds: three problems, answers of a few tokens. Its runs are processes of their own."""

import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from opdlab.cli import main
from opdlab.cli.study import plain_config, plan_study
from opdlab.studies.plan import Plan
from opdlab.studies.study import read_study

ROOT = Path(__file__).parents[2]

SHORT = [
    *("--data.benchmarks.toy.init_args.num_problems=3", "--data.train.init_args.num_problems=16"),
    *("--data.eval_batch_size=1", "--data.reuse.prompts_per_pool=4", "--data.reuse.batch_size=4"),
    *("--model.sampling.max_new_tokens=10", "--model.eval_sampling.max_new_tokens=10"),
    *("--model.eval_sampling.num_samples=2", "--model.evaluation.pass_at=[1,2]"),
    *("--checkpoint.every_n_train_steps=2", "--model.optimizer.init_args.lr=1.0e-2", "--trainer.log_every_n_steps=1"),
    "--trainer.callbacks+=tests.studies.tiny.Watch",
]
WATCH = "OPDLAB_TEST_WATCH"


class Watch(Callback):
    """In a run's process: notes the tokens of each step's batch, and waits or kills where the environment says so.

    ``OPDLAB_TEST_WATCH`` is a JSON list: ``train`` or ``evaluate``; the optimizer step; ``run`` or ``job``, which is
    killed, or ``wait``. Its process is in ``watch.json`` beside the run by then.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.what, self.step, self.whom = json.loads(os.environ.get(WATCH, '["", 0, ""]'))
        self.folder = Path(trainer.default_root_dir)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        rollouts = batch.rollouts
        with (self.folder / "batches.jsonl").open("a") as file:
            file.write(json.dumps([rollouts.prompt_tokens.tolist(), rollouts.tokens.tolist()]) + "\n")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if (self.what, self.step) == ("train", trainer.global_step):
            self.act()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        written = any(file.stat().st_size for file in self.folder.glob(f"samples/*/val-step-{self.step}/*.jsonl"))
        if (self.what, self.step) == ("evaluate", trainer.global_step) and written:
            self.act()

    def act(self) -> None:
        file = self.folder / "watch.json"
        file.with_suffix(".part").write_text(json.dumps({"run": os.getpid(), "job": os.getppid()}))
        file.with_suffix(".part").replace(file)
        if self.whom != "wait":
            os.kill(os.getpid() if self.whom == "run" else os.getppid(), signal.SIGKILL)
        time.sleep(600 if self.whom == "job" else 0)


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    """Wait until something holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def content(**changes: Any) -> dict[str, Any]:
    """What a tiny study's file holds."""
    study: dict[str, Any] = {
        "name": "tiny",
        "base": ["quickstart", "toy_study"],
        "overrides": SHORT,
        "variants": [
            {"name": "none", "overrides": ["--model.gate=none"]},
            {"name": "token", "overrides": ["--model.gate=token", "--model.gate.tau=100"]},
        ],
        "baseline": "none",
        "seeds": [0, 1],
        "budgets": [2, 4],
    }
    return {key: value for key, value in {**study, **changes}.items() if value is not None}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content(**changes)))
    return file


def plan(place: Path, folder: Path | None = None, **changes: Any) -> Plan:
    """The plan of the study that is written to ``place``; its folder is ``study`` in there by default."""
    return plan_study(read_study(write(place, **changes)), folder or place / "study", plain_config)


def study_run(monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> int:
    """Run ``opdlab study run`` in this process, beside the file; each run is a process that finds this code."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with warnings.catch_warnings():
        # submitit's debug executor closes its log files only at garbage collection: collect now, and not in the next
        # test.
        warnings.filterwarnings("ignore", "unclosed file .*DEBUG_", ResourceWarning)
        try:
            return main(["study", "run", str(file), "--cluster", "debug", *options])
        finally:
            gc.collect()


def lines(root: Path) -> dict[str, bytes]:
    """Every sample line of a study, by file."""
    files: Sequence[Path] = sorted(root.glob("runs/*/*/evaluations/*/*.jsonl"))
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
