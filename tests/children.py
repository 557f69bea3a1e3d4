"""Child processes of tests."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def run_child(
    command: Sequence[str], *, check: bool = False, timeout: float = 240, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its exit code and its texts.

    If it does not end in time, the whole process group is killed. ``subprocess.run`` would kill the first process only
    and then wait for ever for a pipe that another process of the command, such as a second rank, keeps open.

    Args:
        command: program and arguments.
        check: fail if the exit code is not 0.
        timeout: seconds.
        options: of :class:`subprocess.Popen`.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **{**pipes, **options}) as child:
        try:
            texts = child.communicate(timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = child.communicate()
            raise AssertionError(f"{' '.join(command)} did not end within {timeout} s; it said: {said}") from error
    done = subprocess.CompletedProcess(command, child.returncode, *texts)
    assert not check or done.returncode == 0, (done.returncode, done.stderr)
    return done
