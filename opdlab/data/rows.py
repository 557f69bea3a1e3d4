"""Problems from rows of named fields, independent of the file format."""

import hashlib
import itertools
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, TypeVar

from opdlab.data.prompts import ProblemSource
from opdlab.data.templates import Template, check_fields, fill_fields
from opdlab.errors import UsageError, require
from opdlab.records import flat
from opdlab.registry import suggestion
from opdlab.types import Message, Part, Problem
from opdlab.verifiers.verifier import Verifier

_SHOWN = 20  # names of fields in a message

Row = TypeVar("Row")


class RowProblems(ProblemSource):
    r"""Problems in rows of named fields.

    A field holds text or a number. The problem may also be a chat: a list of messages with ``role`` and ``content``.
    The prompt is then all of its turns up to the user's last one, system message included; an answer of the assistant
    at its end is not part of the prompt. A dotted name such as ``reward_model.ground_truth`` is a field inside a field.

    Args:
        problem_field: field that holds the problem.
        answer_field: field that holds the gold answer; null if there is none.
        id_field: field with the id of a row; rows without it get a hash of the problem as id.
        limit: use at most this many rows.
        offset: skip this many rows first.
        template: turns a problem into a prompt; by default plain text stays as it is, and a chat goes through the
            tokenizer's chat template.
        verifier: checks answers; null for none, which ``answer_field: null`` requires.
        teacher_text: the problem as the teacher sees it in training, a text with names of fields in braces, such as
            ``"{problem}\nA solution: {solution}"``; doubled braces are plain ones. In a chat it takes the place of the
            last turn, which is the value of ``problem_field`` in it. Null if the teacher sees what the student sees.
        teacher_template: turns that into the prompt that the teacher sees; by default ``template``.
        teacher_field: field with the name of the teacher of a row, for a RoutedTeacher; null for one teacher.

    Raises:
        UsageError: ``teacher_text`` names no field; a field is missing or null in a row, or has a type that is not
            allowed; or a number is out of range.
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
        teacher_text: str | None = None,
        teacher_template: Template | None = None,
        teacher_field: str | None = None,
    ) -> None:
        super().__init__(template, verifier, teacher_template)
        self.problem_field = problem_field
        if teacher_text is not None:
            check_fields(teacher_text, "teacher_text")
        require(limit is None or limit >= 1, f"limit is {limit}, but must be at least 1, or null for all rows")
        require(offset >= 0, f"offset is {offset}, but must be at least 0")
        require(
            answer_field is not None or verifier is None,
            "answer_field is null, but verifier needs gold answers: give the field that holds them, or set verifier to "
            "null",
        )
        self._fields = _Fields(problem_field, answer_field, id_field, teacher_text, teacher_field)
        self._rows = (offset, None if limit is None else offset + limit)

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield the rows with the row numbers for messages, reading lazily."""

    def problems(self) -> Iterator[Problem]:
        """Yield the problems, one row at a time."""
        return itertools.starmap(self.problem, self.chosen(self.rows()))

    def places(self) -> Iterator[tuple[str, Problem]]:
        """See :meth:`ProblemSource.places`: the numbers are those of the file."""
        for number, row in self.chosen(self.rows()):
            yield f"{self.row_name} {number}", self.problem(number, row)

    def chosen(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Return the rows from ``offset`` up to ``limit``."""
        return itertools.islice(rows, *self._rows)

    def problem(self, number: int | str, row: Mapping[str, Any]) -> Problem:
        """Return the problem of a row.

        Args:
            number: of the row, for messages.
            row: the fields.
        """
        try:
            problem = _problem(row, self._fields)
            if self.demonstration_field is not None:
                problem = replace(problem, demonstration=_parts(row, self.demonstration_field))
        except (UsageError, RecursionError) as error:
            said = ": a field is nested too deeply" if isinstance(error, RecursionError) else error
            raise UsageError(f"{self.name}, {self.row_name} {number}{said}") from error
        return problem


@dataclass(frozen=True)
class _Fields:
    """Names of the fields of a row, and the text for the teacher, which names fields."""

    problem: str
    answer: str | None
    id: str
    teacher_text: str | None
    teacher: str | None


# The messages of these functions follow the name of the file and the number of the row.


def _problem(row: Mapping[str, Any], fields: _Fields) -> Problem:
    value = _required(row, fields.problem)
    messages: tuple[Message, ...] = ()
    if isinstance(value, list | tuple):
        messages = _messages(value, fields.problem)
        text = messages[-1].content
    else:
        text = _text(value, fields.problem, " or a list of messages with role and content")

    def other(field: str) -> str:
        return text if field == fields.problem else _text(_required(row, field), field)

    name = _find(row, fields.id)
    identity = json.dumps(messages) if messages else text
    return Problem(
        hashlib.sha256(identity.encode()).hexdigest()[:12] if name is None else _text(name, fields.id),
        text,
        None if fields.answer is None else other(fields.answer),
        messages,
        teacher_text=None if fields.teacher_text is None else fill_fields(fields.teacher_text, other),
        teacher=None if fields.teacher is None else other(fields.teacher),
    )


def _parts(row: Mapping[str, Any], field: str) -> tuple[Part, ...]:
    """Return the parts of a given response: a text, or a list of contents of which some do not count in the loss."""
    value = _required(row, field)
    if not isinstance(value, list | tuple):
        text = _text(value, field, " or a list of parts with content and loss")
        require(bool(text), f": the field '{field}' is empty, but must be a response")
        return (Part(text),)
    parts = []
    for number, part in enumerate(value):
        place = f"{field}.{number}"
        require(isinstance(part, Mapping), f": the field '{place}' is a {type(part).__name__}, but must have content")
        loss = True if part.get("loss") is None else part["loss"]
        require(isinstance(loss, bool), f": the field '{place}.loss' is {loss!r}, but must be true or false")
        parts.append(Part(_text(_required(part, "content"), f"{place}.content"), loss))
    require(any(part.loss for part in parts), f": the field '{field}' has no part that counts in the loss")
    return tuple(parts)


def _find(row: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, whose name may be dotted; None if it is missing or null."""
    value: Any = row
    for part in [field] if field in row else field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _required(row: Mapping[str, Any], field: str) -> Any:
    value = _find(row, field)
    if value is not None:
        return value
    names = list(flat(dict(row)))
    if field in names:
        raise UsageError(f": the field '{field}' is null; give it a value")
    shown = ", ".join([*names[:_SHOWN], *(["…"] if len(names) > _SHOWN else [])])
    raise UsageError(f", has no field '{field}'{suggestion(field, names) or ';'} its fields: {shown}; give one of them")


def _text(value: Any, field: str, or_else: str = "") -> str:
    """Return a field's text, or its number as text."""
    if isinstance(value, str):
        half = next((char for char in value if "\ud800" <= char <= "\udfff"), None)
        require(half is None, f": the field '{field}' has a lone surrogate, {ascii(half)[1:-1]}: remove it")
        return value
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if is_number and value == value and abs(value) != math.inf:
        return str(value)
    kind = str(value) if is_number else f"a {type(value).__name__}"
    inside = ", ".join(flat(dict(value), field)) if isinstance(value, Mapping) and value else ""
    mend = f"; give one of its fields: {inside}" if inside else ""
    raise UsageError(f": the field '{field}' is {kind}, but must be text or a finite number{or_else}{mend}")


def _messages(turns: Sequence[Any], field: str) -> tuple[Message, ...]:
    """Return the messages of a chat up to the user's last turn."""
    messages = []
    for number, turn in enumerate(turns):
        place = f": the field '{field}.{number}'"
        require(isinstance(turn, Mapping), f"{place} is a {type(turn).__name__}, but must have role and content")
        more = ", ".join(key for key, value in turn.items() if key not in Message._fields and value is not None)
        require(not more, f"{place} has {more}, but a message has role and content only")
        for key in Message._fields:
            kind = "missing" if turn.get(key) is None else f"a {type(turn[key]).__name__}"
            require(isinstance(turn.get(key), str), f"{place} is no message: its {key} is {kind}, but must be text")
        messages.append(Message(*(_text(turn[key], f"{field}.{number}.{key}") for key in Message._fields)))
    if len(messages) > 1 and messages[-1].role == "assistant":
        messages.pop()  # the reference answer
    last = f"a message of the role '{messages[-1].role}'" if messages else "no message"
    require(
        bool(messages) and messages[-1].role == "user",
        f": the field '{field}' ends with {last}, but its last message must be the user's",
    )
    return tuple(messages)
