"""Turn the parser's errors into one line: the key, the value, and what is valid."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from opdlab.errors import UsageError
from opdlab.packages import package_trouble
from opdlab.registry import suggestion

_HELP = "opdlab fit --help"
# Text that the parser puts around the name of a key, from the outside in.
_WRAPPER = re.compile(
    r"(?:Problem with given class_path '[^']+': |Type typing\.Callable\S*.*? expects a function or a callable class: )?"
    r'Parser key "(?P<key>[^"]+)": '
)
_UNKNOWN = re.compile(
    r"^(?:Group '(?P<group>[\w.]+)' does not accept option|(?:.* does not accept )?[Oo]ption) '(?P<key>[\w.]+)'"
    r"|unrecognized arguments: --(?P<argument>[\w.]+)"
)
_NO_PATH = re.compile(r"- Expected a path but .*? either not accessible or invalid - ")
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*?)\] "
    r"Errors: (?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)$"
)
_SINGLE = re.compile(r"Expected an? (?P<types>.+?)\. Got value: (?P<value>.*)$")
_WORDS = {
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'NoneType'>": "null",
    "<class 'collections.abc.Sequence'>": "a list",
}


def explain(error: BaseException, keys: Iterable[str] = (), *, command: str = _HELP) -> str:
    """Return one line that says what is wrong with a configuration, with the nearest key if one is unknown.

    Args:
        error: error raised by the parser.
        keys: valid keys.
        command: command that lists them.

    Example:
        >>> explain(ValueError("Group 'model' does not accept option 'gaet'"), ["model.gate", "data.train"])
        "unknown key 'model.gaet'; did you mean 'model.gate'?"
        >>> explain(ValueError("save_pools: Expected a <class 'bool'>. Got value: maybe"))
        'save_pools is maybe, but must be true or false'
    """
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not isinstance(error, UsageError) and (said := _not_importable(error, text)) is not None:
        return said
    if match := re.search(r"Problem with given class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        place = ".".join(re.findall(r'Parser key "([^"]+)"', text[: match.start()]))
        options = options_of(match[1])
        hint = suggestion(match[2], options) or ";"
        return f"{place}: unknown key '{match[2]}' of {match[1]}{hint} its keys: {', '.join(options)}"
    text = re.sub(r'^Parser key "([^"]+)": ', r"\1: ", text)
    if match := _UNKNOWN.search(text):
        key = f"{match['group']}.{match['key']}" if match["group"] else match["key"] or match["argument"]
        return f"unknown key '{key}'{_nearest(key, sorted(keys), command)}"
    if match := re.search(r"^(\S+): Unable to load config ['\"](.*?)['\"]", text):
        return f"{match[1]} is {match[2]}, but it is a section{_nearest(f'{match[1]}.', sorted(keys), command)}"
    if match := re.search(r"^([\w.+]+): (.*)$", text):
        return _wrong_value(match[1], match[2]) or f"{match[1]}: {_NO_PATH.sub('', match[2], count=1)}"
    if "arguments are required" in text:
        return f"{text}; start from a shipped configuration, for example -c quickstart"
    return text


def _not_importable(error: BaseException, text: str) -> str | None:
    """Return the reason that the class of a class path cannot be imported; None for other errors."""
    trouble, written = package_trouble(error), re.search(r"given class_path '(([\w]+)[\w.]*)'", text)
    if trouble is None or written is None:
        return None
    key = re.search(r'Parser key "([^"]+)"', text)
    where = key[1] if key else written[1]
    if f"No module named '{written[2]}'" in text:  # a misspelled module is not a package to install
        return (
            f"{where} is {written[1]}, but there is no module '{written[2]}': check the name, install its package, or "
            f"start the command in the folder that holds it"
        )
    return f"{where} {trouble}"


def _wrong_value(key: str, text: str) -> str | None:
    """Return what is wrong with the value of ``key``, or of a key inside it; None for an unknown error text."""
    text = re.sub(r"\. Got value: Namespace\(.*$", "", text)  # the outer type quotes it again
    if match := _WRAPPER.match(text):
        return _wrong_value(f"{key}.{match['key']}", text[match.end() :])
    text = _NO_PATH.sub("", text, count=1)
    if match := _UNION.match(text):
        # The intended type of the union reports an error about one of its own keys.
        inner = re.search(r"- (Problem with given class_path '[^']+': Parser key .*)$", match["errors"])
        inside = _wrong_value(key, inner[1]) if inner else None
        return inside or f"{key} is {match['value']}, but must be {_in_words(match['types'])}"
    if match := _SINGLE.match(text):
        return f"{key} is {match['value']}, but must be {_in_words(match['types'])}"
    if match := re.match(r"Expected a dot import path string: (.*)$", text):
        return f"{key} is {match[1]}, but must be the path of a class, such as package.module.Name"
    return None


def _in_words(types: str) -> str:
    # Commas inside brackets do not separate types.
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", types)]
    words = [_type_in_words(part) for part in parts]
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)


def _type_in_words(name: str) -> str:
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", name):
        return f"one of {match[1].replace(chr(39), '')}"
    if name not in _WORDS and (match := re.fullmatch(r"<class '([\w.]+)'>", name)):
        names = _subclasses(match[1])
        return f"one of {', '.join(names)} (or a class path)" if names else match[1].rpartition(".")[2]
    return _WORDS.get(name, name.replace("typing.", ""))


def _subclasses(class_path: str) -> list[str]:
    """Return the names of imported public subclasses of a class of this package."""
    module, _, name = class_path.rpartition(".")
    if not module.startswith("opdlab"):
        return []
    found, todo = [], [getattr(importlib.import_module(module), name)]
    while todo:
        todo += (below := todo.pop(0).__subclasses__())
        found += [cls.__name__ for cls in below if not inspect.isabstract(cls) and cls.__name__[0] != "_"]
    return found


def _nearest(key: str, known: list[str], command: str) -> str:
    """Return a hint: the nearest key, or else the keys of its section."""
    section, _, name = key.rpartition(".")
    siblings = [other.removeprefix(f"{section}.") for other in known if other.rpartition(".")[0] == section]
    if not section or not siblings:
        return suggestion(key, known) or f"; `{command}` lists all keys"
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    return f"; did you mean '{section}.{near[0]}'?" if near else f"; its section has {', '.join(siblings)}"


def options_of(class_path: str) -> list[str]:
    """Return the keys that the parser accepts for a class.

    Example:
        >>> options_of("opdlab.tau.LinearTau")
        ['end', 'num_steps', 'start']
    """
    module, _, name = class_path.rpartition(".")
    added = ArgumentParser(exit_on_error=False).add_class_arguments(getattr(importlib.import_module(module), name))
    return sorted({key.partition(".")[0] for key in added})
