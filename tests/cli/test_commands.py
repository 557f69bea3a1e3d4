"""The table of commands: the list, the imports, and a help text for every command."""

import io
import sys
from pathlib import Path

import pytest

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.commands import COMMANDS, Command
from opdlab.objectives import objective_names
from opdlab.version import __version__
from tests.children import run_child

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers")


def imported_by(*arguments: str) -> tuple[str, set[str]]:
    """What ``opdlab ARGUMENTS`` prints, and which heavy packages it imports."""
    code = (
        "import sys\nfrom opdlab.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = run_child(command, cwd=ROOT, check=True)
    shown, _, names = done.stdout.rpartition("imported:")
    return shown, set(names.split())


def test_help_and_version_are_there_at_once() -> None:
    shown, imported = imported_by("--help")
    assert imported == set()
    for name, command in COMMANDS.items():
        assert name in shown.split()
        assert command.summary in " ".join(shown.split())
    assert imported_by("--version") == (f"opdlab {__version__}\n", set())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_line_before_the_imports(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, before = io.StringIO(), []
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)

    def run(*_: object) -> int:
        before.append(shown.getvalue())
        return 0

    monkeypatch.setattr(Command, "__call__", run)
    assert main(["gates"]) == 0
    assert before == ["opdlab gates: loading libraries\n" if terminal else ""]


def test_gates_are_listed_without_lightning_and_transformers() -> None:
    shown, imported = imported_by("gates")
    assert "block64" in shown
    assert imported == {"torch"}


def test_objectives_are_listed_with_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["objectives"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == objective_names()
    assert all(text.endswith(".") and len(text) < 120 for text in lines.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: opdlab {name} ")
    assert COMMANDS[name].summary in " ".join(shown.split())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_refuses_what_it_does_not_know(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--quux", "1"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "quux" in error
    assert name == "study" or f"opdlab {name} --help" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "",
            "give a command: fit, validate, test, screen, estimate, gates, objectives, configs, init, serve-teacher, "
            "export, report, study, replay; see opdlab --help",
        ),
        ("fti", "unknown command 'fti'; did you mean 'fit'? commands: fit, "),
        ("foo", "unknown command 'foo'; commands: fit, validate, "),
        ("--quux", "unrecognized arguments: --quux; see opdlab --help"),
        (
            "fit",
            "model.student, model.teacher, model.objective, model.gate, data.train are missing: give class paths, or "
            "start from a shipped configuration, for example -c quickstart\n",
        ),
    ],
)
def test_a_hint_is_given_once(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"opdlab: error: {words}")
    assert len(error.splitlines()) == 1
    hint = error.rpartition("; ")[2]
    assert error.count(hint) == 1


def test_the_reader_of_a_pipe_may_end_first() -> None:
    reader = "import sys; sys.stdin.close()"
    command = (
        f'"{sys.executable}" -u -m opdlab gates | "{sys.executable}" -c "{reader}"; echo "code ${{PIPESTATUS[0]}}"'
    )
    ended = run_child(["bash", "-c", command], check=True)
    assert (ended.stdout, ended.stderr) == ("code 141\n", "")


def test_the_help_of_fit_lists_gates_and_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "block64              Gate on blocks of 64 tokens: the paper's Block64.\n" in shown
    assert "\nteacher_topk  " in shown
    assert "\n  --optimizer" not in shown  # there is --model.optimizer
    assert "--model.optimizer" in shown
