"""How configurations are found and read: shipped names, registered plug-ins, and errors in one line."""

import difflib
import importlib
import importlib.resources
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader

from opdlab.errors import UsageError, require
from opdlab.gating import gate_registry
from opdlab.objectives.base import objective_registry
from opdlab.registry import Registry, suggestion

# Keys whose value may be a registered name where jsonargparse wants a class path.
_REGISTRIES: dict[str, Callable[[], Registry[Any]]] = {
    "model.gate": gate_registry,
    "model.objective": objective_registry,
}
_CONFIG_FLAGS = ("-c", "--config")
# In a configuration file: the configuration, or list of them, that it builds on.
_EXTENDS = "extends"
# Texts of the files whose `extends` was obeyed: all that the parser hands to a loader is the text.
_OBEYED: set[str] = set()


def _load_yaml(text: str) -> Any:
    """Load YAML, and put class paths where registered names stand."""
    loaded = yaml.safe_load(text)
    if isinstance(loaded, dict):
        if (extended := loaded.pop(_EXTENDS, None)) is not None:  # no option of its own
            require(
                text in _OBEYED,
                f"{_EXTENDS} is {extended}, but is obeyed only in files given to -c or --config on the command line: "
                "write out what is wanted here, or give the file with -c",
            )
        for key in _REGISTRIES:
            _expand_in(loaded, key)
    return loaded


