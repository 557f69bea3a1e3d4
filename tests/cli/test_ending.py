"""What ends a run whose other process has an error, without models: the launcher has a small program as process."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from opdlab.cli.ending import run_to_end
from opdlab.errors import OtherProcessError
from opdlab.processes import STOP

REPORTS = "import os; from opdlab.processes import STOP, report_error; STOP.forward_to = os.getppid(); "
BROKEN = f"{REPORTS} report_error('broken on purpose', 2); raise SystemExit(2)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
WAITING = "import time; time.sleep(60)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a function in this process while others run programs."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("opdlab.cli.ending._REPORT_SECONDS", 60.0)  # a program starts slowly on a slow machine
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    strategy = SimpleNamespace(launcher=launcher)
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=0, is_global_zero=True, global_step=0)

    def run(function: Callable[[], None], *programs: str) -> int:
        def started() -> None:
            launcher.procs += [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
            function()

        with STOP.listening():
            try:
                return run_to_end(started, trainer, tmp_path, str)
            finally:
                assert all(process.poll() is not None for process in launcher.procs)

    return run


def busy() -> None:
    """Compute for long, without a word from the other process."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)


def lost() -> None:
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("function", [busy, lost])
@pytest.mark.parametrize(
    ("program", "message", "code"),
    [
        (BROKEN, "process 1: broken on purpose", 2),
        (KILLED, "process 1: killed by SIGKILL, as a system does that lacks memory", 1),
        ("raise SystemExit(3)", "process 1: ended with exit code 3", 3),
    ],
)
def test_an_error_of_another_process_is_raised(
    run: Callable[..., int], function: Callable[[], None], program: str, message: str, code: int
) -> None:
    with pytest.raises(OtherProcessError) as caught:
        run(function, program, WAITING)
    assert (str(caught.value), caught.value.code) == (message, code)


def test_an_error_when_this_process_has_done_its_part_is_raised(run: Callable[..., int]) -> None:
    with pytest.raises(OtherProcessError, match="process 2: broken on purpose"):
        run(lambda: None, "pass", BROKEN)


def test_an_own_error_is_raised_and_ends_the_others(run: Callable[..., int]) -> None:
    def broken() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        run(broken, WAITING)


def test_processes_without_an_error_end_with_this_one(run: Callable[..., int]) -> None:
    assert run(lambda: None, "pass", "pass") == 0
