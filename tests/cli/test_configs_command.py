"""``opdlab configs``: the list, and copies that mean the same as the original."""

import re
from pathlib import Path

import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.config_files import flattened
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.cli.shipped import shipped_configs

EXTENDING = [name for name, path in shipped_configs().items() if re.search("^extends:", path.read_text(), re.M)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_shipped_configuration_has_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["configs"]) == 0
    printed = capsys.readouterr().out
    assert main(["configs", "list"]) == 0
    assert capsys.readouterr().out == printed
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(lines) == list(shipped_configs())
    assert all(20 < len(text) < 150 and "-c " not in text for text in lines.values()), lines
    assert lines["quickstart"].startswith("Distil the toy student from the toy teacher")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", [("configs",), ("gates",), ("objectives",), ("study", "list")])
def test_a_list_is_as_wide_as_the_terminal(
    command: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(command) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= columns
    assert "".join(narrow.split()) == "".join(whole.split())


@pytest.mark.parametrize("name", ["quickstart", "loggers/csv", *EXTENDING])
def test_a_copy_keeps_comments_and_meaning(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "copy", name]) == 0
    copy = folder / shipped_configs()[name].name
    how = (
        "stack it on a configuration: opdlab fit -c quickstart" if name == "loggers/csv" else "run it with: opdlab fit"
    )
    assert f"wrote {copy.name}; {how} -c {copy.name}" in capsys.readouterr().out
    original = shipped_configs()[name].read_text()
    assert re.findall("#.*", copy.read_text()) == re.findall("#.*", original)
    assert flattened(fit_parser(), str(copy)) == flattened(fit_parser(), name)


@pytest.mark.parametrize("name", ["gates/span", *EXTENDING])
def test_a_flat_copy_stands_alone(name: str, folder: Path) -> None:
    assert main(["configs", "copy", name, "mine.yaml", "--flat"]) == 0
    text = (folder / "mine.yaml").read_text()
    assert text.startswith(f"# {name}, with all that it extends: ")
    assert "extends" not in yaml.safe_load(text)
    over = [] if {"student", "gate", "objective"} <= yaml.safe_load(text)["model"].keys() else ["-c", "quickstart"]
    copied, original = (parse_fit([*over, "-c", each]) for each in ("mine.yaml", name))
    del copied.config, original.config
    assert copied == original


def test_the_copy_of_a_file_of_ones_own_extends_the_same_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/below.yaml").write_text("extends: gates/token\ntrainer: {max_steps: 3}\n")
    (folder / "sub/top.yaml").write_text("# kept\nextends: [below, quickstart] # twice\nseed_everything: 4\n")
    assert main(["configs", "copy", "sub/top.yaml", "copy.yaml"]) == 0
    assert yaml.safe_load((folder / "copy.yaml").read_text())["extends"] == [
        str(folder / "sub/below.yaml"),
        "quickstart",
    ]
    assert flattened(fit_parser(), "copy.yaml") == flattened(fit_parser(), "sub/top.yaml")


def test_a_name_with_characters_of_yaml_and_of_the_shell_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a: b #c").mkdir()
    (folder / "a: b #c/below.yaml").write_text("trainer: {max_steps: 3}\n")
    (folder / "a: b #c/top.yaml").write_text("extends: below\n")
    assert main(["configs", "copy", "a: b #c/top.yaml", "--flat", "my flat.yaml"]) == 0
    assert "opdlab fit -c 'my flat.yaml'" in capsys.readouterr().out
    assert main(["configs", "copy", "a: b #c/top.yaml", "new/"]) == 0
    assert yaml.safe_load((folder / "new/top.yaml").read_text()) == {"extends": str(folder / "a: b #c/below.yaml")}


def test_a_copy_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "copy", "quickstart", "toy.yaml"]) == 0
    few = "--trainer.max_steps 1 --model.sampling.max_new_tokens 8 --trainer.limit_val_batches 0 --export.enabled false"
    assert main(["fit", "-c", "toy.yaml", *few.split(), "--trainer.enable_progress_bar", "false"]) == 0
    assert "run folder: runs/quickstart/version_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("copy", "the following arguments are required: NAME; see opdlab configs copy --help"),
        ("copy quickstrat", "did you mean 'quickstart'?"),
        ("copy quickstart there.yaml", "FILE is there.yaml, which exists: give another name after NAME, or remove it"),
        ("copy quickstart there.yaml --flat", "FILE is there.yaml, which exists"),
        ("copy quickstart there.yaml/sub.yaml", "FILE is there.yaml/sub.yaml, which cannot be written: "),
        ("copy there.yaml other.yaml", "there.yaml, line 2"),
        ("show quickstart", "unrecognized arguments: show quickstart; see opdlab configs --help"),
    ],
)
def test_wrong_calls(arguments: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "there.yaml").write_text("a: [1\n")
    assert main(["configs", *arguments.split()]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert (folder / "there.yaml").read_text() == "a: [1\n"
