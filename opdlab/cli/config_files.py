"""Find and read configurations: shipped names, files that extend others, and registered plug-ins."""

import json
import os
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader  # type: ignore[attr-defined]

from opdlab.aliases import migrate, migrate_text, nested, warn_of_old_names
from opdlab.cli.building import sections
from opdlab.cli.shipped import config_path
from opdlab.errors import UsageError, require
from opdlab.gating import gate_registry
from opdlab.objectives.base import objective_registry
from opdlab.parser_messages import Explainer
from opdlab.policies import sampler_registry
from opdlab.registry import Registry, suggestion
from opdlab.yaml_files import YamlError, load_yaml, read_yaml

# Keys whose value may be a registered name instead of a class path.
_REGISTRIES: dict[str, Callable[[], Registry[Any]]] = {
    "model.gate": gate_registry,
    "model.objective": objective_registry,
    "model.sampler": sampler_registry,
}
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
EXTENDS = "extends"
"""Key in a configuration file that names the configuration, or a list of them, that it extends."""


class ConfigFile(ActionConfigFile):
    """Action of ``--config NAME``: read a file or a shipped configuration, after those that it extends.

    A file is not read again as the base of a later one, because it would override the files in between.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Merge the files into ``cfg``, one after the other."""
        *bases, path = config_chain(config_path(str(values)))
        before = cfg.get(self.dest)
        read = {os.path.realpath(str(file)) for file in before} if isinstance(before, list) else set()
        for each in [*(base for base in bases if os.path.realpath(base) not in read), path]:
            check_sections(parser, read_yaml(each), each)
            try:
                super().__call__(parser, cfg, each, option_string)  # type: ignore[no-untyped-call]
            except ArgumentError as error:
                raise UsageError(f"{each}: {explainer(parser)(error)}") from error


def flattened(parser: ArgumentParser, name: str) -> dict[str, Any]:
    """Return the keys of a configuration and of all that it extends, merged as the parser merges them.

    Args:
        parser: of ``opdlab fit``.
        name: a file or the name of a shipped configuration.
    """
    merged = Namespace()  # type: ignore[no-untyped-call]
    read = ConfigFile(option_strings=["-c"], dest="config")  # type: ignore[no-untyped-call]
    read(parser, merged, name, "-c")
    keys: dict[str, Any] = merged.as_dict()
    del keys["config"]  # the list of files
    return keys


def explainer(parser: ArgumentParser) -> Explainer:
    """Return the function that says what is wrong with the arguments of a parser."""
    keys = parser.get_defaults().keys(branches=True)
    return Explainer(keys, f"{parser.prog} --help", {key: of().names() for key, of in _REGISTRIES.items()})


def check_sections(parser: ArgumentParser, config: Mapping[str, Any], source: str) -> None:
    """Refuse sections and classes whose form is wrong, which the parser would drop or fail on later.

    Args:
        parser: has the sections.
        config: what was read.
        source: name of the file in messages.

    Raises:
        UsageError: a section has no keys, or something else stands beside a class path and its ``init_args``.
    """
    defaults = parser.get_defaults()
    for key in defaults.keys(branches=True):
        if isinstance(defaults[key], Namespace) and "class_path" not in defaults[key]:
            section, last = nested(config, key)
            value = section.get(last, {})
            require(
                isinstance(value, dict | str),  # a string is the path of a file with the section
                f"{source}: {key} is {'null' if value is None else value}, but it is a section: give its keys, or "
                "leave it out",
            )
    for key, value in sections(config):
        if "class_path" in value or "init_args" in value:
            for name in value:
                hint = suggestion(str(name), _CLASS_KEYS) or ";"
                known = f"a class has the keys {', '.join(_CLASS_KEYS)}"
                require(name in _CLASS_KEYS, f"{source}: unknown key '{key}.{name}'{hint} {known}")
            path, options = value.get("class_path", ""), value.get("init_args", {})
            require(isinstance(path, str), f"{source}: {key}.class_path is {path}, but must be the path of a class")
            keys = "must be a section of keys; leave it out to set none"
            require(isinstance(options, dict), f"{source}: {key}.init_args is {options}, but {keys}")


def _load_value(text: str, path: str = "") -> Any:
    """Return the content of YAML, with old names migrated and registered names replaced by class paths.

    Args:
        text: of a file or of a value.
        path: the file's name if it was given to ``--config``; the parser leaves it out for files of sections.
    """
    loaded = load_yaml(text, path or "a section")
    if isinstance(loaded, dict):
        loaded = migrate(loaded)
        extended = loaded.pop(EXTENDS, None)  # not an option of the parser
        require(
            bool(path) or extended is None,
            f"{EXTENDS} is {extended}, but is obeyed only in files given to -c or --config on the command line: "
            "write out what is wanted here, or give the file with -c",
        )
        name_functions(loaded)
        for name in _REGISTRIES:
            for section, last in (nested(loaded, name), (loaded, name)):
                value = section.get(last)
                if isinstance(value, str):
                    section[last] = {"class_path": class_path_of(name, value)}
                elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
                    value["class_path"] = class_path_of(name, value["class_path"])
    return loaded


