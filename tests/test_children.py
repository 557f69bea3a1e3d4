"""The helper that runs child processes in tests ends them, whatever they have started."""

import sys
import time

import pytest

from tests.children import run_child


def test_a_command_whose_child_keeps_the_pipe_open_is_ended() -> None:
    sleeper = f"import subprocess, time; subprocess.Popen(['{sys.executable}', '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"did not end within 2 s; it said: \('here\\n', ''\)"):
        run_child([sys.executable, "-u", "-c", f"{sleeper}; print('here'); time.sleep(60)"], timeout=2)
    assert time.monotonic() - started < 30


def test_a_failure_is_told_if_asked() -> None:
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3
    with pytest.raises(AssertionError, match="3, 'no"):
        run_child([sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"], check=True)
