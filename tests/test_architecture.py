"""The architecture of the package: no import cycle, neither of files nor of folders."""

import ast
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from opdlab.module import OPDModule
from opdlab.objectives import TeacherTopK
from tests.toy_run import Run

ROOT = Path(__file__).parents[1]
PACKAGES = {"opdlab": "opdlab", "strategies": "opdlab.strategies", "callbacks": "opdlab.callbacks"}
# The package's own `__init__` names everything, and no file imports it.
FACE = "opdlab"
# The command line names the modules of all commands. (The registry gets its built-ins as a string.)
TABLES = {FACE, "opdlab.cli", "opdlab.cli.commands"}


@cache
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


@cache
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
        return ".".join(module.split(".")[:2])

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
    assert {".".join(name.split(".")[:2]) for name in floor} <= {"opdlab.types", "opdlab.verifiers"}


class CalledFunctions:
    """Records which functions of the package run; lambdas and comprehensions are not counted."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.longest: list[str] = []
        self._chain: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or code.co_name.startswith("<") or (file := _own(code.co_filename)) is None:
            return
        if event == "call":
            self.functions.add((file, code.co_qualname))
            self._chain.append(code.co_qualname)
            self.longest = max(self.longest, list(self._chain), key=len)
        else:
            self._chain.pop()


@cache
def _own(name: str) -> str | None:
    """Return the path of a file of the package below its root; None for other files."""
    file = Path(name).resolve()
    return str(file.relative_to(ROOT)) if any(file.is_relative_to(ROOT / each) for each in PACKAGES) else None


def test_a_training_step_is_a_short_way(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[CalledFunctions] = []
    training_step = OPDModule.training_step

    def watched(self: OPDModule, batch: Any, batch_idx: int) -> Any:
        steps.append(CalledFunctions())
        sys.setprofile(steps[-1])
        try:
            return training_step(self, batch, batch_idx)
        finally:
            sys.setprofile(None)

    # A callback would profile Lightning's functions too.
    monkeypatch.setattr(OPDModule, "training_step", watched)
    make_run(gate="block64", objective=TeacherTopK(k=32)).fit(2)
    # The suite itself looks up each logged name, see conftest.py.
    own = {function for function in steps[1].functions if function[1] != "find_metric"}
    plain = steps[1]  # the first one also keeps the behavior log-probabilities
    assert len(own) <= 50, "\n".join(map(str, sorted(own)))
    assert len({file for file, _ in own}) <= 16
    assert len(plain.longest) <= 7, plain.longest
