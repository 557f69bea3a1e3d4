"""Signals that stop a process, and a pipe that ends a child process together with its parent.

Only the standard library is imported, so that a child process is tied to its parent before it loads slow libraries.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Any

from opdlab.errors import Stopped, signal_name

# Ctrl-C, a scheduler, a closed terminal, and early warnings of schedulers. Windows lacks some.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
LIFELINE = "OPDLAB_LIFELINE"
_SAME_SECONDS = 1.0  # seconds; a scheduler and the process that it watches may both signal the same stop


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
        """Process that stops this one: a signal is sent there instead of stopping this process at once."""
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._ignored: set[int] = set()

    @contextmanager
    def listening(self, signums: Sequence[int] = STOP_SIGNALS) -> Iterator[None]:
        """Let signals make requests while the block runs; an outer block of the same kind goes on instead."""
        if self._before:
            yield
            return
        self._ignored = {each for each in signums if signal.getsignal(each) == signal.SIG_IGN}
        with catching_signals(self.handle, signums) as self._before:
            try:
                yield
            finally:
                self.when, self.signum, self.forward_to, self._before = StopAt.ONCE, None, None, {}

    def take_back(self) -> dict[int, Any]:
        """Install the handlers again over those that a library has installed, and return the library's by signal."""
        theirs = {signum: signal.getsignal(signum) for signum in (*self._before, *self._ignored)}
        for signum in self._before:
            signal.signal(signum, self.handle)
        for signum in self._ignored:
            signal.signal(signum, signal.SIG_IGN)
        return {signum: handler for signum, handler in theirs.items() if callable(handler) and handler != self.handle}

    def handle(self, signum: int, frame: FrameType | None = None) -> None:
        """Make a request: the handler of the signals.

        Raises:
            Stopped: the request is followed at once.
        """
        first, now = self.signum is None, time.monotonic()
        if not first and now - self._since < _SAME_SECONDS:
            return
        self._since, self.signum = now, signum
        if first and self.when is not StopAt.ONCE:
            # Not through `print` or logging: the signal may have come inside one of them.
            note = f"{signal_name(signum)}: stopping after this step or sampling call (again to stop at once)"
            os.write(2, f"\n{note}\n".encode())
        elif self.forward_to is not None:
            os.kill(self.forward_to, signum)
        else:
            raise Stopped(signum)

    def check(self) -> None:
        """Follow a request, at a safe point; also one whose exception was lost in a library.

        Raises:
            Stopped: there is a request.
        """
        if self.signum is not None and self.when is not StopAt.STEP_END:
            raise Stopped(self.signum)


STOP = StopRequest()
"""The request of this process."""


def hold_lifeline() -> None:
    """Kill this process and its process group when its parent ends.

    The parent keeps the write end of a pipe, passes the number of the read end in the environment variable
    ``OPDLAB_LIFELINE``, and makes this process the leader of a group. The system closes the write end when the parent
    ends, also after SIGKILL, on both Linux and macOS. Linux's parent-death signal does not suffice: it is sent when the
    thread ends that started this process. Without the variable, nothing happens.
    """
    if (number := os.environ.pop(LIFELINE, None)) is not None:
        threading.Thread(target=_watch, args=(int(number),), daemon=True).start()


def _watch(pipe: int) -> None:
    os.set_inheritable(pipe, False)
    os.read(pipe, 1)  # nothing is ever written, so it returns only when the pipe is closed
    os.killpg(os.getpid(), signal.SIGKILL)
