"""One command line under Lightning's launcher, torchrun and SLURM: two processes give one process's run."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opdlab.records import read_json
from tests.children import run_child
from tests.cli.test_stopping import SMALL

ROOT = Path(__file__).parents[2]
FIT = ["-m", "opdlab", "fit", "-c", "quickstart", "-c", "small.yaml", "--model.evaluation.teacher=false"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "opdlab",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
    "SLURM_JOB_NODELIST": "localhost",
}


def environment(others: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **others}


def losses(folder: Path) -> list[float]:
    (run,) = folder.glob("runs/quickstart/*")
    assert read_json(run / "results.json")["state"] == "finished"
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    (folder / "small.yaml").write_text(SMALL)
    run_child([sys.executable, *FIT], cwd=folder, env=environment({}), check=True)
    return folder


@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "slurm"])
def test_two_processes_give_the_run_of_one(launcher: str, one_process: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    two = [*FIT, "--trainer.devices=2"]
    if launcher == "slurm":  # srun starts a process for each task
        tasks = [{**SLURM, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
        with (tmp_path / "other.txt").open("w") as said:
            other = subprocess.Popen(
                [sys.executable, *two], cwd=tmp_path, env=environment(tasks[1]), stdout=said, stderr=said
            )
            try:
                run_child([sys.executable, *two], cwd=tmp_path, env=environment(tasks[0]), check=True)
                assert other.wait(timeout=60) == 0, (tmp_path / "other.txt").read_text()
            finally:
                other.kill()
                other.wait()
    else:
        program = [sys.executable, *(TORCHRUN if launcher == "torchrun" else []), *two]
        run_child(program, cwd=tmp_path, env=environment({}), check=True)
    assert losses(tmp_path) == pytest.approx(losses(one_process), rel=1e-5, abs=1e-7)
    theirs, ours = (
        next(folder.glob("runs/quickstart/*/student/model.safetensors")) for folder in (one_process, tmp_path)
    )
    for name, weight in load_file(theirs).items():
        torch.testing.assert_close(load_file(ours)[name], weight, rtol=0, atol=1e-5)
