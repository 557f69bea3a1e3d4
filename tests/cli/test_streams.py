"""Standard output and standard error that are closed, full, read by nobody, or of another encoding."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.children import run_child

OPDLAB = f'"{sys.executable}" -m opdlab'
UNREAD = f'"{sys.executable}" -c "import sys; sys.stdin.close()"'
FULL = "opdlab: error: standard output cannot be written, because its disk is full: send it to another file"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
SMALL = """
trainer: {accelerator: cpu, max_steps: 1, enable_model_summary: false}
model:
  sampling: {max_new_tokens: 8, num_samples: 1}
  eval_sampling: {max_new_tokens: 8, num_samples: 1}
  evaluation: {pass_at: [1]}
data:
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 4}}
  benchmarks:
    toy: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 4, split: held_out}}
  reuse: {prompts_per_pool: 4, epochs: 1, batch_size: 4}
"""


def shell(line: str, folder: Path) -> tuple[int, str, Sequence[str]]:
    """Run a line of bash; return the exit code of its first command, and what the line prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_child(["bash", "-c", f"{line}\nexit ${{PIPESTATUS[0]}}"], cwd=folder, env=environment)
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("configs >&-", 0, []),
        ("configs <&- >&- 2>&-", 0, []),
        ("foo 2>&-", 2, []),
        pytest.param("configs >/dev/full", 1, [FULL], marks=needs_full),
        pytest.param("configs --help >/dev/full", 1, [FULL], marks=needs_full),
        pytest.param("configs >/dev/full 2>/dev/full", 1, [], marks=needs_full),
        pytest.param("foo 2>/dev/full", 2, [], marks=needs_full),
    ],
)
def test_a_command_that_only_prints_says_what_it_cannot(
    line: str, code: int, error: Sequence[str], tmp_path: Path
) -> None:
    assert shell(f"{OPDLAB} {line}", tmp_path) == (code, "", error)


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    code, output, error = shell(f"PYTHONIOENCODING=ascii {OPDLAB} screen --help", tmp_path)
    assert (code, error) == (0, [])
    assert "\\u2026" in output


def test_child_processes_have_the_streams_that_are_closed(tmp_path: Path) -> None:
    """Without, the first file that is opened would get the number of a stream, and what is printed there."""
    program = (
        "import subprocess, sys\nfrom opdlab.cli import commands\n"
        "def main():\n    open('a.txt', 'w').close()\n"
        "    return subprocess.run([sys.executable, '-c', 'import sys; sys.exit(sys.stdout is None)']).returncode\n"
        "commands.main = main\ncommands.console()"
    )
    assert shell(f'"{sys.executable}" -c "{program}" >&-', tmp_path) == (0, "", [])


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        (f"2>&1 | {UNREAD}", 0),
        ("<&- >&- 2>&-", 0),
        pytest.param(">/dev/full 2>error.txt", 1, marks=needs_full),
    ],
)
def test_a_run_goes_on_without_its_streams(streams: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    assert shell(f"{OPDLAB} fit -c quickstart -c small.yaml {streams}", tmp_path) == (code, "", [])
    results = json.loads((tmp_path / "runs/quickstart/version_0/results.json").read_text())
    assert results["state"] == "finished"
    assert {"before", "after", "teacher"} <= results.keys()
    if code:
        assert (tmp_path / "error.txt").read_text().splitlines().count(FULL) == 1
