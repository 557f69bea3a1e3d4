"""Reads docstrings as the site needs them, so that the sources need not be written for the site."""

import re
from typing import Any

from griffe import AliasResolutionError, Extension, NameResolutionError, Object

_ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?([\w.]+)`")


class Docstrings(Extension):
    """Makes links of Sphinx's roles, code of doctests, and plain colons of reStructuredText's double ones.

    A role such as ``:class:`Gates` `` is what IDEs follow; one whose target has no place in the site stays code. Griffe
    reads doctests under ``Examples:`` alone, and takes ``Example:`` for a note.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Mend a docstring; called for every module, class, function and attribute."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            return f'<autoref identifier="{_path(obj, match[1])}" optional><code>{match[1]}</code></autoref>'

        text = _ROLE.sub(link, obj.docstring.value)
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _path(obj: Object, name: str) -> str:
    """Full path of what a docstring names: a path already, a member of the class, or a name of the module."""
    first, _, rest = name.partition(".")
    if first == "opdlab":
        return name
    scope = obj if obj.is_class or obj.is_module else obj.parent or obj
    if scope.is_class and name in scope.members:
        return f"{scope.path}.{name}"
    try:
        return ".".join(filter(None, (scope.resolve(first), rest)))
    except (NameResolutionError, AliasResolutionError):
        return name
