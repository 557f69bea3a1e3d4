"""The way through the package: no import cycle, neither of files nor of rooms."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"opdlab": "opdlab", "strategies": "opdlab.strategies", "callbacks": "opdlab.callbacks"}
# The registry imports a plug-in's module by a name that it is handed; no import statement names it. The package's own
# face names everything, and nothing imports it.
FACE = "opdlab"
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


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield what a file imports: at the top, inside functions, for type checkers, and by a name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                yield base
                yield f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def file_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    files, graph = modules(), {}
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names = set(imported_names(ast.parse(file.read_text(encoding="utf-8")), package))
        # `from package import module` counts for the module and not for its package.
        below = {name.rpartition(".")[0] for name in names & files.keys() if name.rpartition(".")[0] in names}
        graph[module] = {name for name in names & files.keys() if name not in (module, FACE)}
        graph[module] -= {package for package in below if _only_a_path(file, package, files)}
    return graph


def _only_a_path(file: Path, package: str, files: Mapping[str, Path]) -> bool:
    """Return whether a file takes nothing but modules from a package."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and package in (alias.name for alias in node.names):
            return False
        if isinstance(node, ast.ImportFrom) and node.module == package:
            if any(f"{package}.{alias.name}" not in files for alias in node.names):
                return False
    return True


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
