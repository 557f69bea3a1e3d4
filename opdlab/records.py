"""JSON files of settings and results: atomic writes, digests and differences.

Only the standard library is imported, so that processes that only supervise others start at once.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdlab.aliases import migrate
from opdlab.files import replacing
from opdlab.version import __version__

SETTINGS, RESULTS = "settings.json", "results.json"  # files of an evaluation
SETTINGS_PLACEHOLDER = "{settings}"
_DIGEST_BYTES = 16
_PACKAGES = ("torch", "transformers", "lightning")
# Older settings files are flat, with keys as messages show them: `model.student (its weights)`.
_FLAT_BENCHMARK = re.compile(r"data\.benchmarks\.(.+) \((\w+)\)")


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if the file is missing, truncated, or not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: a reader sees the old content or the new, never a part."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that the samples in ``folder`` depend on, nested by configuration keys; None if unknown."""
    compared = read_json(folder / SETTINGS).get("compared")
    if not isinstance(compared, dict):
        return None
    settings: dict[str, Any] = {}
    for key, value in compared.items():
        if isinstance(value, dict):
            settings[key] = value
            continue
        benchmark = _FLAT_BENCHMARK.fullmatch(key)
        path = ["data", "benchmarks", *benchmark.groups()] if benchmark else key.replace(" (its ", ".").split(".")
        section = settings
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1].removesuffix(")")] = value
    return migrate(settings)


def digest(value: Any) -> str:
    """Return a hexadecimal digest of a value that JSON can represent.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest([1, 2]) == digest([2, 1])
        (True, False)
    """
    return hashlib.blake2b(_json(value), digest_size=_DIGEST_BYTES).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode("utf-8", "backslashreplace")


class ListDigest:
    """The digest of a list whose items come one by one, and are not held.

    Example:
        >>> items = ListDigest()
        >>> items.add([1, "a"]), items.add(None)
        (None, None)
        >>> items.hexdigest() == digest([[1, "a"], None]), ListDigest().hexdigest() == digest([])
        (True, True)
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(b"[", digest_size=_DIGEST_BYTES)
        self._separator = b""

    def add(self, item: Any) -> None:
        """Add the next item, which JSON can represent."""
        self._hash.update(self._separator + _json(item))
        self._separator = b", "

    def hexdigest(self) -> str:
        """Return the :func:`digest` of the list of the items."""
        whole = self._hash.copy()
        whole.update(b"]")
        return whole.hexdigest()


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return a tree of settings as a flat dict with dotted keys.

    Example:
        >>> flat({"data": {"seed": 0, "benchmarks": {}}})
        {'data.seed': 0, 'data.benchmarks': {}}
    """
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = [flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Return a sentence with the dotted keys in which two settings differ and both values; None if they are equal.

    Example:
        >>> difference({"data": {"seed": 0}, "top_p": 1.0}, {"data": {"seed": 1}, "top_p": 1.0})
        'data.seed is 0 there and 1 now'
    """
    there, here = flat(dict(theirs)), flat(dict(ours))
    keys = [key for key in [*here, *(there.keys() - here.keys())] if there.get(key) != here.get(key)]
    return ", ".join(f"{key} is {there.get(key)} there and {here.get(key)} now" for key in keys) or None


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results may depend on, without importing them."""
    return {"opdlab": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
