"""The way through the package: no import cycle, neither of files nor of rooms."""

import ast
from collections.abc import Container, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"opdlab": "opdlab", "strategies": "opdlab.strategies", "callbacks": "opdlab.callbacks"}
# The package's own face names everything, and nothing imports it.
FACE = "opdlab"
# The command line names the modules of all commands. (The registry's built-ins are a string that it is handed.)
TABLES = {FACE, "opdlab.cli", "opdlab.cli.commands"}
# Rooms that are split off another one.
ROOMS = {"opdlab.tasks.toy": "opdlab.toy"}


def modules() -> dict[str, Path]:
    """Return every file of the package by the name of its module."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            if not any(path.is_symlink() for path in (file, *file.parents)):
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


def imports_of(tree: ast.AST, package: str, known: Container[str]) -> Iterator[str]:
    """Yield what a file imports: at the top, inside functions, for type checkers, and by a name in a string.

    Args:
        tree: the file.
        package: that the file stands in.
        known: names of modules: what is imported from a package may be one of its modules.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def file_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    files, graph = modules(), {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names = set(imports_of(ast.parse(file.read_text(encoding="utf-8")), package, files))
        graph[module] = (names & files.keys()) - {module, FACE} if module not in TABLES else set()
    return graph


def room_graph() -> dict[str, set[str]]:
    """Return the rooms that each room imports: a room is what stands directly below the package."""

    def room(module: str) -> str:
        moved = next((new for old, new in ROOMS.items() if module.startswith(old)), module)
        return ".".join(moved.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for module, names in file_graph().items():
        graph.setdefault(room(module), set()).update({room(name) for name in names} - {room(module)})
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return one cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_in_a_circle() -> None:
    assert cycle(file_graph()) == []


def test_no_room_imports_in_a_circle() -> None:
    assert cycle(room_graph()) == []


@pytest.mark.parametrize("module", [module for module in modules() if module != FACE])
def test_no_module_imports_the_face_of_the_package(module: str) -> None:
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert FACE not in [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not (node.module == FACE and not node.level)


def test_the_ground_floor_stands_on_little() -> None:
    floor = {name for module, names in file_graph().items() if module.startswith("opdlab.types") for name in names}
    assert {".".join(name.split(".")[:2]) for name in floor} <= {"opdlab.types", "opdlab.tasks", "opdlab.verifiers"}
