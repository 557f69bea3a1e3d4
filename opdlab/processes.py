"""Signals that stop a process, the time until it has ended, and what ends a child process together with its parent.

Only the standard library is imported, so that a child process is tied to its parent before it loads slow libraries.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from opdlab.errors import Stopped, signal_name

# Ctrl-C, a scheduler, a closed terminal, and early warnings of schedulers. Windows lacks some.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
LIFELINE = "OPDLAB_LIFELINE"
_FIRST_PROCESS = "OPDLAB_FIRST_PROCESS"  # its number, for the processes of the same run that Lightning starts
REPORTS = "OPDLAB_REPORTS"
"""Environment variable with the folder in which these processes leave their errors for the first one."""
_AGAIN_SECONDS = 0.25  # seconds until a signal that came at a bad moment is sent again
_LOST_SECONDS = 2.0  # seconds in which a process notices that it has lost its connection to another
_SAME_SECONDS = 1.0  # seconds; a scheduler and the process that it watches may both signal the same stop
_LOCKING = ("logging", "threading", "queue", "weakref", "_weakrefset")  # modules that take locks, or run as hooks
_WAITING = ("wait", "join", "get", "_wait_for_tstate_lock")  # functions in them where a thread waits for long
END_SECONDS = 60.0
"""Seconds that a stopped process has for its end."""


@contextmanager
def catching_signals(
    handler: Callable[[int, FrameType | None], Any], signums: Sequence[int] = STOP_SIGNALS
) -> Iterator[dict[int, Any]]:
    """Install a handler for signals while the block runs; yields the previous handlers by signal.

    A signal that is ignored, as SIGHUP under ``nohup``, stays ignored. Nothing is installed outside the main thread,
    because Python delivers signals only there.

    Args:
        handler: see :func:`signal.signal`.
        signums: the signals.
    """
    main = threading.current_thread() is threading.main_thread()
    caught = [signum for signum in signums if main and signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in caught}
    try:
        yield before
    finally:
        for signum, former in before.items():
            signal.signal(signum, signal.SIG_DFL if former is None else former)  # None: not installed by Python


class StopAt(Enum):
    """When a signal stops this process."""

    ONCE = "at once"
    SAFE_POINT = "at a safe point: where sampling or scoring could be started again without loss"
    STEP_END = "when the step has ended: other processes, or half an update, must not be left behind"


class StopRequest:
    """The request to stop that a signal makes, and when it is followed.

    A second signal, at least a second later, always stops at once.

    Example:
        >>> request = StopRequest()
        >>> request.when = StopAt.SAFE_POINT
        >>> with request.listening((signal.SIGTERM,)):
        ...     signal.raise_signal(signal.SIGTERM)  # noted only; `request.check()` raises
        ...     request.signum
        15
    """

    def __init__(self) -> None:
        self.when = StopAt.ONCE
        self.signum: int | None = None
        """The signal; None without a request."""
        self.forward_to: int | None = None
        """First process of the run, which ends this one: what would stop this process at once is sent there."""
        self.deadline: float | None = None
        """When the process must have ended, by :func:`time.monotonic`; None while it may go on."""
        self.failure: Exception | None = None
        """Error of another process, which the next signal raises, see :meth:`fail`; None once it was raised."""
        self.postponed: int | None = None
        """Signal that came where an exception would be lost; :func:`_watch_deadline` sends it again."""
        self.tries = 0
        """How often a signal may be sent again, one after the other; 0 if nobody sends it."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self, signums: Sequence[int] = STOP_SIGNALS) -> Iterator[None]:
        """Let signals make requests while the block runs; an outer block of the same kind goes on instead."""
        if self._before:
            yield
            return
        with catching_signals(self.handle, signums) as self._before:
            try:
                yield
            finally:
                self.when, self.signum, self.forward_to, self.deadline = StopAt.ONCE, None, None, None
                self._before, self.postponed, self.failure = {}, None, None

    def handle(self, signum: int, frame: FrameType | None = None) -> None:
        """Make a request: the handler of the signals.

        Raises:
            Stopped: the request is followed at once.
            Exception: the error of :meth:`fail`.
        """
        if self.failure is not None:
            if not _is_lost(frame):
                failure, self.failure = self.failure, None
                raise failure
            return
        first, now = self.signum is None, time.monotonic()
        if not first and now - self._since < _SAME_SECONDS:
            return
        noted = first and self.when is not StopAt.ONCE
        if not noted and self.forward_to is None and self.tries > 0 and _is_lost(frame):
            self.tries, self.postponed = self.tries - 1, signum
            return
        self._since = now
        if noted:
            self.signum = signum
            # Not through `print` or logging: the signal may have come inside one of them.
            note = f"{signal_name(signum)}: stopping after this step or sampling call (again to stop at once)"
            write_error(f"\n{note}")
        else:
            self._follow(signum)

    def fail(self, error: Exception, ended: threading.Event, seconds: float) -> bool:
        """Raise the error of another process in the main thread, from a thread that watches the others.

        A main thread that waits for the other process gets an error of its own, so it has time for that first.

        Args:
            error: is raised.
            ended: set when the main thread ends with an error.
            seconds: until giving up.

        Returns:
            True if the main thread ends; False if it hangs in a library.
        """
        if ended.wait(_LOST_SECONDS):
            return True
        self.failure = error
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.failure is not None:  # not raised yet, or the signal came at a bad moment
                os.kill(os.getpid(), signal.SIGTERM)
            if ended.wait(1.0):
                return True
        return False

    def check(self) -> None:
        """Follow a request, at a safe point; also one whose exception was lost in a library.

        Raises:
            Stopped: there is a request.
        """
        if self.signum is not None and self.when is not StopAt.STEP_END:
            self._follow(self.signum)

    def _follow(self, signum: int) -> None:
        if self.forward_to is None:
            self.signum = signum
            raise Stopped(signum)
        self.signum = None
        # A process that ends alone leaves the others waiting; the first one ends all.
        with suppress(ProcessLookupError):
            os.kill(self.forward_to, signum)

    def end_soon(self) -> None:
        """Set the deadline, unless there is one."""
        if self.deadline is None:
            self.deadline = time.monotonic() + END_SECONDS