def _expand_in(config: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    section: Any = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        return
    value = section[last]
    if isinstance(value, str):
        section[last] = {"class_path": class_path_of(key, value)}
    elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
        value["class_path"] = class_path_of(key, value["class_path"])


CONFIG_MODE = "opdlab_yaml"
set_loader(CONFIG_MODE, _load_yaml, exceptions=(yaml.YAMLError,))


def class_path_of(key: str, name: str) -> str:
    """Turn a registered name into a class path; class paths, and names of classes, stay as they are.

    Raises:
        UsageError: neither is known; the nearest name is given.

    Example:
        >>> class_path_of("model.gate", "block64")
        'opdlab.strategies.block.Block64Gate'
    """
    registry = _REGISTRIES[key]()
    names = registry.names()
    classes = {registry.get(known).__name__ for known in names}
    if "." in name or name in classes:
        return name
    cls = registry.get(name)
    return f"{cls.__module__}.{cls.__qualname__}"


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Put paths where names of shipped configurations stand, and class paths where registered names do.

    A configuration that ``extends`` others becomes several ``-c``, those that it builds on first. What was read
    already is not read again as the base of another: it would undo what came in between.

    Raises:
        UsageError: no such configuration, gate or objective.
    """
    expanded: list[str] = []
    read: set[str] = set()
    for argument in arguments:
        flag, equals, value = _config_flag(argument)
        if expanded and expanded[-1] in _CONFIG_FLAGS:
            flag, value = expanded.pop(), argument
        if flag in _CONFIG_FLAGS and value:
            *bases, path = config_chain(config_path(value))
            for each in [*(base for base in bases if os.path.realpath(base) not in read), path]:
                expanded += [flag, each]
                read.add(os.path.realpath(each))
            continue
        if flag in _CONFIG_FLAGS and not equals:
            argument = flag
        if (key := flag.removeprefix("--")) in _REGISTRIES and equals:
            argument = f"{flag}={class_path_of(key, value)}"
        elif expanded and (key := expanded[-1].removeprefix("--")) in _REGISTRIES:
            argument = class_path_of(key, argument)
        expanded.append(argument)
    return expanded


def _config_flag(argument: str) -> tuple[str, str, str]:
    """Split an argument at its ``=``, and undo what argparse allows for -c: ``-cFILE`` and ``--conf FILE``."""
    if argument.startswith("-c") and argument[2:]:
        return "-c", "=", argument[2:].removeprefix("=")
    flag, equals, value = argument.partition("=")
    if flag.startswith("--co") and "--config".startswith(flag):
        flag = "--config"
    return flag, equals, value


def config_chain(path: str, extended_by: tuple[str, ...] = ()) -> list[str]:
    """Return the files that a configuration consists of, in the order in which they are read.

    The key ``extends`` names one configuration or a list of them: a file next to this one, with or without
    ``.yaml``, or a shipped configuration. Their keys are read first, so that this file's own win.

    Args:
        path: an existing file.
        extended_by: the files that led here.

    Returns:
        The files it builds on, each once, and ``path`` last.

    Raises:
        UsageError: one is missing, or extends itself, be it by way of others.

    Example:
        >>> [Path(file).name for file in config_chain(config_path("quickstart"))]
        ['quickstart.yaml']
    """
    trail = (*extended_by, path)
    circle = os.path.realpath(path) in map(os.path.realpath, extended_by)
    require(not circle, f"{trail[0]}: extends leads in a circle: {' -> '.join(trail)}; take one out")
    try:
        text = Path(path).read_text()  # in the encoding of the locale, as the parser reads it
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return [path]  # the parser says what is wrong with it
    require(loaded is not None, f"{path} is empty: give it keys, for example {_EXTENDS}: quickstart")
    names = loaded.get(_EXTENDS, []) if isinstance(loaded, dict) else []
    names = [names] if isinstance(names, str) else names
    require(
        isinstance(names, list) and all(isinstance(name, str) for name in names),
        f"{path}: {_EXTENDS} is {names}, but must be the name of a configuration or a list of names",
    )
    bases = [file for name in names for file in config_chain(_extended_path(name, path), trail)]
    _OBEYED.add(text)
    first: dict[str, str] = {}
    for base in bases:
        first.setdefault(os.path.realpath(base), base)  # one file may have two names
    return [*first.values(), path]


def _extended_path(name: str, path: str) -> str:
    folder = Path(path).parent
    for beside in (folder / name, folder / f"{name}.yaml"):
        if beside.is_file():
            return os.path.normpath(beside)  # pathlib keeps `..`, and one file would have two names
    try:
        return config_path(name)
    except UsageError as error:
        raise UsageError(f"{path}: {_EXTENDS} is '{name}', which is not in {folder} either: {error}") from error


def shipped_configs() -> dict[str, Path]:
    """Every configuration that comes with opdlab, by name. Studies are none: they are made of configurations.

    Example:
        >>> "quickstart" in shipped_configs()
        True
    """
    root = Path(str(importlib.resources.files("opdlab.configs")))
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("studies/")}


def config_path(name: str) -> str:
    """Return ``name`` where it is a file, otherwise the shipped configuration of that name."""
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


def explain(error: BaseException, keys: Iterable[str] = ()) -> str:
    """Say in one line what is wrong with a configuration, with the nearest key where one is unknown.

    Args:
        error: what the parser raised.
        keys: keys that exist.

    Example:
        >>> explain(ValueError("Subcommand 'fit' does not accept option 'model.gaet'"), ["model.gate", "data.train"])
        "unknown key 'model.gaet'; did you mean 'model.gate'?"
    """
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text)
    if match := re.search(r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        # Block64Gate knows block_size, but has fixed it.
        options = [option for option in _options_of(match[1]) if option != match[2]]
        hint = suggestion(match[2], options) or ";"
        return f"unknown key '{match[2]}' of {match[1]}{hint} its keys: {', '.join(options)}"
    if match := re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", text):
        return f"unknown key '{match[1]}'{_nearest(match[1], sorted(keys))}"
    if match := re.search(r"^(\S+): Unable to load config ['\"](.*?)['\"]", text):
        return f"{match[1]} is {match[2]}, but it is a section{_nearest(f'{match[1]}.', sorted(keys))}"
    if match := re.search(r"^(\S+): Does not validate .*? Subtypes: \[(.*?)\] Errors: .*Given value: (.*)$", text):
        return f"{match[1]} is {match[3]}, but must be one of: {match[2].replace('typing.', '')}"
    if "arguments are required" in text:
        return f"{text}; start from a shipped configuration, for example -c quickstart"
    if "invalid choice" in text or 'expected "subcommand"' in text:
        return f"{text}; or give `gates`, which lists the registered gates, or `estimate`"
    return text


def _nearest(key: str, known: list[str]) -> str:
    """The key that was probably meant, or else what there is in its section."""
    section, _, name = key.rpartition(".")
    siblings = [other.removeprefix(f"{section}.") for other in known if other.rpartition(".")[0] == section]
    if not section or not siblings:
        return suggestion(key, known) or _ASK
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    return f"; did you mean '{section}.{near[0]}'?" if near else f"; its section has {', '.join(siblings)}"


def root_usage_error(error: BaseException) -> BaseException:
    """Return the :class:`UsageError` that ``error`` was raised from, or ``error`` where there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UsageError):
        cause = cause.__cause__
    return cause or error


_ASK = "; `opdlab fit --help` lists all keys"


def _options_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    inits = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base) and base is not object]
    parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
    return sorted({p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"})
