"""Problems from rows of named fields, independent of the file format."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from opdlab.data.prompts import ProblemSource
from opdlab.data.templates import Template
from opdlab.errors import require
from opdlab.registry import suggestion
from opdlab.types import Problem
from opdlab.verifiers.verifier import Verifier


class RowProblems(ProblemSource):
    """Problems in rows of named fields.

    Args:
        problem_field: field that holds the problem.
        answer_field: field that holds the gold answer; null if there is none.
        id_field: field with the id of a row; rows without it get a hash of the problem as id.
        limit: use at most this many rows.
        offset: skip this many rows first.
        template: turns a problem into a prompt; plain text by default.
        verifier: checks answers; null for none, which ``answer_field: null`` requires.

    Raises:
        UsageError: a field is missing or null in a row, or a number is out of range.
    """

    row_name = "line"  # name of a row in messages

    def __init__(
        self,
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
        require(
            answer_field is not None or verifier is None,
            "answer_field is null, but verifier needs gold answers: give the field that holds them, or set verifier to "
            "null",
        )
        self._fields = (problem_field, answer_field, id_field)
        self._rows = (offset, None if limit is None else offset + limit)

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the rows with the row numbers for messages, reading lazily."""

    def problems(self) -> Iterator[Problem]:
        """Yield the problems, one row at a time."""
        return (self._problem(number, row) for number, row in islice(self.rows(), *self._rows))

    def _problem(self, number: int, row: Mapping[str, Any]) -> Problem:
        problem_field, answer_field, id_field = self._fields
        for field in (problem_field, answer_field):
            if field is None:
                continue
            require(
                field in row,
                f"{self.name}, {self.row_name} {number}, has no field '{field}'{suggestion(field, row) or ';'} "
                f"its fields: {', '.join(row)}",
            )
            require(
                row[field] is not None,
                f"{self.name}, {self.row_name} {number}: the field '{field}' is null; give it a value",
            )
        text, name = str(row[problem_field]), row.get(id_field)
        return Problem(
            hashlib.sha256(text.encode()).hexdigest()[:12] if name is None else str(name),
            text,
            None if answer_field is None else str(row[answer_field]),
        )
