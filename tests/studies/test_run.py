"""Runs of a study: paired, finished once, and the same however often they were killed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from opdlab.cli import EXIT_USAGE
from opdlab.evaluation.samples import SampleFolder
from opdlab.module import OPDModule
from opdlab.studies.folder import RunFolder, evaluation_is_complete
from opdlab.studies.job import Job, RunSpec
from opdlab.studies.launch import Cluster, Launcher
from opdlab.studies.plan import make_plan
from opdlab.studies.progress import StepFile
from opdlab.studies.study import read_study
from tests.studies.tiny import content, lines, study_run, write

# submitit's debug executor leaves its log files for the garbage collector to close.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*DEBUG_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*DEBUG_:pytest.PytestUnraisableExceptionWarning"),
]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every run finished, and the prompts that each run sampled from, in their order."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        collect = OPDModule.collect

        def recorded(self: OPDModule, prompts: Any, **options: Any) -> Any:
            record = [[prompt.problem.id for prompt in prompts], options["seed"]]
            with (Path(self.trainer.default_root_dir) / "pools.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            return collect(self, prompts, **options)

        monkeypatch.setattr(OPDModule, "collect", recorded)
        assert study_run(monkeypatch, write(folder)) == 0
    return folder / "runs/studies/tiny"


def test_variants_with_one_seed_are_paired(whole: Path) -> None:
    for seed in (0, 1):
        none, token = (whole / f"runs/{name}/seed-{seed}" for name in ("none", "token"))
        assert (none / "pools.jsonl").read_text() == (token / "pools.jsonl").read_text() != ""
        for step in (2, 4):
            theirs, ours = (keys(run, step) for run in (none, token))
            assert theirs == ours
            assert len(theirs) == 6
    assert pools(whole, 0)[0][0] != pools(whole, 1)[0][0]  # other prompts first
    assert pools(whole, 0)[0][1] != pools(whole, 1)[0][1]  # sampled with another seed
    first, other = (keys(whole / f"runs/none/seed-{seed}", 4) for seed in (0, 1))
    assert [key[:2] for key in first] == [key[:2] for key in other]  # the same problems
    assert not {key[2] for key in first} & {key[2] for key in other}
    assert (
        lines(whole)["runs/none/seed-0/evaluations/val-step-4/toy-0.jsonl"]
        != (lines(whole)["runs/token/seed-0/evaluations/val-step-4/toy-0.jsonl"])
    )


def keys(run: Path, step: int) -> list[tuple[str, int, int]]:
    samples = map(json.loads, (run / f"evaluations/val-step-{step}/toy-0.jsonl").read_text().splitlines())
    return [(sample["id"], sample["sample"], sample["seed"]) for sample in samples]


def pools(study: Path, seed: int) -> list[Any]:
    return [json.loads(line) for line in (study / f"runs/none/seed-{seed}/pools.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_report_needs_and_no_more(whole: Path) -> None:
    run = whole / "runs/none/seed-1"
    record = json.loads((run / "run.json").read_text())
    assert (record["variant"], record["seed"], record["state"]) == ("none", 1, "finished")
    assert record["command"][:2] == ["opdlab", "fit"]
    assert record["seconds"] > 0
    assert record["versions"]["torch"] == torch.__version__
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
    missing.write_text(text[: text.rindex("{")])  # a line less
    assert not RunFolder(missing.parents[2], (2, 4)).finished
    missing.write_text(text)
    assert RunFolder(missing.parents[2], (2, 4)).finished


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
    assert study_run(monkeypatch, file) == 1  # tried again, it alone
    captured = capsys.readouterr()
    assert "1 of 2 runs finished" in captured.out
    assert "few seed 0: running" in captured.out


def test_two_on_one_folder_are_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opdlab.cli.study import _alone

    with _alone(whole):
        assert study_run(monkeypatch, write(whole.parents[2])) == EXIT_USAGE
    assert "is in use by another `opdlab study run`" in capsys.readouterr().err


# -- killed -----------------------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_evaluation(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill after the first batch of the evaluation at a step is written."""
    write = SampleFolder.write

    def killing(self: SampleFolder, samples: Any) -> None:
        write(self, samples)
        if self.path.name == f"val-step-{step}":
            kill()

    monkeypatch.setattr(SampleFolder, "write", killing)


