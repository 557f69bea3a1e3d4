"""Runs of several processes: each with a rendezvous of its own, started by Lightning, or one by each task of SLURM."""

import csv
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from opdlab.cli import EXIT_USAGE
from opdlab.errors import UsageError
from opdlab.locks import locked
from opdlab.studies.job import Job, RunSpec
from opdlab.studies.launch import Cluster, default_jobs
from opdlab.studies.schema import StudyRun
from tests.studies import slurm
from tests.studies.tiny import SHORT, study_run, until, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*DEBUG_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*DEBUG_:pytest.PytestUnraisableExceptionWarning"),
]
FORK = multiprocessing.get_context("fork")
# In place of `opdlab fit`: notes how it was started, then does what the test asks for.
PROGRAM = """
import json, os, sys, time
rank = os.environ.get("SLURM_PROCID", "0")
about = {"arguments": sys.argv[1:], "environment": dict(os.environ)}
open(f"rank-{rank}.part", "w").write(json.dumps(about))
os.rename(f"rank-{rank}.part", f"rank-{rank}.json")
if rank == os.environ.get("BROKEN"):
    print("opdlab: error: broken on purpose", file=sys.stderr)
    sys.exit(2)
time.sleep(600 if "BROKEN" in os.environ else 0)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """A run whose program is a cheap one; other runs and a launcher have left their variables."""
    (tmp_path / "opdlab").mkdir()
    (tmp_path / "opdlab/__main__.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    return made(tmp_path, devices=1, nodes=2)


def made(folder: Path, **changes: Any) -> RunSpec:
    """Return a run of a study in a folder."""
    values: dict[str, Any] = {
        "path": folder / "study/runs/none/seed-0",
        "evaluated_at": (1,),
        "variant": "none",
        "seed": 0,
        "arguments": ("--model.gate=none",),
        "threads": 1,
        "accelerator": "cpu",
        "devices": 1,
        "nodes": 1,
        "keep_checkpoints": False,
        "digest": "",
        "siblings": (),
    }
    return RunSpec(**{**values, **changes})


def task(spec: RunSpec, rank: int, others: Mapping[str, str]) -> None:
    os.environ |= {**slurm.variables(rank, nodes=2, tasks_per_node=1), **others}
    Job(tasks=2)(spec)


@pytest.fixture
def start() -> Iterator[Any]:
    """Start one of a job's two tasks in a process of its own, which is killed at the end."""
    processes: list[Any] = []

    def started(spec: RunSpec, rank: int, **others: str) -> Any:
        processes.append(FORK.Process(target=task, args=(spec, rank, others)))
        processes[-1].start()
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.join()


def ended(*tasks: Any) -> None:
    for each in tasks:
        each.join(60)
        assert each.exitcode == 0


