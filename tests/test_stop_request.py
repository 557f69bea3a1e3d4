"""Signals between processes, and the time until a stopped process has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opdlab.processes import StopAt, StopRequest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def test_a_process_that_another_one_ends_passes_signals_on() -> None:
    request = StopRequest()
    for when in (StopAt.ONCE, StopAt.STEP_END):
        with subprocess.Popen(["sleep", "60"]) as first, request.listening((signal.SIGTERM,)):
            request.forward_to, request.when = first.pid, when
            signal.raise_signal(signal.SIGTERM)
            if when is StopAt.STEP_END:  # agreed on when the step ends; what is left then is passed on
                assert (request.signum, first.poll()) == (signal.SIGTERM, None)
                request.when = StopAt.ONCE
                request.check()
            assert first.wait(timeout=50) == -signal.SIGTERM
            assert request.signum is None
            signal.raise_signal(signal.SIGTERM)  # the first process is gone


def test_a_signal_is_noted_though_nobody_reads_standard_error() -> None:
    code = (
        "import os, signal\nfrom opdlab.processes import STOP, StopAt\nreading, writing = os.pipe()\n"
        "os.dup2(writing, 2)\nos.close(reading)\nwith STOP.listening():\n    STOP.when = StopAt.STEP_END\n"
        "    signal.raise_signal(signal.SIGTERM)\n    raise SystemExit(STOP.signum)"
    )
    assert _ended(_run(code), 60) == (signal.SIGTERM, "")


def _run(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _ended(process: "subprocess.Popen[str]", seconds: float) -> tuple[int, str]:
    try:
        return process.wait(timeout=seconds), process.stderr.read() if process.stderr else ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


STUCK = """
import signal, time
from opdlab import processes
processes.END_SECONDS = 1.0
processes.tie_to_others()
with processes.STOP.listening():
    processes.STOP.when = processes.StopAt.{when}
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize("when", ["ONCE", "STEP_END"])
def test_a_stopped_process_that_does_not_end_is_killed(when: str) -> None:
    process = _run(STUCK.format(when=when))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    if when == "STEP_END":
        time.sleep(1.5)
        assert process.poll() is None  # a step may take long; only a second signal does not wait for its end
        process.send_signal(signal.SIGTERM)
    code, said = _ended(process, 50)
    assert code == 128 + signal.SIGTERM
    assert "opdlab: stopped by SIGTERM, and killed: it had not ended in 1 s" in said


DROPPING = """
import time
from opdlab import processes
class Slow:
    def __del__(self):
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            {wait}
processes.tie_to_others()
with processes.STOP.listening():
    slow = Slow()
    print("ready", flush=True)
    try:
        del slow
        time.sleep(60)
    except processes.Stopped as stopped:
        raise SystemExit(128 + stopped.signum)
"""


@pytest.mark.parametrize("wait", ["pass", "time.sleep(0.001)"])  # the thread that sends it again waits, or hardly does
def test_a_signal_in_a_destructor_is_followed_after_it(wait: str) -> None:
    """Python would print the exception, and go on."""
    process = _run(DROPPING.format(wait=wait))
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert _ended(process, 50) == (128 + signal.SIGTERM, "")


def test_a_process_that_hangs_at_its_end_is_killed() -> None:
    code = "import atexit, time; from opdlab import processes; processes.END_SECONDS = 1.0; "
    process = _run(code + "atexit.register(time.sleep, 60); processes.bound_exit()")
    assert _ended(process, 50)[0] == -signal.SIGALRM


def test_the_processes_of_a_run_end_with_the_first_one() -> None:
    tied = "from opdlab.processes import tie_to_others; import os, sys, time; tie_to_others(); "
    other = [sys.executable, "-c", tied + "print(os.getpid(), flush=True); time.sleep(60)"]
    start = "import subprocess; os.environ['LOCAL_RANK'] = '1'; "
    process = _run(f"{tied}{start}subprocess.Popen({other!r}); time.sleep(60)", LOCAL_RANK="0")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    killed = time.monotonic()
    process.communicate()  # returns when the other one has closed the pipe too
    assert time.monotonic() - killed < 50
