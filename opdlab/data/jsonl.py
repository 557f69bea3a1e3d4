"""Problems from a JSON Lines file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdlab.data.rows import RowProblems
from opdlab.errors import UsageError, require


class JsonlProblems(RowProblems):
    """Problems of a JSON Lines file, one problem per line.

    Args:
        path: path of the file.
        kwargs: see :class:`opdlab.data.rows.RowProblems`.

    Raises:
        UsageError: the file is missing, cannot be read, or is not JSON Lines in UTF-8; or a row lacks a field.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()

    @property
    def name(self) -> str:
        """Return the path."""
        return str(self.path)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line numbers, from 1, and rows.

        Does not use a table reader. Table readers infer a type per column, and would change the text of an answer such
        as ``2020-01-01``, or ``7`` in a column that also has ``7.5``.
        """
        require(self.path.is_file(), f"{self.path} does not exist or is a folder: give the path of a JSON Lines file")
        try:
            with self.path.open("rb") as lines:
                yield from ((number, self._row(number, line)) for number, line in enumerate(lines, 1) if line.strip())
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            # A file may begin with a byte order mark. json.loads would also guess other encodings from bytes.
            row = json.loads(line.strip().decode("utf-8-sig"))
        except UnicodeDecodeError:
            row, reason = None, "it is not UTF-8 text, so save the file as UTF-8"
        except ValueError as error:
            row, reason = None, str(error)
        except RecursionError:
            row, reason = None, "it is nested too deeply"
        else:
            reason = "it is not an object, such as {...}"
        require(isinstance(row, dict), f"{self.path}, line {number}, is not JSON Lines: {reason}")
        return dict(row)
