"""The one kind of error that a user can cause and mend, and the signals that stop a run."""

import signal


class UsageError(ValueError):
    """Something the user gave cannot work; the message names the field, the value and the mend.

    A class names its own field; what builds it from a configuration puts the key of the section before that. The
    command line prints the message alone and exits with code 2. It is a ``ValueError``, so Python callers need no
    import from here to catch it.

    Example:
        >>> raise UsageError("tau is -1.0, but must be at least 0: use 0 for no gating")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: tau is -1.0, but must be at least 0: use 0 for no gating
    """


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


def require(condition: bool, message: str) -> None:
    """Raise :class:`UsageError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)
