"""Gates and objectives given to ``opdlab replay``: names, class paths, and options."""

import json
import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from opdlab.cli.building import build
from opdlab.cli.config_files import CONFIG_MODE, explainer
from opdlab.errors import UsageError, require, user_code
from opdlab.gating import GateStrategy, gate_registry
from opdlab.objectives import Objective, objective_registry
from opdlab.registry import Registry
from opdlab.replay.plugins import Named, plugin_class
from opdlab.yaml_files import load_yaml, read_yaml

T = TypeVar("T")
_OPTION = re.compile(r"\w+=")
_FORM = "NAME, NAME:option=value,option=value, a class path instead of NAME, or the YAML of a class"
# Options of a gate that a replay varies itself.
_VARIED = {"tau": "--taus", "statistic": "--statistics", "normalization": "--normalizations"}


def chosen_gates(values: Sequence[str]) -> list[str | Named[GateStrategy]]:
    """Return the gates of ``--gates``; see :func:`chosen_plugins`."""
    return chosen_plugins("--gates", values, gate_registry(), GateStrategy)  # type: ignore[type-abstract]


def chosen_objectives(values: Sequence[str]) -> list[str | Named[Objective]]:
    """Return the objectives of ``--objectives``; see :func:`chosen_plugins`."""
    return chosen_plugins("--objectives", values, objective_registry(), Objective)  # type: ignore[type-abstract]


def chosen_plugins(flag: str, values: Sequence[str], registry: Registry[T], base: type[T]) -> list[str | Named[T]]:
    """Return the plug-ins that a user names: as they are without options, and built with them.

    Args:
        flag: name of the argument, for messages.
        values: words of the command line: ``NAME``, ``NAME:option=value,option=value``, YAML, or a YAML file with a
            list; several of the first two may be separated by commas.
        registry: of the kind.
        base: the class that they must extend.

    Raises:
        UsageError: there is no such class, or an option is unknown or out of range.

    Example:
        >>> chosen_objectives(["sampled_token,support_divergence:tail=drop,k=8"])
        ['sampled_token', Named(name='support_divergence:tail=drop,k=8', plugin=SupportDivergence(...tail='drop', k=8))]
        >>> chosen_gates(["{class_path: block, init_args: {block_size: 16}}"])[0].name
        'block:block_size=16'
    """
    found: list[str | Named[T]] = []
    for word, options in (each for value in split_words(flag, values) for each in _sections(flag, value)):
        cls = plugin_class(flag, word, registry, base)
        if not options:
            found.append(word)
            continue
        name = registry.name_of(cls) or cls.__name__
        label = f"{name}:{','.join(f'{key}={_text(value)}' for key, value in options.items())}"
        if base is GateStrategy:
            for key in _VARIED.keys() & options.keys():
                raise UsageError(f"{flag} has '{label}', but a replay varies {key}: give {_VARIED[key]} instead")
        found.append(Named(label, _built(flag, label, cls, options, base)))
    return found


def split_words(flag: str, values: Sequence[str]) -> list[str]:
    """Return the single gates or objectives of the words of a command line, without splitting options and YAML.

    Args:
        flag: name of the argument, for messages.
        values: words of the command line.

    Raises:
        UsageError: an option belongs to no name.

    Example:
        >>> split_words("--gates", ["token,block:block_size=8,rho=0.2,span", "{class_path: a, init_args: {}}"])
        ['token', 'block:block_size=8,rho=0.2', 'span', '{class_path: a, init_args: {}}']
    """
    found: list[str] = []
    for value in values:
        if value.lstrip()[:1] in ("{", "["):
            found.append(value)
            continue
        for part in filter(None, value.split(",")):
            if _OPTION.match(part):
                require(bool(found) and ":" in found[-1], f"{flag} has '{part}' without a name before it: give {_FORM}")
                found[-1] += f",{part}"
            else:
                found.append(part)
    return found


def _sections(flag: str, value: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of one word, or of each entry of its YAML."""
    if value.lstrip()[:1] in ("{", "["):
        content = load_yaml(value, f"{flag} {value}")
    elif value.endswith((".yaml", ".yml")):
        content = read_yaml(value)
    else:
        name, colon, rest = value.partition(":")
        options: dict[str, Any] = {}
        for part in rest.split(",") if colon else ():
            require(_OPTION.match(part) is not None, f"{flag} has '{value}', where '{part}' is no option: give {_FORM}")
            key, _, text = part.partition("=")
            options[key] = load_yaml(text, f"{flag} {value}")
        return [(name, options)]
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in content if isinstance(content, list) else [content]:
        if isinstance(entry, str):
            found += _sections(flag, entry)
            continue
        known = isinstance(entry, Mapping) and isinstance(entry.get("class_path"), str)
        own = (entry.get("init_args") or {}) if known else {}
        require(
            known and isinstance(own, dict) and entry.keys() <= {"class_path", "init_args"},
            f"{flag} has {_text(entry)}, but an entry is a name, or a section with class_path and init_args",
        )
        found.append((entry["class_path"], own))
    return found


def _built(flag: str, label: str, cls: type[T], options: Mapping[str, Any], base: type[T]) -> T:
    """Return an instance of a class with options, whose types the parser checks."""
    key = flag.strip("-")
    parser = ArgumentParser(exit_on_error=False, parser_mode=CONFIG_MODE, prog="opdlab replay")
    parser.add_argument(flag, type=base)
    try:
        with user_code(f"importing {flag} {label}"):
            section = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(options)}
            built: T = build(parser, parser.parse_object({key: section}), groups=False)[key]
    except (ArgumentError, UsageError) as error:
        said = str(error) if isinstance(error, UsageError) else explainer(parser)(error)
        raise UsageError(f"{flag} has '{label}': {re.sub(f'^{key}[.:]? ?', '', said)}") from error
    return built


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
