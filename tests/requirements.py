"""Print the requirements of pyproject.toml without their upper bounds, for `make test-newest`."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

EXTRAS = ("dev", "notebooks")


def without_upper_bounds(requirement: str) -> str:
    """Return a requirement with its lower bounds alone.

    Example:
        >>> without_upper_bounds("torch>=2.7,<2.14")
        'torch>=2.7'
    """
    return re.sub(r",?\s*<=?\s*[\w.]+", "", requirement)


def requirements(project: dict[str, object]) -> Iterator[str]:
    """Yield the requirements of the package and of :data:`EXTRAS`, those of extras that an extra names included."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(project["dependencies"], list)
    todo = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    while todo:
        if named := re.fullmatch(r"opdlab\[(.*)\]", line := todo.pop(0)):
            todo += [line for extra in named[1].split(",") for line in extras[extra]]
        else:
            yield without_upper_bounds(line)


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    print("\n".join(requirements(pyproject["project"])))
