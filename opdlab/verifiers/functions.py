"""Verifiers whose rule is the user's: a Python function, a regular expression, a JSON schema."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from opdlab.errors import UsageError, first_line, require, user_code
from opdlab.files import expanded
from opdlab.packages import require_package
from opdlab.verifiers.sources import source_digest
from opdlab.verifiers.tasks import INVALID
from opdlab.verifiers.verifier import Verdict
from opdlab.verifiers.worker_verifier import WorkerVerifier
from opdlab.yaml_files import read_yaml


class FunctionVerifier(WorkerVerifier):
    """Verifier that asks a Python function: ``function(response, answer)`` returns true or false, or 1 or 0.

    In a configuration ``verifier: my_module.check`` is enough. The function runs in worker processes. An answer on
    which it exceeds a limit or raises an error is wrong, and the first one of each kind is reported.

    Args:
        function: path of the function, ``module.name``, or the function itself, at the top level of a module.
        num_workers: see :class:`WorkerVerifier`.
        time_limit: see there.
        memory_limit: see there; a module that imports torch needs several times the default.

    Raises:
        UsageError: the module or the function is missing or cannot be imported, or it does not take two arguments; on
            verifying, it returned another value.

    Example:
        >>> FunctionVerifier("operator.eq", num_workers=1).verify(["42", "43"], ["42", "42"])[0]
        Verdict(correct=True, extracted=None, reason='accepted')
    """

    task = "opdlab.verifiers.tasks:function_task"

    def __init__(
        self,
        function: str | Callable[[str, str], bool | float],
        num_workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: int = 2048,
    ) -> None:
        super().__init__(num_workers, time_limit, memory_limit)
        if not isinstance(function, str):
            names = [getattr(function, name, None) for name in ("__module__", "__qualname__")]
            require(
                all(isinstance(name, str) for name in names),
                f"function is {function!r:.80}, which is no function of a module: give one at the top level of one, "
                "or its path",
            )
            function = ".".join(map(str, names))
        found = _imported(function)
        self.function = function
        # Among the settings of an evaluation: saved verdicts of other code are not reused.
        self.source = source_digest(getattr(found, "__module__", None) or function.rpartition(".")[0])

    @property
    def label(self) -> str:
        """Return the path of the function."""
        return self.function

    def task_options(self) -> Mapping[str, Any]:
        """See :meth:`WorkerVerifier.task_options`."""
        return {"path": self.function}

    def report(self, verdicts: Sequence[Verdict]) -> None:
        """See :meth:`WorkerVerifier.report`.

        Raises:
            UsageError: the function returned neither a truth value nor 0 or 1.
        """
        wrong = next((verdict.reason for verdict in verdicts if verdict.reason.startswith(INVALID)), None)
        require(wrong is None, f"verifier {self.function} {wrong}, but must return true or false, or 1 or 0")
        super().report(verdicts)


def _imported(path: str) -> Callable[..., Any]:
    """Return the function at a path, which must take a response and an answer."""
    module, _, name = path.rpartition(".")
    form = "give the path of a function in a module, such as my_module.check"
    is_path = bool(module) and module != "__main__" and all(map(str.isidentifier, path.split(".")))
    require(is_path, f"function is '{path}': {form}")
    try:
        with user_code(f"function is {path}: importing {module}"):
            found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        said = f"there is no module '{error.name}' in the current folder or among the installed packages"
        raise UsageError(f"function is {path}, but {said}: {form}") from error
    except ImportError as error:
        raise UsageError(f"function is {path}, which cannot be imported: {first_line(error)}; {form}") from error
    require(found is not None, f"function is {path}, but {module} has no '{name}': {form}")
    if not callable(found) or isinstance(found, type):
        raise UsageError(f"function is {path}, which is no function: {form}")
    try:
        inspect.signature(found).bind("", "")
    except TypeError as error:
        call = f"{name}(response, answer)"
        raise UsageError(
            f"function is {path}, which cannot be called as {call} ({first_line(error)}): give it two parameters"
        ) from error
    except ValueError:  # a function in C may have no signature
        pass
    function: Callable[..., Any] = found
    return function


class RegexVerifier(WorkerVerifier):
    r"""Verifier that accepts a response whose last match of a pattern equals the gold answer.

    ``extracted`` is the first group of the match that took part in it, or the whole match if the pattern has no group.
    White space at its ends is ignored.

    Args:
        pattern: a regular expression of Python's :mod:`re`.
        ignore_case: match and compare without regard to case.
        multiline: ``^`` and ``$`` also match at each line.
        num_workers: see :class:`WorkerVerifier`.
        time_limit: see there; a pattern may need exponential time on an unlucky response.
        memory_limit: see there.

    Raises:
        UsageError: the pattern is not a regular expression.

    Example:
        >>> RegexVerifier(r"#### (-?\d+)", num_workers=1).verify(["6 * 7: #### 42"], ["42"])
        [Verdict(correct=True, extracted='42', reason='equal')]
    """

    task = "opdlab.verifiers.tasks:regex_task"

    def __init__(
        self,
        pattern: str,
        ignore_case: bool = False,
        multiline: bool = False,
        num_workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: int = 1024,
    ) -> None:
        super().__init__(num_workers, time_limit, memory_limit)
        self.pattern, self.ignore_case, self.multiline = pattern, ignore_case, multiline
        self._flags = (re.IGNORECASE if ignore_case else 0) | (re.MULTILINE if multiline else 0)
        try:
            re.compile(pattern, self._flags)
        except re.error as error:
            raise UsageError(f"pattern is {pattern!r}, which is no regular expression: {error}") from error

    def task_options(self) -> Mapping[str, Any]:
        """See :meth:`WorkerVerifier.task_options`."""
        return {"pattern": self.pattern, "flags": int(self._flags)}


class JsonSchemaVerifier(WorkerVerifier):
    """Verifier that accepts a response which is JSON and satisfies a JSON schema.

    The JSON is the last block in backticks, or the whole response. ``extracted`` is that JSON with sorted keys. Needs
    the extra ``jsonschema``.

    Args:
        schema: the schema, or the path of a file with it in YAML or JSON; null: each gold answer is the schema of its
            problem.
        num_workers: see :class:`WorkerVerifier`.
        time_limit: see there.
        memory_limit: see there.

    Raises:
        UsageError: the package is missing, or the schema is invalid.

    Example:
        >>> verifier = JsonSchemaVerifier({"type": "object", "required": ["city"]}, num_workers=1)
        >>> [verdict.reason for verdict in verifier.verify(['{"city": "Bonn"}', "{}", "Bonn"], ["-"] * 3)]
        ['valid', 'invalid', 'no answer']
    """

    task = "opdlab.verifiers.tasks:json_schema_task"

    def __init__(
        self,
        schema: dict[str, Any] | str | None = None,
        num_workers: int = 2,
        time_limit: float = 5.0,
        memory_limit: int = 1024,
    ) -> None:
        super().__init__(num_workers, time_limit, memory_limit)
        require_package("jsonschema", "verifier JsonSchemaVerifier", "jsonschema")
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        if isinstance(schema, str):
            file = expanded(schema, "schema")
            require(file.is_file(), f"schema is {schema}, but this file does not exist: give one that does")
            given, schema = schema, read_yaml(file)
            require(schema is not None, f"schema is {given}, but this file is empty: leave the option out")
        if schema is not None:
            try:
                validator_for(schema).check_schema(schema)
            except SchemaError as error:
                raise UsageError(f"schema is invalid, change it: {first_line(error)}") from error
        self.schema = schema

    def task_options(self) -> Mapping[str, Any]:
        """See :meth:`WorkerVerifier.task_options`."""
        return {"schema": self.schema}
