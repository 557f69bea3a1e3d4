"""Configurations shipped with opdlab: names, files, and descriptions. Nothing heavy is imported."""

import importlib.resources
import re
from pathlib import Path

from opdlab.errors import UsageError
from opdlab.registry import suggestion


def shipped_configs() -> dict[str, Path]:
    """Return the path of each configuration shipped with opdlab, by name. Studies are not included.

    Example:
        >>> "quickstart" in shipped_configs()
        True
    """
    root = Path(str(importlib.resources.files("opdlab.configs")))
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("studies/")}


def config_path(name: str) -> str:
    """Return ``name`` if it is a file, otherwise the path of the shipped configuration of that name."""
    if Path(name).is_file():
        return name
    shipped = shipped_configs()
    key = name.removeprefix("configs/").removesuffix(".yaml")
    if key not in shipped:
        raise UsageError(
            f"there is no configuration file '{name}', and none of that name comes with opdlab"
            f"{suggestion(key, shipped) or ';'} shipped: {', '.join(shipped)}"
        )
    return str(shipped[key])


def description(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a configuration; how to stack it is left out.

    Example:
        >>> description(shipped_configs()["gates/block64"])
        "A weight per block of 64 tokens: the paper's Block64"
    """
    comment = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))
    text = " ".join(line.strip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"\.(?:\s|$)|: (?:stack it|-c )", text, maxsplit=1)[0]
