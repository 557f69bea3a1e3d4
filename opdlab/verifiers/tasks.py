"""What worker processes run for the verifiers of functions, regular expressions and JSON schemas.

Each function here is the task of a verifier: it is called once in a process, and returns the function that judges.
Patterns, schemas and functions are the user's, and responses are untrusted: judge only in a process that can be killed.
This module must not import torch.
"""

import json
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from opdlab.errors import first_line, user_line
from opdlab.verifiers.verifier import Verdict, bounded_form

Judge = Callable[..., Verdict]
INVALID = "returned "
"""Beginning of the reason where a function returned neither a truth value nor 0 or 1."""
_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)


def function_task(path: str) -> Judge:
    """Return the judge that calls the function at a path with the response and the gold answer."""
    module, _, name = path.rpartition(".")
    function = getattr(import_module(module), name)

    def judge(response: str, gold: str, decided: Callable[[bool], None]) -> Verdict:
        try:
            value = function(response, gold)
        except MemoryError:
            raise
        except Exception as error:
            where = user_line(error) or f"the function {path}"
            return Verdict(
                False, None, f"failed: raises {type(error).__name__}: {first_line(error)[:200]}; see {where}"
            )
        if getattr(value, "shape", None) == ():  # a scalar of NumPy or torch
            value = value.item()
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            return Verdict(False, None, f"{INVALID}{value!r:.80}")
        return Verdict(bool(value), None, "accepted" if value else "rejected")

    return judge


def regex_task(pattern: str, flags: int) -> Judge:
    """Return the judge that compares the last match of a pattern with the gold answer."""
    compiled = re.compile(pattern, flags)

    def judge(response: str, gold: str, decided: Callable[[bool], None]) -> Verdict:
        answer = None
        for match in compiled.finditer(response):
            groups = match.groups() or (match[0],)
            answer = next((group for group in groups if group is not None), None)
        if answer is None:
            return Verdict(False, None, "no answer")
        answer, gold = answer.strip(), gold.strip()
        if flags & re.IGNORECASE:  # a vote counts equal answers by their text
            answer, gold = answer.casefold(), gold.casefold()
        equal = answer == gold
        return Verdict(equal, bounded_form(answer), "equal" if equal else "different")

    return judge


def json_schema_task(schema: dict[str, Any] | bool | None) -> Judge:
    """Return the judge that validates a response; see :class:`opdlab.verifiers.JsonSchemaVerifier`."""
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable

    def validator(own: Any) -> Any:
        kind = validator_for(own)
        kind.check_schema(own)
        return kind(own)

    shared = None if schema is None else validator(schema)

    def judge(response: str, gold: str, decided: Callable[[bool], None]) -> Verdict:
        fenced = _FENCED.findall(response)
        try:
            value = json.loads(fenced[-1] if fenced else response, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return Verdict(False, None, "no answer")
        try:
            checked = shared or validator(json.loads(gold))
        except Exception as error:  # of json or of jsonschema
            said = f"needs a JSON schema as the gold answer, but {gold[:40]!r} is none: {first_line(error)[:100]}"
            return Verdict(False, None, f"failed: {said}")
        form = bounded_form(json.dumps(value, sort_keys=True))
        try:
            valid = checked.is_valid(value)
        except Unresolvable as error:
            said = f"needs a JSON schema whose references exist: {first_line(error)[:100]}; change the schema"
            return Verdict(False, form, f"failed: {said}")
        return Verdict(valid, form, "valid" if valid else "invalid")

    return judge


def _refuse(constant: str) -> None:
    """Raise for NaN and infinities, which Python's reader takes and JSON does not have."""
    raise ValueError(constant)
