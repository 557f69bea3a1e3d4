"""Standard output and standard error that are closed, full, read by nobody, or without some letters.

A command does its work all the same.
"""

import io
import os
import signal
import sys
from typing import Any, cast

from opdlab.files import full_disk
from opdlab.processes import STOP, write_error


class Output(io.FileIO):
    """The file below standard output or standard error; once it cannot be written, all that follows is thrown away.

    If it is standard output, and not only its reader has ended, as ``head`` does, a line on standard error says so.

    Args:
        descriptor: 1 or 2.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        """Why it cannot be written; None while it can."""

    def write(self, data: Any) -> int | None:  # type: ignore[override] # of any buffer
        """Write bytes, or throw them away, and return how many."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            if self.fileno() == 1 and not self.unread and STOP.forward_to is None:
                why = "its disk is full" if full_disk(error) is not None else str(error.strerror)
                write_error(f"opdlab: error: standard output cannot be written, because {why}: send it to another file")
            return memoryview(data).nbytes

    @property
    def unread(self) -> bool:
        """True if its reader has ended."""
        return isinstance(self.error, ConnectionError)  # BrokenPipeError is one

    def exit_code(self, code: int, prints: bool) -> int:
        """Return the exit code of the command whose standard output this is.

        Args:
            code: of its work.
            prints: nothing is left of its work but what it prints.
        """
        if code or self.error is None or STOP.forward_to is not None:  # one process of several speaks for all
            return code
        if self.unread:
            return 128 + signal.SIGPIPE if prints else 0
        return 1


def usable_streams() -> Output:
    """Let every command read and write its standard streams, and return the file below standard output.

    Call it before any file is opened: the first one would get the number of a stream that is closed, and with it what
    libraries and child processes write there. Streams that a caller has put in their place stay.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the lowest free number is its own
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 # it stays open
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    out, err = Output(1), Output(2)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _above(out, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _above(err, sys.stderr)
    return out


def _above(file: Output, former: Any) -> io.TextIOWrapper:
    """Return a stream as Python makes it, with the settings of the former one; it escapes what its encoding lacks."""
    text: io.TextIOWrapper = former
    text.flush()
    return io.TextIOWrapper(
        cast(Any, file) if text.write_through else io.BufferedWriter(file),  # without a buffer, as by `python -u`
        encoding=text.encoding,
        errors="backslashreplace" if text.errors == "strict" else text.errors,
        line_buffering=text.line_buffering,
        write_through=text.write_through,
    )
