"""Problems from a JSON Lines file."""

import json
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, BinaryIO, cast

from opdlab.data.rows import RowProblems
from opdlab.data.stores import ProblemStore
from opdlab.errors import UsageError, require
from opdlab.files import below, expanded
from opdlab.types import Problem

_BLOCK = 16_384  # bytes


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, and refuse one that has a key twice, of which JSON's reader would take the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"has the key {json.dumps(twice)} more than once: keep one of them")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # `json.loads` would make one for each line


class JsonlProblems(RowProblems):
    """Problems of a JSON Lines file, one problem per line.

    Args:
        path: path of the file.
        kwargs: see :class:`opdlab.data.rows.RowProblems`.

    Raises:
        UsageError: the file is missing, cannot be read, or is not JSON Lines in UTF-8; a row has a key twice or lacks a
            field.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = expanded(path, "path")

    @property
    def name(self) -> str:
        """Return the path."""
        return str(self.path)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line numbers, from 1, and rows.

        Does not use a table reader. Table readers infer a type per column, and would change the text of an answer such
        as ``2020-01-01``, or ``7`` in a column that also has ``7.5``.
        """
        for number, place, line in self.lines():
            yield number, self.parse(line, f"line {number}", starts=place == 0)

    def lines(self, file: BinaryIO | None = None) -> Iterator[tuple[int, int, bytes]]:
        """Yield the number, from 1, the place in the file, in bytes, and the text of each line that is not empty.

        Args:
            file: the open file; None to open it, and to close it behind the last line.
        """
        place = 0
        try:
            with self.open() if file is None else nullcontext(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield number, place, line
                    place += len(line)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error

    def open(self) -> BinaryIO:
        """Return the open file."""
        place = f"{self.path} does not exist{below(self.path)} or is a folder"
        require(self.path.is_file(), f"{place}: give the path of a JSON Lines file")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error

    def parse(self, line: bytes, name: str, starts: bool) -> dict[str, Any]:
        """Return the row of a line.

        Args:
            line: its bytes.
            name: of the line, for messages.
            starts: True if the file starts with it, where it may have a byte order mark.
        """
        place = f"{self.path}, {name},"
        try:
            row = _DECODER.decode(line.decode("utf-8-sig" if starts else "utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{place} is not text in UTF-8: write the file in that encoding") from error
        except json.JSONDecodeError as error:
            raise UsageError(f"{place} is not JSON Lines: {error}") from error
        except UsageError as error:
            raise UsageError(f"{place} {error}") from error
        except ValueError as error:  # Python reads no longer number, since that takes quadratic time
            digits = sys.get_int_max_str_digits()
            raise UsageError(f"{place} has a number of more than {digits} digits: write the number as text") from error
        except RecursionError as error:
            raise UsageError(f"{place} nests values too deeply: write it flatter") from error
        require(
            isinstance(row, dict),
            f"{place} is not JSON Lines: it holds a {type(row).__name__}, but each line must hold an object; "
            "opdlab.data.TableProblems reads a JSON file with a list",
        )
        return cast(dict[str, Any], row)

    def store(self) -> ProblemStore:
        """See :meth:`ProblemSource.store`: a line is found again by its place in the file."""
        return _LineStore(self)


class _LineStore(ProblemStore):
    """Problems of a JSON Lines file; a key is the place of a line in the file, in bytes.

    The file stays open, so another file in its place, as most editors write it, does not matter.
    """

    def __init__(self, source: JsonlProblems) -> None:
        self._source = source
        self._file: BinaryIO | None = None
        self._version = (0, 0)  # size and time of the last change

    def scan(self) -> Iterator[tuple[int, Problem]]:
        """See :meth:`ProblemStore.scan`."""
        self._file = file = self._source.open()
        weakref.finalize(self, file.close)
        self._version = _version(file)
        for number, place, line in self._source.chosen(self._source.lines(file)):
            row = self._source.parse(line, f"line {number}", starts=place == 0)
            yield place, self._source.problem(number, row)

    def read(self, keys: Sequence[int]) -> list[Problem]:
        """See :meth:`ProblemStore.read`."""
        assert self._file is not None
        require(
            _version(self._file) == self._version,
            f"{self._source.path} has changed since the run has read it, so its rows cannot be found again: leave it "
            "as it is until the run ends, or start a new run",
        )
        problems = []
        for key in keys:
            line, name = _line(self._file.fileno(), key), f"byte {key}"
            problems.append(self._source.problem(name, self._source.parse(line, name, starts=key == 0)))
        return problems


def _version(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _line(descriptor: int, place: int) -> bytes:
    """Return a line of a file, without moving the file's position, which forked processes share."""
    line = b""
    while b"\n" not in line and (block := os.pread(descriptor, _BLOCK, place + len(line))):
        line += block
    return line.partition(b"\n")[0]
