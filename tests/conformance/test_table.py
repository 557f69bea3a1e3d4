"""The page docs/conformance.md names every objective, every control gate, and the code that the tests compare with."""

import re
from pathlib import Path

from opdlab.gating import RuleGate, gate_names, gate_registry
from opdlab.objectives import objective_names
from opdlab.objectives.base import objective_registry
from tests.conformance import test_official_code
from tests.conformance.others import VERSIONS

PAGE = (Path(__file__).parents[2] / "docs/conformance.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    text = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_row_is_filled() -> None:
    for heading in ("Objectives", "Gates"):
        for row in rows(heading):
            assert len(row) == 6, row
            assert all(row), row


def test_every_objective_has_a_row() -> None:
    named = {name for row in rows("Objectives") for name in re.findall(r"`(\w+)`", row[3])}
    built_in = {name for name in objective_names() if objective_registry().get(name).__module__.startswith("opdlab.")}
    assert built_in <= named


def test_every_control_gate_has_a_row_and_no_other() -> None:
    named = [re.findall(r"`(\w+)`", row[0]) for row in rows("Gates")]
    gates = {name: gate_registry().get(name) for name in gate_names()}
    controls = sorted(
        name for name, gate in gates.items() if issubclass(gate, RuleGate) and gate.__module__.startswith("opdlab.")
    )
    assert sorted(names[0] for names in named) == controls


def test_every_gate_is_named() -> None:
    built_in = [name for name in gate_names() if gate_registry().get(name).__module__.startswith("opdlab.")]
    assert [name for name in built_in if f"`{name}`" not in PAGE] == []


def test_versions_are_those_that_are_compared() -> None:
    for package, version in VERSIONS.items():
        found = set(re.findall(rf"\b{package} (\d[\d.]*\d)", PAGE, re.IGNORECASE))
        assert found == {version}, package


def test_repositories_are_those_that_are_compared() -> None:
    for path in (test_official_code.DISTILLM, test_official_code.REVISITING, test_official_code.FIRE):
        assert f"`{path.split(':')[0]}`" in PAGE