def test_the_tasks_of_a_job_run_one_command(spec: RunSpec, tmp_path: Path, start: Any) -> None:
    """When the first one has tidied the folder, which only it does; and it alone writes the outcome."""
    spec.path.mkdir(parents=True)
    (spec.path / "left.txt").touch()
    second = start(spec, 1)
    second.join(1.5)
    assert second.is_alive()
    assert not (tmp_path / "rank-1.json").exists()
    ended(start(spec, 0), second)
    first, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["arguments"] == other["arguments"] == ["fit", "--model.gate=none"]
    for rank, about in enumerate((first, other)):
        environment = about["environment"]
        assert not environment.keys() & {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
        assert environment["SLURM_PROCID"] == str(rank)
        assert environment["SLURM_JOB_NAME"] == "opdlab"  # Lightning reads no variables of a job named "interactive"
        assert environment["OMP_NUM_THREADS"] == "1"
    assert not (spec.path / "left.txt").exists()
    assert list(spec.record.last_lines) == ["it ended, but its evaluations are not complete: see its log"]


def test_no_task_runs_what_another_job_has(spec: RunSpec, tmp_path: Path, start: Any) -> None:
    with locked(spec.path) as mine:
        assert mine
        ended(start(spec, 1), start(spec, 0))
    assert not list(tmp_path.glob("rank-*"))
    assert not (spec.path / "run.json").exists()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_task_whose_process_fails_ends_the_others(spec: RunSpec, start: Any, broken: int) -> None:
    """They would wait for it until the time limit; the record says which one it was."""
    ended(start(spec, 0, BROKEN=str(broken)), start(spec, 1, BROKEN=str(broken)))
    assert spec.record.state == "failed"
    said = ["opdlab: error: broken on purpose"]
    if broken:
        said.insert(0, "process 1 has ended with code 2, and said:")
    assert list(spec.record.last_lines) == said


def test_a_single_task_starts_its_processes_at_a_port_of_its_own(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a shell of SLURM, whose variables Lightning would take for those of the run."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    Job()(spec)
    environment = json.loads((tmp_path / "rank-0.json").read_text())["environment"]
    assert not environment.keys() & {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    assert environment["SLURM_JOB_NAME"] == "interactive"


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A port in the environment at which another run has met."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def losses() -> dict[str, list[str]]:
    return {}


@pytest.mark.parametrize("cluster", ["debug", "slurm"])
@pytest.mark.usefixtures("taken_port")
def test_a_variant_with_two_processes_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[str, list[str]], cluster: str
) -> None:
    """Started by Lightning, or as the tasks of SLURM on two machines: the losses are the same."""
    two = "--trainer.devices=2" if cluster == "debug" else "--trainer.num_nodes=2"
    variant = {"name": "two", "overrides": [two]}
    overrides = [each for each in SHORT if "Watch" not in each] + ["--model.evaluation.teacher=false"]
    file = write(tmp_path, variants=[variant], baseline="two", seeds=[0], budgets=[1], overrides=overrides)
    pids = slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    try:
        code = study_run(monkeypatch, file, "--cluster", cluster, "--parameters.timeout_min", "5")
    finally:
        slurm.kill_all(pids)
    run = StudyRun(tmp_path / "runs/studies/tiny/runs/two/seed-0", (1,))
    assert code == 0, (run.path / "log.txt").read_text()
    assert run.finished
    assert [path.name for path in run.path.glob("version_*")] == ["version_0"]
    assert len(list(run.path.glob("evaluations/val-step-1/toy-*.jsonl"))) == 2  # one a process
    with (run.path / "version_0/metrics.csv").open() as metrics:
        losses[cluster] = [row["train/loss"] for row in csv.DictReader(metrics) if row["train/loss"]]
    assert losses[cluster] == losses.setdefault("debug", losses[cluster]) != []
    if cluster == "slurm":
        script = (run.path / f"submitit/{slurm.JOB_ID}_submission.sh").read_text()
        assert "--kill-on-bad-exit=1" in script
        until(lambda: (run.path / f"submitit/{slurm.JOB_ID}_1_result.pkl").exists(), seconds=30)


# -- what a cluster cannot run, and how many runs have room ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"nodes": 2}, {}, "trainer.num_nodes is 2, but --cluster local starts a run on one machine: set it to 1, or"),
        ({"nodes": 2, "devices": None}, {"name": "slurm"}, "give trainer.devices"),
        (
            {"devices": 4, "accelerator": "gpu"},
            {"parameters": {"gpus_per_node": 2}},
            "trainer.devices is 4, but --parameters.gpus_per_node is 2: give at least 4",
        ),
        (
            {"devices": 4, "accelerator": "auto"},
            {"parameters": {"visible_gpus": [0, 1]}},
            "trainer.devices is 4, but there are 2 GPUs here: lower it, or give --cluster slurm",
        ),
        (
            {"devices": None, "accelerator": "auto"},
            {"parameters": {"visible_gpus": [0, 1]}},
            "trainer.devices is auto, but there are 2 GPUs here, and how many a run takes is not known: give a number",
        ),
        ({}, {"parameters": {"nodes": 1}}, "--parameters has nodes, which follows from trainer.num_nodes: leave"),
        (
            {},
            {"name": "slurm", "parameters": {"slurm_ntasks_per_node": 2}},
            "--parameters has slurm_ntasks_per_node, which follows from trainer.devices: leave it out",
        ),
        (
            {"devices": 2},
            {"name": "slurm", "parameters": {"timeout_min": 5, "slurm_use_srun": False}},
            "--parameters.slurm_use_srun is false, but srun starts the processes of a run: leave it out",
        ),
    ],
)
def test_what_a_cluster_cannot_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        Cluster(**options).check([made(tmp_path, **changes)])
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_gpus_without_a_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit selects GPUs by number, so that a run would take another GPU than the one that is visible here."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,MIG-0b1c")
    with pytest.raises(
        UsageError, match="CUDA_VISIBLE_DEVICES is 'GPU-8932f937,MIG-0b1c', but --cluster local selects"
    ):
        Cluster().check([made(tmp_path, devices=1, accelerator="gpu")])
    Cluster().check([made(tmp_path)])  # on the CPU
    Cluster("debug").check([made(tmp_path, devices=1, accelerator="gpu")])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # hides all
    Cluster().check([made(tmp_path, devices=1, accelerator="auto")])


def test_a_refused_study_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, overrides=["--trainer.num_nodes=2"])
    assert study_run(monkeypatch, file) == EXIT_USAGE
    assert "variants: 'none': trainer.num_nodes is 2, but --cluster debug starts a run on" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_runs_of_several_processes_take_as_many_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    runs = [made(tmp_path)] * 9
    assert default_jobs(runs, {}) == 8
    assert default_jobs([*runs, made(tmp_path, devices=2, threads=2)], {}) == 2
    assert default_jobs([*runs, made(tmp_path, devices=16)], {}) == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert default_jobs(runs, {}) == 8  # runs on the CPU leave the GPUs alone
    on_gpus = [*runs, made(tmp_path, devices=2, accelerator="gpu")]
    assert default_jobs(on_gpus, {}) == 2
    assert default_jobs(on_gpus, {"visible_gpus": [2, 3]}) == 1
    assert default_jobs([made(tmp_path, accelerator="gpu")] * 4, {"gpus_per_node": 2}) == 2
