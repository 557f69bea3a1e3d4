"""A study whose run has two processes: stopped, killed and started again, it leaves none behind and loses nothing."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch import Callback

from opdlab.checkpoints import newest_checkpoint
from opdlab.cli import main
from opdlab.studies.schema import StudyRun
from tests.studies.tiny import SHORT, alive, study_run, until, write

# submitit's debug executor closes its log files only at garbage collection.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*DEBUG_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*DEBUG_:pytest.PytestUnraisableExceptionWarning"),
]
PLAN = "OPDLAB_TEST_PLAN"
LONGEST_SECONDS = 600.0


class Signaller(Callback):
    """In each process of a run: notes its number, and sends a signal where the environment says so.

    ``OPDLAB_TEST_PLAN`` is a JSON list: folder of the notes; optimizer step; rank that sends; signal; ``study``, of
    which the first process is a child, or ``self``.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder, *self.plan = json.loads(os.environ[PLAN])
        (Path(folder) / str(os.getpid())).touch()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step, rank, name, whom = self.plan
        if (trainer.world_size, trainer.global_step, trainer.global_rank) == (2, step, rank):
            os.kill(os.getppid() if whom == "study" else os.getpid(), getattr(signal, name))
            time.sleep(3)  # the study forwards the signal before the next step


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A folder in which processes note their numbers; they are killed after a time limit, and at the end."""
    folder = tmp_path / "pids"
    folder.mkdir()

    def kill() -> None:
        for path in folder.iterdir():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)

    limit = threading.Timer(LONGEST_SECONDS, kill)
    limit.start()
    yield folder
    limit.cancel()
    kill()


def losses(run: StudyRun) -> dict[int, float]:
    with (run.path / "version_0/metrics.csv").open() as metrics:
        rows = [row for row in csv.DictReader(metrics) if row["train/loss"]]
    assert len(rows) == len({row["step"] for row in rows})
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


def test_a_run_of_two_processes_is_stopped_and_killed_and_goes_on(
    tmp_path: Path, pids: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C to the study, then SIGKILL of the second process; the third start ends with the losses of one process."""
    variants = [{"name": "one", "overrides": []}, {"name": "two", "overrides": ["--trainer.devices=2"]}]
    own = [*(each for each in SHORT if "Watch" not in each), f"--trainer.callbacks+={__name__}.Signaller"]
    file = write(tmp_path, variants=variants, baseline="one", seeds=[0], budgets=[6], overrides=own)
    study = tmp_path / "runs/studies/tiny"
    one, two = (StudyRun(study / f"runs/{name}/seed-0", (6,)) for name in ("one", "two"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(*plan: Any) -> tuple[int, int, str]:
        """Return exit code, number of processes and messages; all processes have ended."""
        monkeypatch.setenv(PLAN, json.dumps([str(pids), *plan]))
        before = set(pids.iterdir())
        code = study_run(monkeypatch, file)
        started = [int(path.name) for path in set(pids.iterdir()) - before]
        until(lambda: not any(map(alive, started)), seconds=10)
        assert two.holder is None
        said = capsys.readouterr()
        return code, len(started), said.out + said.err

    def saved() -> int:
        newest = newest_checkpoint(two.path / "version_0/checkpoints")
        return -1 if newest is None else newest[1]

    code, count, said = start(3, 0, "SIGINT", "study")
    assert (code, count) == (128 + signal.SIGINT, 3)
    assert "to go on, run the same command" in said
    assert saved() in (3, 4)
    assert two.record.state == "unfinished"
    finished = {path: path.stat().st_mtime_ns for path in one.path.rglob("*") if path.is_file() and path.name != "lock"}
    assert one.finished
    before = next(two.path.glob("samples/*/val-step-0/toy-0.jsonl"))
    kept = before.stat().st_mtime_ns, before.read_bytes()

    code, count, said = start(5, 1, "SIGKILL", "self")
    assert (code, count) == (1, 2)
    assert "two seed 0 failed" in said
    assert "process 1: killed by SIGKILL" in said
    assert (saved(), two.record.state) == (4, "failed")

    code, count, said = start(0, 0, "SIGINT", "self")
    assert (code, count) == (0, 2), (two.path / "log.txt").read_text()
    assert two.finished
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    after = two.path / "evaluations/val-step-0/toy-0.jsonl"
    assert (after.stat().st_mtime_ns, after.read_bytes()) == kept
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert list(losses(two)) == [1, 2, 3, 4, 5, 6]
    assert main(["study", "report", str(study)]) == 0
    assert "report: " in capsys.readouterr().out
