"""Runs of a study: paired, finished once, and with equal results however often they were killed."""

import csv
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opdlab.checkpoints import newest_checkpoint
from opdlab.cli import EXIT_USAGE
from opdlab.locks import locked
from opdlab.records import flat, read_settings
from opdlab.studies.job import Job, RunSpec
from opdlab.studies.launch import Cluster, Launcher
from opdlab.studies.schema import StudyRun, evaluation_is_complete
from tests.studies import slurm
from tests.studies.tiny import ROOT, WATCH, alive, content, lines, plan, study_run, until, write

# submitit's debug executor closes its log files only at garbage collection.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*DEBUG_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*DEBUG_:pytest.PytestUnraisableExceptionWarning"),
]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def runs_find_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def whole(finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every run finished."""
    folder = tmp_path_factory.mktemp("whole") / "it"
    shutil.copytree(finished_study, folder)
    return folder / "runs/studies/tiny"


def test_variants_with_one_seed_are_paired(whole: Path) -> None:
    for seed in (0, 1):
        none, token = (whole / f"runs/{name}/seed-{seed}" for name in ("none", "token"))
        (theirs, *more), (ours, *rest) = batches(none), batches(token)
        assert theirs == ours  # the same prompts, answered with the same seed
        assert [prompts for prompts, _ in more] == [prompts for prompts, _ in rest] != []
        for step in (2, 4):
            theirs, ours = (keys(run, step) for run in (none, token))
            assert theirs == ours
            assert len(theirs) == 6
    zero, one = (batches(whole / f"runs/none/seed-{seed}")[0] for seed in (0, 1))
    assert zero[0] != one[0]
    assert zero[1] != one[1]
    first, other = (keys(whole / f"runs/none/seed-{seed}", 4) for seed in (0, 1))
    assert [key[:2] for key in first] == [key[:2] for key in other]  # the same problems
    assert not {key[2] for key in first} & {key[2] for key in other}
    # Few steps change few samples, as each is drawn with the same random numbers; but they change the weights.
    tables = [(whole / f"runs/{name}/seed-0/version_0/metrics.csv").read_text() for name in ("none", "token")]
    losses = [[row["train/loss"] for row in csv.DictReader(table.splitlines())] for table in tables]
    assert losses[0] != losses[1]


def keys(run: Path, step: int) -> list[tuple[str, int, int]]:
    samples = map(json.loads, (run / f"evaluations/val-step-{step}/toy-0.jsonl").read_text().splitlines())
    return [(sample["id"], sample["sample"], sample["seed"]) for sample in samples]


def batches(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "batches.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_report_needs_and_no_more(whole: Path) -> None:
    run = whole / "runs/none/seed-1"
    record = json.loads((run / "run.json").read_text())
    assert (record["variant"], record["seed"], record["state"]) == ("none", 1, "finished")
    assert record["command"][:2] == ["opdlab", "fit"]
    assert record["seconds"] > 0
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["machine"]["host"]
    assert {path.name for path in (run / "evaluations").iterdir()} == {"val-step-0", "val-step-2", "val-step-4"}
    assert (run / "version_0/config.yaml").is_file()
    assert not (run / "version_0/checkpoints").exists()
    assert not (run / "version_0/student").exists()
    assert sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) < 300_000


def test_a_finished_run_is_not_repeated_and_seeds_may_be_added(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("runs/*/*/run.json")}
    assert len(before) == 4
    assert study_run(monkeypatch, write(whole.parents[2])) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    missing = whole / "runs/token/seed-1/evaluations/val-step-4/toy-0.jsonl"
    text = missing.read_text()
    missing.write_text(text[: text.rindex("{")])  # one line missing
    assert not StudyRun(missing.parents[2], (2, 4)).finished
    missing.write_text(text)
    assert StudyRun(missing.parents[2], (2, 4)).finished


def test_a_failed_run_is_told_of_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"name": "few", "overrides": ["--data.train.init_args.num_problems=2"]}  # found when problems are read
    file = write(tmp_path, variants=[few, content()["variants"][0]], seeds=[0], budgets=[1])
    assert study_run(monkeypatch, file) == 1
    captured = capsys.readouterr()
    assert "few seed 0 failed" in captured.err
    assert "data.reuse.prompts_per_pool is 4, but there are only 2 prompts" in captured.err
    assert "none seed 0: finished" in captured.out
    assert "1 of 2 runs finished" not in captured.out
    assert study_run(monkeypatch, file) == 1  # only this run is repeated
    captured = capsys.readouterr()
    assert "1 of 2 runs finished" in captured.out
    assert "few seed 0: running" in captured.out


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_run_that_cannot_be_started_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cluster: str
) -> None:
    """Here one run's folder cannot be made; on SLURM it refuses each job."""
    run = tmp_path / "runs/studies/tiny/runs/none/seed-0"
    if cluster == "local":
        run.mkdir(parents=True)
        (run / "submitit").touch()
    else:
        slurm.install(tmp_path / "bin")
        (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = ("--cluster", cluster, "--parameters.timeout_min", "5", "--jobs", "1")
    assert study_run(monkeypatch, write(tmp_path, seeds=[0], budgets=[1]), *options) == 1
    captured = capsys.readouterr()
    said = "File exists" if cluster == "local" else "sbatch: error: invalid partition"
    assert f"none seed 0 failed; {run} has its log, which ends:\n    it could not be started:\n    " in captured.err
    assert said in captured.err
    assert f"token seed 0: {'finished' if cluster == 'local' else 'failed'}" in captured.out
    assert said in StudyRun(run, (1,)).record.last_lines[-1]


def test_two_on_one_folder_are_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(whole):
        assert study_run(monkeypatch, write(whole.parents[2])) == EXIT_USAGE
    assert "is in use by another `opdlab study run`" in capsys.readouterr().err


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return plan(tmp_path).runs()[1]


def start(spec: RunSpec) -> Any:
    process = FORK.Process(target=Job(), args=(spec,))
    process.start()
    return process


def until_gone(pid: int) -> None:
    until(lambda: not alive(pid), seconds=10)


def until_beyond(spec: RunSpec, step: int) -> None:
    until(lambda: spec.step > step)


# Checkpoints are written at steps 2 and 4, so the evaluations there are due when a run resumes from them.
@pytest.mark.parametrize(
    "kills",
    [
        [("evaluate", 0, "job"), ("train", 1, "run")],
        [("train", 3, "job"), ("evaluate", 4, "run")],
        [("evaluate", 2, "run"), ("train", 3, "job")],
    ],
    ids=["before-the-first-checkpoint", "in-training-and-at-the-end", "in-an-evaluation"],
)
def test_a_run_killed_twice_writes_the_same_lines(
    spec: RunSpec, whole: Path, kills: list[tuple[str, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the run is killed or its job, which the run must not outlive; also if the study is moved at last."""
    for kill in kills:
        monkeypatch.setenv(WATCH, json.dumps(kill))
        (spec.path / "watch.json").unlink(missing_ok=True)
        job = start(spec)
        job.join()
        pids = json.loads((spec.path / "watch.json").read_text())
        assert job.exitcode == (0 if kill[2] == "run" else -signal.SIGKILL)
        until_gone(pids["run"])
        assert spec.record.state == ("failed" if kill[2] == "run" else "unfinished")
        assert not spec.finished
        assert not (spec.path / "evaluations").exists()
        assert spec.holder is None
    monkeypatch.delenv(WATCH)
    moved = spec.study.rename(spec.study.with_name("moved"))
    spec = plan(moved.parent, folder=moved).runs()[1]
    Job()(spec)
    assert spec.finished, (spec.path / "log.txt").read_text()
    ours = {file: text for file, text in lines(spec.study).items() if "token/seed-0" in file}
    theirs = {file: text for file, text in lines(whole).items() if "token/seed-0" in file}
    assert ours == theirs
    assert len(ours) == 3


def test_a_run_killed_after_its_work_is_not_repeated(spec: RunSpec, whole: Path) -> None:
    """Its samples were in place and its checkpoints gone, its record was not written."""
    shutil.copytree(whole / "runs/token/seed-0", spec.path)
    (spec.path / "run.json").unlink()
    before = lines(spec.study)
    log = (spec.path / "log.txt").read_text()
    Job()(spec)
    assert spec.finished
    assert lines(spec.study) == before != {}
    assert (spec.path / "log.txt").read_text() == log  # nothing ran


def test_a_run_whose_checkpoints_are_not_sound_is_not_started_over(spec: RunSpec, whole: Path) -> None:
    shutil.copytree(whole / "runs/token/seed-0", spec.path)
    (spec.path / "run.json").unlink()
    half = spec.path / "evaluations/val-step-4"
    shutil.rmtree(half)
    (spec.path / "version_0/checkpoints").mkdir()
    (spec.path / "version_0/checkpoints/step-2.ckpt").write_bytes(b"cut off")
    Job()(spec)
    assert spec.record.state == "failed"
    (line,) = [line for line in spec.record.last_lines if line.startswith("opdlab: error: ")]
    assert "no checkpoint in " in line
    assert "step-2.ckpt" in line
    assert line.endswith("delete that folder to start the run over")
    assert (spec.path / "evaluations/val-step-2").is_dir()


def test_signals_are_forwarded_and_the_checkpoint_is_waited_for(tmp_path: Path) -> None:
    """Each makes a run of many steps save and end, which is no failure; the next attempt goes on from there."""
    (spec, *_) = plan(tmp_path, budgets=[5000]).runs()
    step, hangup = 0, signal.getsignal(signal.SIGHUP)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        job = start(spec)
        signal.signal(signal.SIGHUP, hangup)
        until_beyond(spec, step)
        os.kill(job.pid, signum)
        job.join()
        newest = newest_checkpoint(spec.path / "version_0/checkpoints")
        assert newest is not None
        saved = newest[1]
        assert step < saved < 5000
        step = saved
        assert not (spec.path / "run.json").exists()
        assert spec.holder is None
        name = "Ctrl-C" if signum == signal.SIGINT else signum.name
        assert f"stopped by {name} at step {saved}" in (spec.path / "log.txt").read_text()


def test_sigusr2_stops_a_study_once(tmp_path: Path) -> None:
    """To submitit it says that a job is preempted, which is then started again."""
    study = start_study(write(tmp_path, variants=content()["variants"][:1], seeds=[0], budgets=[5000]))
    run = StudyRun(tmp_path / "runs/studies/tiny/runs/none/seed-0", (5000,))
    until(lambda: run.step > 0)
    study.send_signal(signal.SIGUSR2)
    assert "to go on, run the same command" in study.communicate()[1]
    assert study.returncode == 128 + signal.SIGUSR2
    assert "stopped by SIGUSR2 at step" in (run.path / "log.txt").read_text()
    assert not [log for log in (run.path / "submitit").glob("*_log.*") if "Requeued job" in log.read_text()]


@pytest.mark.parametrize("whom", ["study", "job"])
def test_no_run_outlives_its_study(tmp_path: Path, whom: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with SIGKILL, which nobody can handle."""
    monkeypatch.setenv(WATCH, json.dumps(["evaluate", 0, "wait"]))
    study = start_study(write(tmp_path, variants=content()["variants"][:1], seeds=[0], budgets=[5000]))
    run = StudyRun(tmp_path / "runs/studies/tiny/runs/none/seed-0", (5000,))
    until((run.path / "watch.json").exists)
    pids = json.loads((run.path / "watch.json").read_text())
    assert alive(pids["run"])
    os.kill(study.pid if whom == "study" else pids["job"], signal.SIGKILL)
    until_gone(pids["run"])
    until_gone(pids["job"])
    message = study.communicate()[1]
    assert run.record.state == ("unfinished" if whom == "study" else "failed")
    assert ("its process ended without a result" in message) == (whom == "job")


def start_study(file: Path) -> "subprocess.Popen[str]":
    """``opdlab study run`` as a process of its own, with two runs at a time."""
    command = [sys.executable, "-m", "opdlab", "study", "run", str(file), "--jobs", "2"]
    return subprocess.Popen(command, cwd=file.parent, stderr=subprocess.PIPE, text=True)


def test_a_run_that_somebody_has_is_left_alone_and_waited_for(spec: RunSpec) -> None:
    """It gets the study's signals too."""
    held = FORK.Event()

    def hold() -> None:
        with locked(spec.path) as mine:
            assert mine
            held.set()
            time.sleep(60)

    holder = FORK.Process(target=hold)
    holder.start()
    assert held.wait(60)
    assert spec.holder == {"pid": holder.pid, "host": os.uname().nodename}
    Job()(spec)  # returns at once
    assert not (spec.path / "run.json").exists()
    seen: list[str] = []

    launcher = Launcher([spec], Cluster("debug"), jobs=1)
    for run in launcher.run():
        if run is not None:
            seen.append(run.state)
        elif seen == ["running"]:
            signal.raise_signal(signal.SIGTERM)
    assert set(launcher.signals) == {signal.SIGTERM}
    assert seen == ["running", "waiting"]
    holder.join()
    assert holder.exitcode == -signal.SIGTERM


def test_a_study_does_not_wait_for_another_machine_when_it_is_stopped(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot signal the run there, which goes on without it."""
    with locked(spec.path) as mine:
        assert mine
        monkeypatch.setattr("opdlab.studies.launch.socket.gethostname", lambda: "elsewhere")
        launcher, seen = Launcher([spec], Cluster("debug"), jobs=1), []
        for run in launcher.run():
            if run is not None:
                seen.append(run.state)
            else:
                signal.raise_signal(signal.SIGINT)
            assert len(launcher.signals) < 10
    assert seen == ["running"]
    assert launcher.runs[0].state == "waiting"
    assert not (spec.path / "run.json").exists()


def test_half_an_evaluation_is_not_complete(whole: Path, tmp_path: Path) -> None:
    assert evaluation_is_complete(whole / "runs/none/seed-0/evaluations/val-step-2")
    assert not evaluation_is_complete(tmp_path)
    assert not evaluation_is_complete(tmp_path / "nothing")


def test_settings_of_earlier_versions_are_read(whole: Path, tmp_path: Path) -> None:
    """They were flat, by the text that messages showed; so archives of studies stay finished."""
    run = shutil.copytree(whole / "runs/none/seed-0", tmp_path / "run")
    for place in run.glob("evaluations/*/settings.json"):
        content = json.loads(place.read_text())
        now = content["compared"]
        assert now["data"]["benchmarks"]["toy"]["num_problems"] == 3
        benchmarks = {
            f"data.benchmarks.{name} ({key})": value
            for name, benchmark in now["data"].pop("benchmarks").items()
            for key, value in benchmark.items()
        }
        weights = {f"model.{who} (its weights)": now["model"].pop(who)["weights"] for who in ("student", "teacher")}
        place.write_text(json.dumps(content | {"compared": {**flat(now), **benchmarks, **weights}}))
        original = whole / "runs/none/seed-0" / place.parent.relative_to(run)
        assert read_settings(place.parent) == read_settings(original) != {}
    assert StudyRun(run, (2, 4)).finished
    lines = run / "evaluations/val-step-4/toy-0.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    assert not StudyRun(run, (2, 4)).finished


@pytest.mark.slow
def test_a_study_stopped_and_killed_on_the_way_ends_the_same(tmp_path: Path, whole: Path) -> None:
    """Real processes: SIGTERM to the study while both runs train, SIGKILL to a run, then to its end."""
    file = write(tmp_path, variants=content()["variants"], seeds=[0])
    folder = tmp_path / "runs/studies/tiny"
    token = StudyRun(folder / "runs/token/seed-0", (2, 4))
    study = start_study(file)
    until(lambda: any(folder.glob("runs/*/*/samples/*/val-step-0/toy-0.jsonl")))
    study.terminate()
    assert "to go on, run the same command" in study.communicate()[1]
    assert study.returncode == 128 + signal.SIGTERM
    assert token.holder is None
    study = start_study(file)
    until(lambda: token.holder is not None and any(token.path.glob("samples/*/val-step-2/toy-0.jsonl")))
    holder = token.holder
    assert holder is not None
    os.kill(int(holder["pid"]), signal.SIGKILL)
    assert "token seed 0 failed" in study.communicate()[1]
    assert study.returncode == 1
    study = start_study(file)
    until(lambda: token.holder is not None and StudyRun(folder / "runs/none/seed-0", (2, 4)).finished)
    study.kill()
    study.communicate()
    until(lambda: token.holder is None, seconds=10)
    study = start_study(file)
    study.communicate()
    assert study.returncode == 0
    theirs = {file: text for file, text in lines(whole).items() if "seed-0" in file}
    assert lines(folder) == theirs
