"""The error for mistakes that the user can fix, and the signals that stop a run."""

import re
import signal
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Control characters, some of which a terminal obeys; a tab and a line feed are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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


class NoMemoryError(RuntimeError):
    """Error for lack of memory whose message names what the user of this command can lower. Exit code 1."""


class OtherProcessError(RuntimeError):
    """Error for another process of the run that has ended with an error. The command line exits with the same code.

    Args:
        rank: number of that process in the run.
        message: of its error.
        code: its exit code, 1 or 2.
    """

    def __init__(self, rank: int, message: str, code: int) -> None:
        super().__init__(f"process {rank}: {message}")
        self.code = code


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


def require(condition: bool, message: str) -> None:
    """Raise :class:`UsageError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UsageError(message)


def not_text(value: str) -> str | None:
    r"""Return why a string is not text: it has a control character or half a surrogate pair. None if it is text.

    Example:
        >>> not_text("\x1b[31m"), not_text("a\tb")
        ('it has the control character \\x1b: leave it out', None)
        >>> not_text("\ud800")
        'it has half a surrogate pair, \\ud800: leave it out'
    """
    if match := _CONTROL.search(value):
        return f"it has the control character {ascii(match[0])[1:-1]}: leave it out"
    if match := re.search(r"[\ud800-\udfff]", value):
        return f"it has half a surrogate pair, {ascii(match[0])[1:-1]}: leave it out"
    return None


def printable(line: str) -> str:
    r"""Return a line with every character escaped that a terminal does not show, such as the start of a colour code.

    Example:
        >>> printable("\x1b[31mred\u202e é")
        '\\x1b[31mred\\u202e é'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its type if it has none.

    Example:
        >>> first_line(ValueError("one\ntwo")), first_line(KeyboardInterrupt())
        ('one', 'KeyboardInterrupt')
    """
    if isinstance(error, SyntaxError):
        return error.msg
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def user_line(error: BaseException) -> str | None:
    """Return "FILE, line N" of the innermost line of an error that is neither in opdlab nor in an installed package.

    Only the lines that ran inside the ``try`` that caught the error are looked at. None if all are installed.
    """
    if isinstance(error, SyntaxError) and error.filename is not None and _is_users(error.filename):
        return f"{error.filename}, line {error.lineno}"
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((f"{frame.filename}, line {frame.lineno}" for frame in frames if _is_users(frame.filename)), None)


def _is_users(file: str) -> bool:
    here = Path(__file__).parent
    places = [here, here / "strategies", here / "callbacks"]  # links in a checkout
    places += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    real = Path(file).resolve()
    return not file.startswith("<") and not any(real.is_relative_to(place.resolve()) for place in places)


def _is_mistake(error: BaseException) -> bool:
    """True unless it is an exit that was asked for, by a signal or by ``--help``, and not by a module's own lines."""
    if not isinstance(error, SystemExit):
        return True
    imports = any(frame.name == "<module>" for frame in traceback.extract_tb(error.__traceback__))
    return imports and stop_signal(error) is None


@contextmanager
def user_code(doing: str) -> Iterator[None]:
    """Raise an error of the user's own code in the block as a :class:`UsageError` with its file and line.

    An exit counts as one: a module that is also a script may call ``sys.exit`` when it is imported.

    Args:
        doing: what the block does, the beginning of the message.
    """
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        if (line := user_line(error)) is None or not _is_mistake(error):
            raise
        said = f"{doing} fails, change {line}: {type(error).__name__}: {first_line(error)}"
        if isinstance(error, SystemExit):
            said += "; put what a script does below `if __name__ == '__main__':`"
        raise UsageError(said) from error
