"""The error for mistakes that the user can fix, and the signals that stop a run."""

import signal
from pathlib import Path


class UsageError(ValueError):
    """Error for invalid user input; the message names the field, the value and the fix.

    A class names its own field; the code that builds the class from a configuration prepends the key of the section.
    The command line prints only the message and exits with code 2. It is a ``ValueError``, so Python callers can
    catch it without an import from here.

    Example:
        >>> raise UsageError("tau is -1.0, but must be at least 0: use 0 for no gating")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: tau is -1.0, but must be at least 0: use 0 for no gating
    """


class Stopped(KeyboardInterrupt):
    """Raised by a signal to stop: Ctrl-C, or SIGTERM from a scheduler. Lightning shuts down as for Ctrl-C.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = signum


class FullDiskError(RuntimeError):
    """Error for a file that cannot be written because the disk is full. The command line exits with code 1.

    It is no ``OSError``: a writer that only warns if a file cannot be written still stops when the disk is full.

    Args:
        path: the file, or a folder that holds it.
        more: what to say besides the path.
    """

    def __init__(self, path: Path, more: str = "") -> None:
        super().__init__(f"{path} cannot be written, because the disk is full{more}")
        self.path = path


def stop_signal(error: BaseException | None) -> int | None:
    """Return the signal that an error comes from; None if it comes from none.

    Lightning exits after Ctrl-C, so the error that an exit was raised from is looked at too.

    Example:
        >>> stop_signal(Stopped(signal.SIGTERM)), stop_signal(KeyboardInterrupt()), stop_signal(SystemExit(0))
        (15, 2, None)
    """
    if isinstance(error, SystemExit):
        return stop_signal(error.__context__)
    return int(getattr(error, "signum", signal.SIGINT)) if isinstance(error, KeyboardInterrupt) else None


def signal_name(signum: int) -> str:
    """Return the name of a signal.

    Example:
        >>> signal_name(15), signal_name(2)
        ('SIGTERM', 'Ctrl-C')
    """
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the name of its type if it has none.

    Example:
        >>> first_line(OSError("no space\nleft")), first_line(MemoryError())
        ('no space', 'MemoryError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require(condition: bool, message: str) -> None:
    """Raise :class:`UsageError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)
