"""Runs that another study has finished are copied, and no others."""

import json
from pathlib import Path
from typing import Any

import pytest

from opdlab.locks import locked
from opdlab.studies.plan import take_over
from opdlab.studies.schema import RUN, StudyRun
from tests.studies.tiny import lines, plan, study_run, write

NONE = {"name": "none", "overrides": ["--model.gate=none"]}
PLAIN = {"name": "plain", "overrides": ["--model.gate=none"], "label": "the same by another name"}
TOKEN = {"name": "token", "overrides": ["--model.gate=token", "--model.gate.tau=100"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one variant and one seed, finished."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert study_run(monkeypatch, write(folder, variants=[NONE], seeds=[0])) == 0
    return folder / "runs/studies/tiny"


def test_equal_runs_are_taken_over_whatever_their_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "runs/none/seed-0/version_0/results.json").write_text('{"state": "collapsed"}')
    file = write(tmp_path, variants=[PLAIN], baseline="plain", seeds=[0])
    assert study_run(monkeypatch, file, "--share", str(finished)) == 0
    output = capsys.readouterr().out
    assert "1 runs taken over" in output
    assert "1 of 1 runs finished" in output
    study = tmp_path / "runs/studies/tiny"
    assert output.endswith(f"all runs are in {study}\n")  # one variant: nothing to compare
    assert list(lines(study).values()) == list(lines(finished).values()) != []
    record = json.loads((study / "runs/plain/seed-0/run.json").read_text())
    assert record["variant"] == "plain"
    assert StudyRun(study / "runs/plain/seed-0", (2, 4)).collapsed
    assert record["taken_from"] == str(finished / "runs/none/seed-0")
    assert study_run(monkeypatch, file, "--share", str(finished)) == 0  # no run is left to copy
    assert "taken over" not in capsys.readouterr().out


def test_every_share_counts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several folders after one ``--share``, and several of them."""
    empty = tmp_path / "empty"
    empty.mkdir()
    plan(empty, variants=[TOKEN], baseline="token", seeds=[5]).settle()
    file = write(tmp_path, variants=[NONE], seeds=[0])
    shares = ["--share", str(finished), str(empty / "study"), "--share", str(empty / "study")]
    assert study_run(monkeypatch, file, *shares, "--folder", "[bold]") == 0
    output = capsys.readouterr().out
    assert "1 runs taken over" in output
    assert f"; {tmp_path}/[bold]\n" in output  # no markup


@pytest.mark.parametrize(
    "changes",
    [
        {"variants": [TOKEN], "baseline": "token"},
        {"seeds": [1]},
        {"budgets": [1, 2, 4]},
        {"threads": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_runs_are_not(finished: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    wanted = plan(tmp_path, **{"variants": [NONE], "seeds": [0], **changes})
    assert take_over(wanted.runs(), [finished]) == 0
    assert not list(tmp_path.rglob(RUN))


def test_nor_is_half_a_run_or_one_of_other_versions(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(tmp_path, variants=[NONE], seeds=[0])
    record = finished / "runs/none/seed-0" / RUN
    content = json.loads(record.read_text())
    assert content["versions"].keys() >= {"python", "opdlab", "torch", "transformers", "lightning"}
    for package in ("opdlab", "torch"):
        record.write_text(json.dumps(content | {"versions": content["versions"] | {package: "0.0.1"}}))
        assert take_over(wanted.runs(), [finished]) == 0
    record.write_text(json.dumps(content))
    samples = finished / "runs/none/seed-0/evaluations/val-step-4/toy-0.jsonl"
    text = samples.read_text()
    samples.write_text(text[: text.rindex("{")])  # one line missing
    assert take_over(wanted.runs(), [finished]) == 0
    samples.write_text(text)
    monkeypatch.chdir(finished)
    assert take_over(wanted.runs(), [Path()]) == 1
    copied = StudyRun(tmp_path / "study/runs/none/seed-0", (2, 4)).record
    assert copied.taken_from == str(finished / "runs/none/seed-0")  # also where the command ran in the other study


def test_nor_does_one_replace_a_run_that_has_begun(finished: Path, tmp_path: Path) -> None:
    """Stopped, or running in a process that an earlier launcher has left."""
    wanted = plan(tmp_path, variants=[NONE], seeds=[0])
    (spec,) = wanted.runs()
    with locked(spec.path) as mine:
        assert mine
        assert take_over([spec], [finished]) == 0
    (spec.path / "version_0/checkpoints").mkdir(parents=True)
    assert take_over([spec], [finished]) == 0
    assert not (spec.path / "evaluations").exists()