def in_training(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill at the end of a step."""

    def killing(self: StepFile, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == step:
            kill()

    monkeypatch.setattr(StepFile, "on_train_batch_end", killing)


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return make_plan(read_study(write(tmp_path)), tmp_path / "study").runs()[1]


# Checkpoints are written at steps 2 and 4, so that the evaluations there are due when a run goes on from them.
@pytest.mark.parametrize(
    "kills",
    [
        [(in_evaluation, 0), (in_training, 1)],
        [(in_training, 3), (in_evaluation, 4)],
        [(in_evaluation, 2), (in_training, 3)],
    ],
    ids=["before-the-first-checkpoint", "in-training-and-at-the-end", "in-an-evaluation"],
)
def test_a_run_killed_twice_writes_the_same_lines(
    spec: RunSpec, whole: Path, kills: list[tuple[Callable[..., None], int]]
) -> None:
    for place, step in kills:
        with pytest.MonkeyPatch.context() as monkeypatch:
            place(step, monkeypatch)
            process = FORK.Process(target=Job(), args=(spec,))
            process.start()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not spec.run_folder.finished
        assert not (spec.folder / "evaluations").exists()
        assert spec.run_folder.holder is None
    Job()(spec)
    assert spec.run_folder.finished, (spec.folder / "log.txt").read_text()
    ours = {file: text for file, text in lines(spec.folder.parents[2]).items() if "token/seed-0" in file}
    theirs = {file: text for file, text in lines(whole).items() if "token/seed-0" in file}
    assert ours == theirs
    assert len(ours) == 3


def test_a_run_that_somebody_has_is_left_alone_and_waited_for(spec: RunSpec) -> None:
    with spec.run_folder.locked() as mine:
        assert mine
        assert spec.run_folder.holder == {"pid": os.getpid(), "host": os.uname().nodename}
        Job()(spec)  # returns at once
        assert not (spec.folder / "run.json").exists()

        class Watcher:
            seen: list[str] = []  # noqa: RUF012

            def changed(self, run: Any) -> None:
                self.seen.append(run.state)

            def tick(self) -> None:
                launcher._note(signal.SIGTERM, None)

        launcher = Launcher([spec], Cluster("debug"), jobs=1)
        told: list[int] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("opdlab.studies.launch._terminate", lambda pid, job: told.append(pid))
            monkeypatch.setattr(launcher, "_is_over", lambda run: bool(told))
            assert launcher.run(Watcher()) == signal.SIGTERM
    assert Watcher.seen == ["running", "waiting"]
    assert told == [os.getpid()]


def test_half_an_evaluation_is_not_complete(whole: Path, tmp_path: Path) -> None:
    assert evaluation_is_complete(whole / "runs/none/seed-0/evaluations/val-step-2")
    assert not evaluation_is_complete(tmp_path)
    assert not evaluation_is_complete(tmp_path / "nothing")


@pytest.mark.slow
def test_a_study_stopped_and_killed_on_the_way_ends_the_same(tmp_path: Path, whole: Path) -> None:
    """Real processes: SIGTERM to the study while both runs train, SIGKILL to a run, then to its end."""
    file = write(tmp_path, variants=content()["variants"], seeds=[0])
    folder = tmp_path / "runs/studies/tiny"
    command = [sys.executable, "-c", "from opdlab.cli import console; console()", "study", "run", str(file)]

    def start() -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, "--jobs", "2"], cwd=tmp_path, env=environment, stderr=pipe, text=True)

    def until(holds: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < 120
            time.sleep(0.02)

    token = RunFolder(folder / "runs/token/seed-0", (2, 4))
    study = start()
    until(lambda: any(folder.glob("runs/*/*/samples/*/val-step-0/toy-0.jsonl")))
    study.terminate()
    assert "to go on, run the same command" in study.communicate()[1]
    assert study.returncode == 128 + signal.SIGTERM
    assert token.holder is None
    study = start()
    until(lambda: token.holder is not None and any(token.path.glob("samples/*/val-step-2/toy-0.jsonl")))
    holder = token.holder
    assert holder is not None
    os.kill(int(holder["pid"]), signal.SIGKILL)
    assert "token seed 0 failed" in study.communicate()[1]
    assert study.returncode == 1
    study = start()
    study.communicate()
    assert study.returncode == 0
    theirs = {file: text for file, text in lines(whole).items() if "seed-0" in file}
    assert lines(folder) == theirs
