"""The guide's commands for Lightning's launcher, torchrun and SLURM: two processes give one process's run."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opdlab.records import read_json
from tests.children import run_child
from tests.cli.test_stopping import SMALL

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide" / "scale.md"
HEADINGS = {"one": "One process", "lightning": "Lightning's launcher", "torchrun": "torchrun", "slurm": "SLURM"}
PROGRAMS = {"opdlab": "opdlab", "torchrun": "torch.distributed.run"}


def guide(launcher: str) -> tuple[list[str], dict[str, str]]:
    """Return the guide's first command line below a launcher's heading, made small, and the options of its job."""
    block = re.search(rf"^## {HEADINGS[launcher]}\n.*?^```(?:sh|bash)\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert block is not None
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", block[1], re.M))
    words = shlex.split(block[1].replace('"$@"', ""), comments=True)
    if launcher == "slurm":  # srun starts the rest of the line for each task
        assert words.pop(0) == "srun"
    small = ["-c", "small.yaml", "--model.evaluation.teacher=false"]
    return [sys.executable, "-m", PROGRAMS[words[0]], *words[1:], *small], options


def of_task(rank: int, job: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that srun sets for a task on one machine."""
    assert job["nodes"] == "1"
    tasks = job["ntasks-per-node"]
    variables = {"JOB_ID": "4711", "JOB_NAME": job["job-name"], "JOB_NUM_NODES": "1", "NTASKS": tasks}
    variables |= {"NTASKS_PER_NODE": tasks, "NODEID": "0", "NODELIST": "localhost", "JOB_NODELIST": "localhost"}
    variables |= {"PROCID": str(rank), "LOCALID": str(rank)}
    return {f"SLURM_{name}": value for name, value in variables.items()}


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
    run_child(guide("one")[0], cwd=folder, env=environment({}), check=True)
    return folder


@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "slurm"])
def test_two_processes_give_the_run_of_one(launcher: str, one_process: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    command, job = guide(launcher)
    if launcher == "slurm":
        assert job["ntasks-per-node"] == "2"
        with (tmp_path / "other.txt").open("w") as said:
            facts: dict[str, Any] = {"cwd": tmp_path, "env": environment(of_task(1, job)), "start_new_session": True}
            other = subprocess.Popen(command, stdout=said, stderr=said, **facts)
            try:
                run_child(command, cwd=tmp_path, env=environment(of_task(0, job)), check=True)
                assert other.wait(timeout=60) == 0, (tmp_path / "other.txt").read_text()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(other.pid, signal.SIGKILL)
                other.wait()
    else:
        run_child(command, cwd=tmp_path, env=environment({}), check=True)
    assert losses(tmp_path) == pytest.approx(losses(one_process), rel=1e-5, abs=1e-7)
    theirs, ours = (
        next(folder.glob("runs/quickstart/*/student/model.safetensors")) for folder in (one_process, tmp_path)
    )
    for name, weight in load_file(theirs).items():
        torch.testing.assert_close(load_file(ours)[name], weight, rtol=0, atol=1e-5)
