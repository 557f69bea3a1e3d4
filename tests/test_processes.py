"""Two processes on one machine, by torch's own communication on the CPU."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from opdlab.callbacks import EvaluationTable, GateMonitor, RunFiles, SampleLogger
from opdlab.records import read_json
from opdlab.viewer import write_page
from tests.toy_run import Run


class OwnPart(Callback):
    """Writes what this process's rollouts have of each step's loss, and how many tokens they have."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokens = folder, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trace = outputs["trace"]
        part = float((trace.gates.weights * trace.inputs.position_losses * trace.loss_shares).sum())
        with (self.folder / f"part-{trainer.global_rank}").open("a") as file:
            file.write(f"{part}\n")
        self.tokens += int(trace.inputs.mask.sum())
        (self.folder / f"tokens-{trainer.global_rank}").write_text(str(self.tokens))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_loss_and_tokens_are_those_of_all_processes_and_one_of_them_writes(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*arguments: Any) -> Path:
        with (tmp_path / "writers").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return write_page(*arguments)

    # A page does not tell which process wrote it.
    monkeypatch.setattr("opdlab.callbacks.sample_logger.write_page", counted)
    watching = (
        GateMonitor(every_n_steps=1),
        SampleLogger(every_n_steps=2),
        OwnPart(tmp_path),
        RunFiles(EvaluationTable()),
    )
    make_run(callbacks=watching).fit(4, strategy="ddp_fork", devices=2)
    one, other = ([float(line) for line in (tmp_path / f"part-{rank}").read_text().split()] for rank in (0, 1))
    assert one != other
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == pytest.approx([sum(parts) for parts in zip(one, other, strict=True)], rel=1e-5)
    written = (tmp_path / "writers").read_text().split()
    assert len(written) == 2  # two pages
    assert len(set(written)) == 1
    tokens = [int((tmp_path / f"tokens-{rank}").read_text()) for rank in (0, 1)]
    assert min(tokens) > 0
    (results,) = tmp_path.rglob("results.json")
    assert read_json(results)["tokens"] == sum(tokens)


def test_a_process_of_several_that_has_done_its_work_does_not_fail_at_the_interpreter_s_end() -> None:
    """A late abort stands for a thread of the process group that calls Python while the interpreter is taken apart."""
    program = """
import atexit, os, sys
import torch.distributed as dist
from opdlab.cli import commands
class Late:
    def __del__(self, abort=os.abort):
        abort()
late = [Late()]
def main():
    atexit.register(print, "registered functions are called")
    return 0
commands.main = main
if sys.argv[1] == "several":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
commands.console()
"""
    for processes, code in (("several", 0), ("one", -signal.SIGABRT)):
        ended = subprocess.run([sys.executable, "-c", program, processes], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout.splitlines()) == (code, ["registered functions are called"]), ended
