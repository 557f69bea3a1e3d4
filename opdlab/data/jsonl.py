"""Problems from a JSON Lines file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdlab.data.rows import RowProblems
from opdlab.errors import require


class JsonlProblems(RowProblems):
    """Problems of a JSON Lines file, one problem per line.

    Args:
        path: path of the file.
        kwargs: see :class:`opdlab.data.rows.RowProblems`.

    Raises:
        UsageError: the file is missing, empty or not JSON Lines, or a row lacks a field.
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
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.strip())
                except ValueError as error:  # broken JSON, or not UTF-8
                    row, reason = None, str(error)
                else:
                    reason = "not an object"
                require(isinstance(row, dict), f"{self.path}, line {number}, is not JSON Lines: {reason}")
                yield number, row
