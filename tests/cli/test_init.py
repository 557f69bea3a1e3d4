"""``opdlab init``: the project that it writes runs and passes its own tests."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from opdlab.cli import EXIT_USAGE, main

MODULES = ("my_gate", "my_objective", "my_verifier")


def test_the_project_runs_and_its_tests_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "sub/mine"]) == 0
    assert "cd sub/mine && opdlab fit -c config.yaml" in capsys.readouterr().out
    folder = tmp_path / "sub/mine"
    assert len((folder / "README.md").read_text().splitlines()) <= 10
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    few = "--trainer.max_steps 2 --model.sampling.max_new_tokens 16 --model.eval_sampling.max_new_tokens 16"
    few += " --trainer.enable_progress_bar false --model.eval_sampling.num_samples 4 --export.enabled false"
    assert main(["fit", "-c", "config.yaml", *few.split()]) == 0
    assert "mine/pass@1" in capsys.readouterr().out
    assert json.loads((folder / "runs/version_0/results.json").read_text())["state"] == "finished"
    tests = runpy.run_path(str(folder / "test_mine.py"))
    for name in ("test_gate", "test_objective", "test_verifier"):
        tests[name]()
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_next_command_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mein projekt"]) == 0
    assert "run it with: cd 'mein projekt' && opdlab fit -c config.yaml;" in capsys.readouterr().out


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for given, words in (
        (tmp_path, "which is there and not empty: give a new folder"),
        (tmp_path / "notes.txt", "empty"),
        ("", "FOLDER is empty: give the name of a new folder"),
    ):
        assert main(["init", str(given)]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
