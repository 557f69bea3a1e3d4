"""The one kind of error that a user can cause and mend, and the signals that stop a run."""

import signal
from collections import deque

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
