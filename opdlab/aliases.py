"""Old names in saved configurations, and the names that replaced them.

Saved configurations (a run's ``config.yaml``, a study's archive, a command in a script) keep the names of their time.
Code that reads one calls :func:`migrate` first. Add a row here when you rename a class or a key.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from opdlab.errors import require

# Modules and packages in class paths and ``package://`` paths. If several match, the longest is used.
PATHS = {
    "opdlab.studies.progress": "opdlab.studies.step_file",
    "opdlab.tasks": "opdlab.verifiers",
    "opdlab.tasks.math_verifier": "opdlab.verifiers.math.math_verifier",
    "opdlab.tasks.plain_verifiers": "opdlab.verifiers.plain",
    "opdlab.tasks.toy": "opdlab.toy",
    "opdlab.tasks.toy.problems": "opdlab.toy",
}
# Dotted keys of a configuration.
KEYS = {"model.max_tokens_per_microbatch": "model.max_tokens_per_pass"}
# Keys whose value means something else under the new name: dropped if the value is null, otherwise refused.
REMOVED = {"optimizer": "model.optimizer", "lr_scheduler": "model.lr_scheduler"}


def _any_of(names: dict[str, str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


# Matches a path at the beginning of a value or inside quoted JSON, but not inside another path or word.
_PATH = re.compile(rf"(?:(?<=package://)|(?<![\w./-]))(?P<old>{_any_of(PATHS)})(?P<rest>(?:\.\w+)*)(?![\w-])")
_OPTION = re.compile(rf"^--(?P<old>{_any_of(KEYS)})(?=[=+]|$)")


def migrate(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the current names; one that already uses them is returned equal.

    Args:
        config: nested as in YAML, or flat with dotted keys as in a study's ``variants/*.json``. Left unchanged.

    Raises:
        UsageError: a removed key has a value, or a key is given under both its old and its new name.

    Example:
        >>> migrate({"data": {"train": {"class_path": "opdlab.tasks.toy.problems.ChainProblems"}}})
        {'data': {'train': {'class_path': 'opdlab.toy.ChainProblems'}}}
        >>> migrate({"model.max_tokens_per_microbatch": 4096})
        {'model.max_tokens_per_pass': 4096}
    """
    return _migrate(config, {})


def migrate_text(text: str) -> str:
    """Return a class path, ``package://`` path or ``--key=value`` with the current names.

    Example:
        >>> migrate_text("package://opdlab.tasks.toy/models/student")
        'package://opdlab.toy/models/student'
        >>> migrate_text("--model.max_tokens_per_microbatch=4096")
        '--model.max_tokens_per_pass=4096'
    """
    return str(_replace_texts(text, {}))


def warn_of_old_names(source: str, content: dict[str, Any] | Sequence[str]) -> None:
    """Warn that old names are read as the new ones.

    Args:
        source: name of the source in the message: a file, or the command line.
        content: a configuration, or command-line arguments, before migration.
    """
    found: dict[str, str] = {}
    if isinstance(content, dict):
        _migrate(content, found)
    else:
        _replace_texts(content, found)
    if found:
        names = ", ".join(f"{old} is now {new}" for old, new in found.items())
        warnings.warn(f"{source} has old names, which are read as the new ones: {names}", FutureWarning, stacklevel=2)


# Both functions record in `found` each old name and its replacement.


def _replace_texts(value: Any, found: dict[str, str]) -> Any:
    def path(match: re.Match[str]) -> str:
        found[match.group()] = PATHS[match["old"]] + match["rest"]
        return found[match.group()]

    def option(match: re.Match[str]) -> str:
        found[match["old"]] = KEYS[match["old"]]
        return f"--{found[match['old']]}"

    if isinstance(value, str):
        return _PATH.sub(path, _OPTION.sub(option, value))
    if isinstance(value, dict):
        return {key: _replace_texts(part, found) for key, part in value.items()}
    return [_replace_texts(part, found) for part in value] if isinstance(value, list | tuple) else value


def _migrate(config: dict[str, Any], found: dict[str, str]) -> dict[str, Any]:
    migrated: dict[str, Any] = _replace_texts(config, found)
    for old, new in KEYS.items():
        for section, key in ((migrated, old), nested(migrated, old)):
            if key in section:
                target, new_key = (section, new) if key == old else nested(migrated, new)
                require(new_key not in target, f"{old} is now {new}, and both are given: leave {old} out")
                target[new_key] = section.pop(key)
                found[old] = new
    for old, new in REMOVED.items():
        # A section that is read from its own file may have a key of the same name.
        if old in migrated and any(str(key).partition(".")[0] == "model" for key in migrated):
            require(migrated.pop(old) is None, f"{old} is now {new}: set that instead, and leave {old} out")
    return migrated


def nested(config: Mapping[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """Return the section that holds a dotted key (empty if missing), and the last part of the key.

    Example:
        >>> nested({"model": {"gate": "block64"}}, "model.gate")
        ({'gate': 'block64'}, 'gate')
    """
    *parents, last = dotted.split(".")
    section: Any = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, Mapping) else None
    return (section if isinstance(section, dict) else {}), last
