"""Read YAML, and say in one line with file and line number what is wrong with it."""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from opdlab.errors import UsageError, not_text

# Far above any configuration. They bound the recursion of later code, and aliases that expand without end.
MAX_DEPTH = 50
MAX_VALUES = 100_000


class YamlError(UsageError):
    """Error for a text that is not YAML, or YAML that no configuration needs; the message has the line."""


class _Refused(yaml.MarkedYAMLError):  # type: ignore[misc] # PyYAML has no types
    """Valid YAML that no configuration needs."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML has no types
    """Safe loader that also refuses repeated keys, deep nesting, and characters that are not text.

    Dates are left as text, since no option is a date.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise _Refused(
                problem=f"it nests values more than {MAX_DEPTH} levels deep: write it flatter", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, Any], Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                before = first.setdefault((key.tag, key.value), key)
                if before is not key:
                    lines = f"lines {before.start_mark.line + 1} and {key.start_mark.line + 1}"
                    problem = f"the key '{key.value}' stands in {lines}: keep one of the two"
                    raise _Refused(problem=problem, problem_mark=key.start_mark)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # a huge number, a wrong tag
            raise _Refused(problem=f"its value cannot be read ({error})", problem_mark=node.start_mark) from error
        if isinstance(value, str) and (trouble := not_text(value)) is not None:
            raise _Refused(problem=trouble, problem_mark=node.start_mark)
        return value


def load_yaml(text: str, source: str) -> Any:
    r"""Return the content of a YAML text.

    Args:
        text: the text.
        source: its name in messages, such as the path of its file.

    Raises:
        YamlError: it is not YAML, repeats a key, is nested too deeply, or has characters that are not text; the
            message has the line.

    Example:
        >>> load_yaml("a: {b: 1}", "tiny.yaml")
        {'a': {'b': 1}}
        >>> load_yaml("a: 1\nb: 2\na: 3", "tiny.yaml")
        Traceback (most recent call last):
        ...
        opdlab.yaml_files.YamlError: tiny.yaml, line 3: the key 'a' stands in lines 1 and 3: keep one of the two
    """
    try:
        loaded = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except _Refused as error:
        raise YamlError(f"{source}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"{source}, line {mark.line + 1}, is not YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"{source}, line {line}: {not_text(text) or error.reason}") from error
    count, todo = 0, [(loaded, 0)]
    while todo:
        value, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise YamlError(f"{source} has aliases (*name) that expand to too many values: write them out")
        if isinstance(value, dict | list | tuple | set):
            todo += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
    return loaded


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UsageError: the file cannot be read, or is not UTF-8; see :func:`load_yaml`.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a YAML file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}, is not text in UTF-8: give a YAML file in that encoding") from error
    return load_yaml(text, str(path))
