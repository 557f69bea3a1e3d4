"""Problems from a JSON Lines file."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from opdlab.data.prompts import Problem, ProblemSource
from opdlab.data.templates import Template
from opdlab.errors import require
from opdlab.registry import suggestion
from opdlab.tasks.verifier import Verifier


class JsonlProblems(ProblemSource):
    """A JSON Lines file with one problem a line.

    Args:
        path: the file.
        problem_field: field that holds the problem.
        answer_field: field that holds the gold answer; null where there is none.
        id_field: field that names a row; rows without it are named by a hash of the problem.
        limit: use only so many rows.
        offset: leave out so many rows first.
        template: turns a problem into a prompt; plain text by default.
        verifier: checks answers; null for none.

    Raises:
        UsageError: the file is missing, empty or not JSON Lines, or a field is not in it.
    """

    def __init__(
        self,
        path: str,
        problem_field: str = "problem",
        answer_field: str | None = "answer",
        id_field: str = "id",
        limit: int | None = None,
        offset: int = 0,
        template: Template | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        super().__init__(template, verifier)
        require(limit is None or limit >= 1, f"limit is {limit}, but must be at least 1, or null for all rows")
        require(offset >= 0, f"offset is {offset}, but must be at least 0")
        self.path = Path(path).expanduser()
        self._fields = (problem_field, answer_field, id_field)
        self._rows = (offset, None if limit is None else offset + limit)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def problems(self) -> list[Problem]:
        """See :meth:`ProblemSource.problems`."""
        require(self.path.is_file(), f"{self.path} does not exist: give the path of a JSON Lines file")
        return [self._problem(number, row) for number, row in islice(self._read(), *self._rows)]

    def _problem(self, number: int, row: dict[str, Any]) -> Problem:
        problem_field, answer_field, id_field = self._fields
        for field in (problem_field, answer_field):
            if field is None:
                continue
            require(
                field in row,
                f"{self.path}, line {number}, has no field '{field}'{suggestion(field, row) or ';'} "
                f"its fields: {', '.join(row)}",
            )
            require(row[field] is not None, f"{self.path}, line {number}: the field '{field}' is null; give it a value")
        text, name = str(row[problem_field]), row.get(id_field)
        return Problem(
            hashlib.sha256(text.encode()).hexdigest()[:12] if name is None else str(name),
            text,
            None if answer_field is None else str(row[answer_field]),
        )

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line numbers, from 1, and rows.

        Not with a table reader: those infer a type for each column, and an answer such as ``2020-01-01`` or ``7`` in
        a column that also holds ``7.5`` would come back as another text.
        """
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
