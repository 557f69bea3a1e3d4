"""Registering plug-ins: names, duplicates, and gates of installed packages."""

import os
import sys
from pathlib import Path

import pytest

from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.registry import Registry, suggestion
from tests.children import run_child


class Plugin:
    def __init__(self, size: int = 1) -> None:
        self.size = size


class First(Plugin):
    pass


class Second(Plugin):
    pass


@pytest.fixture
def registry() -> Registry[Plugin]:
    # `math` is an example of a module without plug-ins.
    return Registry("plugin", Plugin, "math", "opdlab.no_such_group")


def redefined() -> type[Plugin]:
    """A class of the same module and qualified name each time, as when a notebook cell is run again."""

    class Cell(Plugin):
        pass

    return Cell


def test_a_registered_class_is_built_with_options(registry: Registry[Plugin]) -> None:
    assert registry.register("first")(First) is First
    registry.register("also_first")(First)
    assert registry.names() == ["also_first", "first"]
    assert registry.get("first") is First
    assert registry.build("first", size=3).size == 3


def test_the_name_of_a_class(registry: Registry[Plugin]) -> None:
    registry.register("first")(First)
    assert registry.name_of(First) == "first"
    assert registry.name_of(Second) is None


def test_a_name_is_given_once(registry: Registry[Plugin]) -> None:
    registry.register("mine")(First)
    with pytest.raises(UsageError, match=r"plugin 'mine' is registered already, by .*\.First: choose another name"):
        registry.register("mine")(Second)
    assert registry.get("mine") is First


def test_a_class_defined_anew_replaces_itself(registry: Registry[Plugin]) -> None:
    old, new = redefined(), redefined()
    assert old is not new
    registry.register("cell")(old)
    registry.register("cell")(old)
    registry.register("cell")(new)
    assert registry.get("cell") is new


def test_a_class_of_another_kind_is_refused(registry: Registry[Plugin]) -> None:
    with pytest.raises(UsageError, match="plugin 'mine': int must extend Plugin"):
        registry.register("mine")(int)
    assert registry.names() == []


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry[Plugin]) -> None:
    registry.register("first")(First)
    registry.register("second")(Second)
    with pytest.raises(UsageError, match=r"^unknown plugin 'frist'; did you mean 'first'\? registered: first, second$"):
        registry.get("frist")
    with pytest.raises(UsageError, match=r"^unknown plugin 'zzz'; registered: first, second$"):
        registry.build("zzz")


def test_suggestion_is_silent_when_nothing_is_near() -> None:
    assert suggestion("abc", []) == ""
    assert suggestion("abc", ["xyz"]) == ""
    assert suggestion("spam", ["span", "token"]) == "; did you mean 'span'?"


PLUGIN = """
from opdlab.gating import DriftGate, register_gate

@register_gate("stranger")
class StrangerGate(DriftGate):
    def segment_ids(self, inputs):
        return inputs.tokens
"""


OBJECTIVE = """
from opdlab.objectives import TeacherTopK, register_objective

@register_objective("stranger")
class StrangerObjective(TeacherTopK):
    pass
"""
FIND = """
from opdlab.gating import build_gate
print(build_gate("stranger", tau=2.0))
from opdlab.objectives import build_objective
print(build_objective("stranger", k=3))
"""


def test_plug_ins_of_installed_packages_are_found(tmp_path: Path) -> None:
    (tmp_path / "stranger_parts.py").write_text(PLUGIN + OBJECTIVE)
    info = tmp_path / "stranger_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-parts\nVersion: 1.0\n")
    kinds = "".join(f"[opdlab.{kind}]\nstranger = stranger_parts\n" for kind in ("gates", "objectives"))
    (info / "entry_points.txt").write_text(kinds)
    result = run_child(
        [sys.executable, "-c", FIND],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    gate, objective = result.stdout.splitlines()
    assert gate.startswith("StrangerGate(tau=2.0")
    assert objective.startswith("StrangerObjective(k=3")


def test_an_unknown_option_is_named_with_the_known_ones(registry: Registry[Plugin]) -> None:
    class Larger(Plugin):
        def __init__(self, depth: int = 1, **options: int) -> None:
            super().__init__(**options)
            self.depth = depth

    registry.register("larger")(Larger)
    with pytest.raises(UsageError, match="plugin 'larger' has no option 'dept'; did you mean 'depth'.* depth, size"):
        registry.build("larger", dept=3)
    with pytest.raises(UsageError, match="gate 'block64' has no option 'tua'; did you mean 'tau'"):
        build_gate("block64", tua=3)


def test_an_error_inside_a_plugin_is_its_own(registry: Registry[Plugin]) -> None:
    class Wrong(Plugin):
        def __init__(self, size: int = 1) -> None:
            super().__init__(length=size)  # type: ignore[call-arg]

    registry.register("wrong")(Wrong)
    with pytest.raises(TypeError, match="length"):
        registry.build("wrong", size=3)


@pytest.mark.parametrize("error", ["RuntimeError", "SystemExit"])
def test_a_package_that_cannot_be_imported_is_named(error: str, tmp_path: Path) -> None:
    (tmp_path / "broken_gates.py").write_text(f"raise {error}('boom')\n")
    info = tmp_path / "broken_gates-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-gates\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[opdlab.gates]\nbroken = broken_gates\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "opdlab", "gates"]
    result = run_child(command, env=environment, timeout=120)
    words = f"broken-gates declares the plugin 'broken', but importing broken_gates fails ({error}: boom)"
    assert result.returncode == 2
    assert result.stderr.startswith(f"opdlab: error: {words.replace('plugin', 'gate')}")
    assert len(result.stderr.splitlines()) == 1
