"""Problems from a JSON Lines file."""

import hashlib
from pathlib import Path

from opdlab.data.prompts import Problem, ProblemSource
from opdlab.data.templates import Template
from opdlab.errors import UsageError, require
from opdlab.registry import suggestion
from opdlab.tasks.verifier import Verifier


class JsonlProblems(ProblemSource):
    """A JSON Lines file with one problem a line.

    Args:
        path: the file.
        problem_field: field that holds the problem.
        answer_field: field that holds the gold answer; null where there is none.
        id_field: field that names a row; rows without it are named by a hash of the problem.
        limit: use only the first so many rows.
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
        rows = self._read()
        problem_field, answer_field, id_field = self._fields
        for field in (problem_field, answer_field):
            if rows and field is not None and field not in rows[0]:
                raise UsageError(
                    f"{self.path} has no field '{field}'{suggestion(field, rows[0])} Its fields: {', '.join(rows[0])}"
                )
        return [
            Problem(
                str(row.get(id_field) or hashlib.sha256(str(row[problem_field]).encode()).hexdigest()[:12]),
                str(row[problem_field]),
                None if answer_field is None else str(row[answer_field]),
            )
            for row in rows[slice(*self._rows)]
        ]

    def _read(self) -> list[dict[str, object]]:
        require(self.path.is_file(), f"{self.path} does not exist: give the path of a JSON Lines file")
        if self.path.stat().st_size == 0:
            return []
        import datasets  # here, because importing it takes longer than all else together

        datasets.disable_progress_bars()
        try:
            table = datasets.Dataset.from_json(str(self.path), cache_dir=None)
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise UsageError(f"{self.path} is not JSON Lines: {str(cause).splitlines()[0]}") from error
        return list(table)
