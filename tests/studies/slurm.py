"""A SLURM whose machines are all this one: the programs that submitit calls, and the variables that a task has."""

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

JOB_ID = "4711"
ROOT = Path(__file__).parents[2]


def variables(rank: int, nodes: int, tasks_per_node: int) -> dict[str, str]:
    """Return the variables of a task of submitit's job."""
    return {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NAME": "submitit",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % tasks_per_node),
        "SLURM_NODEID": str(rank // tasks_per_node),
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
    }


def install(folder: Path) -> Path:
    """Write the programs into a folder, which is to be put into ``PATH``; return the file of the started processes."""
    folder.mkdir()
    started = folder / "started.txt"
    sbatch = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.studies.slurm import submit; "
    sbatch += f"submit(sys.argv[1], {str(started)!r})"
    programs = {"sbatch": f'exec {sys.executable} -c "{sbatch}" "$@"', "sacct": "", "scancel": "", "srun": "exit 1"}
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return started


def submit(file: str, started: str) -> None:
    """Start the tasks of a job, as ``sbatch FILE`` does."""
    text = Path(file).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    nodes, each = int(asked["nodes"]), int(asked["ntasks-per-node"])
    words = shlex.split(text.splitlines()[-1])
    for rank in range(nodes * each):
        errors = words[words.index("--error") + 1].replace("%j", JOB_ID).replace("%t", str(rank))
        with Path(errors).open("w") as stderr, Path(started).open("a") as pids:
            task = subprocess.Popen(
                words[words.index(sys.executable) :],
                env={**os.environ, **variables(rank, nodes, each)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            pids.write(f"{task.pid}\n")
    print(f"Submitted batch job {JOB_ID}")


def kill_all(started: Path) -> None:
    """Kill the tasks that have not ended; their runs end with them."""
    for pid in started.read_text().split() if started.exists() else ():
        with suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)