def _is_lost(frame: FrameType | None) -> bool:
    """True if an exception that is raised in a frame may be dropped, as in a destructor, or leave a lock held."""
    if frame is not None and frame.f_globals.get("__name__") in _LOCKING and frame.f_code.co_name not in _WAITING:
        return True
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


STOP = StopRequest()
"""The request of this process."""


def tie_to_others() -> None:
    """Tie this process to its parent and to the first process of its run, and bound the time of its end.

    - A parent that sets the environment variable ``OPDLAB_LIFELINE`` keeps the write end of a pipe, passes the number
      of the read end in the variable, and makes this process the leader of a group. The system closes the write end
      when the parent ends, also after SIGKILL, on both Linux and macOS; then the group is killed. Linux's parent-death
      signal does not suffice: it is sent when the thread ends that started this process.
    - Lightning starts the other processes of a run as children of the first one, without such a pipe. They end when the
      first one has ended, and leave signals to it.
    - A process that does not end within a minute of its stop is killed, see :func:`_watch_deadline`.
    """
    if (number := os.environ.pop(LIFELINE, None)) is not None:
        threading.Thread(target=_watch_pipe, args=(int(number),), daemon=True).start()
    first = os.environ.pop(_FIRST_PROCESS, None)
    if first is not None and os.environ.get("LOCAL_RANK", "0") != "0":
        STOP.forward_to = int(first)
        threading.Thread(target=_watch_parent, args=(int(first),), daemon=True).start()
        return
    os.environ[_FIRST_PROCESS] = str(os.getpid())
    if os.name != "posix":
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch_deadline, args=(reading, STOP), daemon=True).start()


def write_error(text: str) -> None:
    """Write a line to standard error at once, past its buffer; do nothing if it is closed, full, or read by nobody."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def report_error(message: str, code: int) -> bool:
    """Leave the error that ends this process to the first one of its run, which prints it.

    Args:
        message: one line.
        code: exit code of this process.

    Returns:
        False if there is no such process, so that this one has to print its error.
    """
    folder = os.environ.get(REPORTS)
    if folder is None or STOP.forward_to is None:
        return False
    try:
        report = Path(folder) / str(os.getpid())
        report.with_suffix(".new").write_text(f"{code} {message}", encoding="utf-8", errors="replace")
        report.with_suffix(".new").replace(report)
    except OSError:  # the first process has ended
        return False
    return True


def reported_error(folder: Path, pid: int, code: int) -> tuple[str, int]:
    """Return message and exit code of a process that has ended with an error.

    Args:
        folder: of the reports.
        pid: of the process.
        code: with which it has ended; less than 0 for a signal.
    """
    with suppress(OSError, ValueError):
        reported, _, message = (folder / str(pid)).read_text(encoding="utf-8").partition(" ")
        return message, int(reported)
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', as a system does that lacks memory' if name == 'SIGKILL' else ''}", 1
    return f"ended with exit code {code}", code


def bound_exit() -> None:
    """Let the system kill this process in a minute: call it last, when no thread of Python can watch any more."""
    if os.name == "posix":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, END_SECONDS)


def _watch_pipe(pipe: int) -> None:
    os.set_inheritable(pipe, False)
    os.read(pipe, 1)  # nothing is ever written, so it returns only when the pipe is closed
    os.killpg(os.getpid(), signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _watch_deadline(pipe: int, request: StopRequest) -> None:
    """End this process when its deadline has passed, and send signals again that came at a bad moment.

    Python runs handlers of signals only in the main thread, between two of its instructions. If that waits inside a
    library, such as for a process that is gone, no handler runs; but the system's part of the handler writes the
    signal's number into a pipe.

    Args:
        pipe: read end.
        request: of the process.
    """
    heard: tuple[int, float] | None = None
    request.tries = 8
    while True:
        if (postponed := request.postponed) is not None:
            request.postponed = None
            time.sleep(_AGAIN_SECONDS)  # select returns at once: the pipe holds the signal that was sent before
            os.kill(os.getpid(), postponed)
        ready, _, _ = select.select([pipe], [], [], _AGAIN_SECONDS)
        for signum in os.read(pipe, 64) if ready else b"":
            if signal.getsignal(signum) != request.handle:  # ends something else
                continue
            again = heard is not None and time.monotonic() - heard[1] >= _SAME_SECONDS
            heard = heard or (signum, time.monotonic())
            if again or request.when is StopAt.ONCE:
                request.end_soon()
        if heard is not None and request.deadline is not None and time.monotonic() > request.deadline:
            said = f"opdlab: stopped by {signal_name(heard[0])}, and killed: it had not ended in {END_SECONDS:.0f} s"
            write_error(f"\n{said}")
            os._exit(128 + heard[0])
