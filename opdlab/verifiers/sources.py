"""The code that a verifier of the user's consists of, by which saved verdicts are told from those of other code."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def source_digest(module: str) -> str:
    """Return a digest of the sources of a module and of all that it imports, except installed packages.

    A module that is itself installed counts with the other modules of its package. Files that code reads do not count.

    Args:
        module: name of an imported module.

    Example:
        >>> source_digest("json") == source_digest("csv")
        False
    """
    top, found, names = module.partition(".")[0], dict[str, bytes](), list(_with_packages(module))
    while names:
        name = names.pop()
        if name in found:
            continue
        file = _source_file(name)
        if file is None or (name.partition(".")[0] != top and str(file).startswith(_INSTALLED)):
            continue
        found[name] = file.read_bytes()
        names += _imports(found[name], name, is_package=file.name == "__init__.py")
    parts = hashlib.sha256()
    for name, source in sorted(found.items()):
        parts.update(f"{name} {len(source)} ".encode() + source)
    return parts.hexdigest()[:16]


def _source_file(name: str) -> Path | None:
    """Return the file of a module, which is not imported for that; None if there is none to read."""
    spec = _spec(name)
    file = None if spec is None or spec.origin is None else Path(spec.origin)
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _spec(name: str) -> ModuleSpec | None:
    package = name.rpartition(".")[0]
    try:
        if not package:
            return find_spec(name)
        above = _spec(package)  # the other find_spec would import the package
        found = None if above is None else above.submodule_search_locations
        return None if found is None else PathFinder.find_spec(name, list(found))
    except (ImportError, ValueError, AttributeError):
        return None


def _imports(source: bytes, name: str, *, is_package: bool) -> Iterator[str]:
    """Yield the names of what a source may import, modules or not."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) + is_package - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from _with_packages(base)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _with_packages(name: str) -> Iterator[str]:
    """Yield a module's name and those of the packages that it is in, whose own code runs too."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
