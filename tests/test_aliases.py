"""Old names in saved configurations: configurations from before a renaming still load."""

import copy
import importlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.aliases import PATHS, migrate, migrate_text, warn_of_old_names
from opdlab.cli import EXIT_USAGE, main
from opdlab.errors import UsageError
from opdlab.evaluation import SampleFolder
from opdlab.records import read_settings

ROOT = Path(__file__).parents[1]
OLD: dict[str, Any] = {
    "model": {
        "student": {"init_args": {"path": "package://opdlab.tasks.toy/models/student"}},
        "max_tokens_per_microbatch": 1024,
    },
    "data": {
        "train": {"class_path": "opdlab.tasks.toy.problems.ChainProblems", "init_args": {"num_problems": 8}},
        "benchmarks": {
            "mine": {
                "class_path": "opdlab.data.JsonlProblems",
                "init_args": {"path": "mine.jsonl", "verifier": {"class_path": "opdlab.tasks.MathVerifier"}},
            }
        },
    },
    "optimizer": None,
    "lr_scheduler": None,
}


def test_a_saved_configuration_gets_the_new_names() -> None:
    before = copy.deepcopy(OLD)
    new = migrate(OLD)
    assert before == OLD
    assert new["model"] == {
        "student": {"init_args": {"path": "package://opdlab.toy/models/student"}},
        "max_tokens_per_pass": 1024,
    }
    assert new["data"]["train"]["class_path"] == "opdlab.toy.ChainProblems"
    assert new["data"]["benchmarks"]["mine"]["init_args"]["verifier"]["class_path"] == "opdlab.verifiers.MathVerifier"
    assert new.keys() == {"model", "data"}
    assert migrate(new) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("opdlab.tasks.verifier.BoxedVerifier", "opdlab.verifiers.verifier.BoxedVerifier"),
        ("opdlab.tasks.toy.chain.ChainProblem", "opdlab.toy.chain.ChainProblem"),
        (
            '--data.train={"class_path": "opdlab.tasks.toy.problems.ChainProblems"}',
            '--data.train={"class_path": "opdlab.toy.ChainProblems"}',
        ),
        ("--model.max_tokens_per_microbatch", "--model.max_tokens_per_pass"),
        ("--model.max_tokens_per_microbatch=8", "--model.max_tokens_per_pass=8"),
        ("--model.student.path=package://opdlab.tasks.toy/models", "--model.student.path=package://opdlab.toy/models"),
    ],
)
def test_texts(old: str, new: str) -> None:
    assert migrate_text(old) == new
    assert migrate_text(new) == new


@pytest.mark.parametrize(
    "text",
    ["runs/opdlab.tasks.old", "my.opdlab.tasks.Thing", "opdlab.tasks_of_mine.Thing", "model.max_tokens_per_microbatch"],
)
def test_other_texts_stay(text: str) -> None:
    assert migrate_text(text) == text


def test_flat_configurations_of_studies() -> None:
    flat = {"model.max_tokens_per_microbatch": None, "optimizer": None, "model.gate.class_path": "a.B"}
    assert migrate(flat) == {"model.max_tokens_per_pass": None, "model.gate.class_path": "a.B"}


def test_a_section_from_a_file_of_its_own_keeps_its_optimizer() -> None:
    section = {"optimizer": {"class_path": "torch.optim.SGD"}}
    assert migrate(section) == section


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {}, "optimizer": {"class_path": "torch.optim.SGD"}}, "optimizer is now model.optimizer"),
        ({"model": {"max_tokens_per_microbatch": 1, "max_tokens_per_pass": 2}}, "is now .*, and both are given"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        migrate(config)


def test_warnings_name_the_source_and_both_names_once() -> None:
    expected = "old.yaml has old names, which are read as the new ones: opdlab.tasks.toy is now opdlab.toy, "
    with pytest.warns(FutureWarning, match=expected) as caught:
        warn_of_old_names("old.yaml", OLD)
    (warning,) = caught
    assert str(warning.message).count("model.max_tokens_per_microbatch is now model.max_tokens_per_pass") == 1
    warn_of_old_names("new.yaml", migrate(OLD))  # no warning: a warning would be an error here


@pytest.mark.parametrize("new", PATHS.values())
def test_new_names_exist(new: str) -> None:
    importlib.import_module(new)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_command_line_reads_old_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"model": {"max_tokens_per_microbatch": 64}, "data": {"train": OLD["data"]["train"]}}
    (here / "old.yaml").write_text(yaml.safe_dump(old))
    arguments = ["estimate", "-c", "quickstart", "-c", "old.yaml"]
    with pytest.warns(FutureWarning) as caught:
        assert main([*arguments, "--model.teacher.path", "package://opdlab.tasks.toy/models/teacher"]) == 0
    assert sorted(str(warning.message).split(" has ")[0] for warning in caught) == ["old.yaml", "the command line"]
    with pytest.warns(FutureWarning):
        assert main([*arguments, "--model.max_tokens_per_microbatch", "0"]) == EXIT_USAGE
    assert "model.max_tokens_per_pass is 0" in capsys.readouterr().err


ARCHIVES = sorted((ROOT / "docs/results").glob("*/study.tar.xz"))


def archived(pattern: str) -> Iterator[Any]:
    for archive in ARCHIVES:
        with tarfile.open(archive) as file:
            for member in file:
                if member.isfile() and re.search(pattern, member.name):
                    content = file.extractfile(member)
                    assert content is not None
                    yield json.load(content)


def test_configurations_of_committed_studies_name_what_exists() -> None:
    paths = set()
    for config in archived(r"/variants/[^/]+\.json$"):
        migrated = migrate(config)
        assert "tasks" not in json.dumps(migrated)
        paths |= {value for key, value in migrated.items() if key.endswith("class_path")}
    assert "opdlab.toy.ChainProblems" in paths
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_samples_of_committed_studies_are_taken_up(tmp_path: Path) -> None:
    verifier = "data.benchmarks.toy (verifier)"
    # Only the older archives say what judged in this form.
    settings = next(settings for settings in archived(r"/settings\.json$") if verifier in settings["compared"])
    assert settings["compared"][verifier].startswith("opdlab.tasks.")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    new = read_settings(tmp_path)
    assert new is not None
    assert new["data"]["benchmarks"]["toy"]["verifier"] == 'opdlab.verifiers.verifier.BoxedVerifier {"at_end": true}'
    SampleFolder(tmp_path, {"compared": new}).close()
    new["data"]["benchmarks"]["toy"]["verifier"] = "mine.Verifier {}"
    with pytest.raises(UsageError, match="verifier"):
        SampleFolder(tmp_path, {"compared": new})