def name_functions(config: Any) -> None:
    """Replace each ``verifier`` that is the path of a function by a section of its verifier, in place.

    By their spelling: the name of a class begins with a capital letter.
    """
    for _, section in sections(config):
        if "verifier" in section and isinstance(section, dict):
            section["verifier"] = verifier_section(section["verifier"])


def verifier_section(value: Any) -> Any:
    """Return the section of a function's verifier if ``value`` is its path, otherwise ``value``.

    Example:
        >>> verifier_section("my_module.check")
        {'class_path': 'opdlab.verifiers.FunctionVerifier', 'init_args': {'function': 'my_module.check'}}
        >>> verifier_section("opdlab.verifiers.MathVerifier")
        'opdlab.verifiers.MathVerifier'
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.]*\.[a-z_]\w*", value):
        return {"class_path": "opdlab.verifiers.FunctionVerifier", "init_args": {"function": value}}
    return value


CONFIG_MODE = "opdlab_yaml"
set_loader(CONFIG_MODE, _load_value, exceptions=(YamlError,))


def class_path_of(key: str, name: str) -> str:
    """Return the class path of a registered name; class paths and class names are returned unchanged.

    Raises:
        UsageError: the name is unknown; the message suggests the nearest one.

    Example:
        >>> class_path_of("model.gate", "block64")
        'opdlab.strategies.block.Block64Gate'
    """
    registry = _REGISTRIES[key]()
    names = registry.names()
    classes = {registry.get(known).__name__ for known in names}
    # A section, or not a class at all, is for the parser.
    if "." in name or name in classes or name == "null" or name.startswith(("{", "[")):
        return name
    cls = registry.get(name)
    return f"{cls.__module__}.{cls.__qualname__}"


def expand_names(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` with registered names of plug-ins replaced by class paths, also after ``.help``.

    Raises:
        UsageError: no gate, objective or sampler has that name.

    Example:
        >>> expand_names(["--model.gate", "token", "--model.objective=sampled_token"])[:2]
        ['--model.gate', 'opdlab.strategies.token.TokenGate']
    """
    warn_of_old_names("the command line", arguments)
    expanded: list[str] = []
    before = ""
    for argument in map(migrate_text, arguments):
        flag, equals, value = argument.partition("=")
        own, last = (text.removeprefix("--").removesuffix(".help") for text in (flag, before))
        if equals and own in _REGISTRIES and flag.startswith("--"):
            expanded.append(f"{flag}={class_path_of(own, value)}")
        elif equals and own.endswith(".verifier"):
            expanded.append(f"{flag}={_one_line(verifier_section(value))}")
        elif before.startswith("--") and last.endswith(".verifier") and not argument.startswith("-"):
            expanded.append(_one_line(verifier_section(argument)))
        elif last in _REGISTRIES and not (
            before.endswith(".help") and argument.startswith("-")
        ):  # its value is optional
            expanded.append(class_path_of(last, argument))
        else:
            expanded.append(argument)
        before = argument
    return expanded


def _one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def config_chain(path: str, extended_by: tuple[str, ...] = ()) -> list[str]:
    """Return the files of a configuration, in reading order.

    The key ``extends`` names one configuration or a list of them: a file next to this one, with or without
    ``.yaml``, or a shipped configuration. They are read first, so the keys of this file take precedence.

    Args:
        path: an existing file.
        extended_by: the chain of files that extend this one.

    Returns:
        The files that it extends, each once, and ``path`` last.

    Raises:
        UsageError: a file is missing, or extends itself directly or through others.

    Example:
        >>> [Path(file).name for file in config_chain(config_path("quickstart"))]
        ['quickstart.yaml']
    """
    trail = (*extended_by, path)
    circle = os.path.realpath(path) in map(os.path.realpath, extended_by)
    require(not circle, f"{trail[0]}: extends leads in a circle: {' -> '.join(trail)}; take one out")
    loaded = read_yaml(path)
    require(loaded is not None, f"{path} is empty: give it keys, for example {EXTENDS}: quickstart")
    require(
        isinstance(loaded, dict),
        f"{path} holds {'a list' if isinstance(loaded, list) else 'a single value'}, but must hold keys, for example "
        f"{EXTENDS}: quickstart",
    )
    warn_of_old_names(path, loaded)
    names = loaded.get(EXTENDS, [])
    names = [names] if isinstance(names, str) else names
    require(
        isinstance(names, list) and all(isinstance(name, str) for name in names),
        f"{path}: {EXTENDS} is {names}, but must be the name of a configuration or a list of names",
    )
    bases = [file for name in names for file in config_chain(extended_path(name, path), trail)]
    first: dict[str, str] = {}
    for base in bases:
        first.setdefault(os.path.realpath(base), base)  # one file may have several paths
    return [*first.values(), path]


def extended_path(name: str, path: str) -> str:
    """Return the file that ``extends: name`` in the file ``path`` means: beside it, or a shipped one."""
    folder = Path(path).parent
    for beside in (folder / name, folder / f"{name}.yaml"):
        if beside.is_file():
            return os.path.normpath(beside)  # pathlib keeps `..`, so one file would have two paths
    try:
        return config_path(name)
    except UsageError as error:
        raise UsageError(f"{path}: {EXTENDS} is '{name}', which is not in {folder} either: {error}") from error
