"""Problems from a JSON Lines file."""

import json
from collections.abc import Iterator
from typing import Any

from opdlab.data.rows import RowProblems
from opdlab.errors import UsageError, require
from opdlab.files import expanded


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
        require(self.path.is_file(), f"{self.path} does not exist or is a folder: give the path of a JSON Lines file")
        try:
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    place = f"{self.path}, line {number},"
                    try:
                        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except UnicodeDecodeError as error:
                        raise UsageError(f"{place} is not text in UTF-8: write the file in that encoding") from error
                    except ValueError as error:
                        raise UsageError(f"{place} is not JSON Lines: {error}") from error
                    except RecursionError as error:
                        raise UsageError(f"{place} nests values too deeply: write it flatter") from error
                    require(isinstance(row, dict), f"{place} is not JSON Lines: not an object")
                    yield number, row
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror}") from error
