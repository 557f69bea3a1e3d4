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


def exit_code(stopped: BaseException | None) -> int:
    """Return 128 plus the number of the signal that stopped a program, as shells do.

    Example:
        >>> exit_code(Stopped(signal.SIGTERM)), exit_code(KeyboardInterrupt())
        (143, 130)
    """
    return 128 + int(getattr(stopped, "signum", signal.SIGINT))


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
