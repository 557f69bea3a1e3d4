"""The one kind of error that a user can cause and mend, and the signals that stop a run."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Signals that ask a program to stop: Ctrl-C, a scheduler, a closed terminal, a scheduler's warning. Windows lacks some.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)

# What was refused lately; texts alone, since an error holds on to all that its frames hold.
_REFUSALS: deque[str] = deque(maxlen=16)


class UsageError(ValueError):
    """Something the user gave cannot work; the message names the key, the value and the mend.

    The command line prints the message alone and exits with code 2. It is a ``ValueError``, so Python
    callers need no import from here to catch it.

    Example:
        >>> raise UsageError("gate.tau is -1.0, but must be at least 0: use 0 for no gating")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: gate.tau is -1.0, but must be at least 0: use 0 for no gating
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        _REFUSALS.append(str(self))


class Stopped(KeyboardInterrupt):
    """A signal asked to stop: Ctrl-C, or SIGTERM, which schedulers send. Lightning shuts down as for Ctrl-C.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def catching_signals(
    handler: Callable[[int, FrameType | None], Any], signums: Sequence[int] = STOP_SIGNALS
) -> Iterator[dict[int, Any]]:
    """Install a handler for signals while the block runs; yields the handlers before, by signal.

    Nothing is installed outside the main thread, where Python delivers signals, and for SIGHUP under ``nohup``.
    """
    main = threading.current_thread() is threading.main_thread()
    ignored = {signum for signum in signums if signum == _HANGUP and signal.getsignal(signum) == signal.SIG_IGN}
    before = {signum: signal.signal(signum, handler) for signum in signums if main and signum not in ignored}
    try:
        yield before
    finally:
        for signum, former in before.items():
            signal.signal(signum, signal.SIG_DFL if former is None else former)  # None: not installed by Python


def exit_code(stopped: BaseException | None) -> int:
    """128 plus the number of the signal that stopped a program, as shells report it.

    Example:
        >>> exit_code(Stopped(signal.SIGTERM)), exit_code(KeyboardInterrupt())
        (143, 130)
    """
    return 128 + int(getattr(stopped, "signum", signal.SIGINT))


def last_refusal(within: str) -> str | None:
    """The newest message of a :class:`UsageError` that ``within``, the message of another error, quotes; or None.

    Example:
        >>> error = UsageError("gate.rho is 2, but must lie between 0 and 1")
        >>> last_refusal("None of the types fits: - Expected a float - gate.rho is 2, but must lie between 0 and 1")
        'gate.rho is 2, but must lie between 0 and 1'
    """
    text = " ".join(within.split())
    return next((said for said in reversed(_REFUSALS) if said and " ".join(said.split()) in text), None)


def require(condition: bool, message: str) -> None:
    """Raise :class:`UsageError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)
