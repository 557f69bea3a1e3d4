"""Signals that stop a process, and a pipe that ends a child process together with its parent.

Only the standard library is imported, so that a child process is tied to its parent before it loads slow libraries.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, a scheduler, a closed terminal, and early warnings of schedulers. Windows lacks some.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)
LIFELINE = "OPDLAB_LIFELINE"


@contextmanager
def catching_signals(
    handler: Callable[[int, FrameType | None], Any], signums: Sequence[int] = STOP_SIGNALS
) -> Iterator[dict[int, Any]]:
    """Install a handler for signals while the block runs; yields the previous handlers by signal.

    Nothing is installed outside the main thread, because Python delivers signals only there, nor for SIGHUP under
    ``nohup``.

    Args:
        handler: see :func:`signal.signal`.
        signums: the signals.
    """
    main = threading.current_thread() is threading.main_thread()
    ignored = {signum for signum in signums if signum == _HANGUP and signal.getsignal(signum) == signal.SIG_IGN}
    before = {signum: signal.signal(signum, handler) for signum in signums if main and signum not in ignored}
    try:
        yield before
    finally:
        for signum, former in before.items():
            signal.signal(signum, signal.SIG_DFL if former is None else former)  # None: not installed by Python


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
