"""Turn jsonargparse's errors into one line: the key, the value, and what belongs there.

The parser nests texts: a union quotes the errors of all its types, a class those of its options. :class:`Explainer`
walks down to the one that the user can act on, and adds each key that it passes.
"""

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass

from jsonargparse import ArgumentParser

from opdlab.packages import package_trouble
from opdlab.registry import suggestion

_UNKNOWN = re.compile(
    r"^(?:Group '(?P<group>[\w.]+)' does not accept option|(?:.* does not accept )?[Oo]ption) '(?P<key>[^']+)'"
    r"|^unrecognized arguments: --(?P<argument>[\w.]+)"
)
_NO_PATH = re.compile(r"^\s*- Expected a path but .*? either not accessible or invalid\s+- ", re.DOTALL)
# Texts that lead to an error further inside: of an option, of a class, of a function that takes a class.
_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)$', re.DOTALL)
_CLASS = re.compile(r"^Problem with given class_path '(?P<cls>[^']+)':\s*(?P<rest>.*)$", re.DOTALL)
_CALLABLE = re.compile(r"^Type typing\.Callable.*? expects a function or a callable class:\s*(?P<rest>.*)$", re.DOTALL)
# The errors of a union are indented below this line; those of its types that quote further errors, more deeply.
_ERRORS = re.compile(r"^Does not validate .*?\n *Subtypes: \[(?P<types>.*?)\]\n(?P<indent> *)Errors:\n", re.DOTALL)
_WRITTEN = re.compile(
    r"^(?:Expected a dot import path string: |Not a valid .*? Got value: )(?P<value>.*?)(?: Subclass types.*)?$"
)
_NO_IMPORT = re.compile(r"^(?:module '(?P<module>\S+)' has no attribute|No module named) '(?P<name>[\w.]+)'")
# Of the errors in a union, these name the type that was meant; those that say most come first.
_TELLING = (_CLASS, _CALLABLE, re.compile("^Import path "), re.compile("^Expected an instantiatable class"))
_TYPES = {
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'NoneType'>": "null",
    "<class 'dict'>": "a section of keys",
    "<class 'list'>": "a list",
    "<class 'tuple'>": "a list",
    "<class 'pathlib.Path'>": "a path",
    "<class 'collections.abc.Sequence'>": "a list",
}
_CLASS_PATH = "the path of a class, such as package.module.Name"
_BASE = "is {value}, but must be {base}"
# What the parser says about a value, and what is said instead.
_RULES = [
    (re.compile(pattern), words)
    for pattern, words in (
        (r"Not a valid subclass of (?P<base>\w+)\. Got value: (?P<value>.*?) Subclass types", _BASE),
        (r"Import path (?P<value>\S+) does not correspond to a subclass of (?P<base>\w+)", _BASE),
        (r"Expected '(?P<value>\S+)' to be a subclass of <class '(?P<base>\w+)'>", _BASE),
        (
            r"Expected an instantiatable class, but (?P<value>\S+) is",
            "is {value}, which is abstract: give a class that extends it",
        ),
        (r"Unexpected import path format: (?P<value>.*)$", f"is {{value}}, but must be {_CLASS_PATH}"),
        (r"Expected a dot import path string: (?P<value>.*)$", f"is {{value}}, but must be {_CLASS_PATH}"),
        (
            r"Expected an import path or a subclass spec, but got (?P<value>.*?)(?:\.|$)",
            f"is {{value}}, but must be {_CLASS_PATH}",
        ),
        (
            r"argument of type '\w+' is not iterable|unhashable type: ",
            f"has a class_path that is not text: give {_CLASS_PATH}",
        ),
        (
            r"'\w+' object has no attribute 'keys'",
            "has init_args that are not a section of keys: leave them out, or give keys",
        ),
        (r"Expected an? (?P<types>.+?)\. Got value: ?(?P<value>.*)$", "is {value}, but must be {types}"),
    )
]


@dataclass(frozen=True)
class Explainer:
    r"""Says in one line what is wrong with a configuration, with the nearest key if one is unknown.

    Args:
        keys: valid keys.
        command: command that lists them.
        names: registered names that stand for classes, by key.

    Example:
        >>> explain = Explainer(["model.gate", "data.train"])
        >>> explain(ValueError("Group 'model' does not accept option 'gaet'"))
        "unknown key 'model.gaet'; did you mean 'model.gate'?"
        >>> explain(ValueError('Parser key "save_pools": Expected a <class \'bool\'>. Got value: maybe'))
        'save_pools is maybe, but must be true or false'
    """

    keys: Iterable[str] = ()
    command: str = "opdlab fit --help"
    names: Mapping[str, Iterable[str]] = field(default_factory=dict)

    def __call__(self, error: BaseException) -> str:
        """Return the line.

        Args:
            error: error raised by the parser.
        """
        text = " ".join(str(error).split())
        if match := _UNKNOWN.search(text):
            key = f"{match['group']}.{match['key']}" if match["group"] else match["key"] or match["argument"]
            return f"unknown key '{key}'{self._nearest(key)}"
        if match := re.search(r"^Parser key \"(\S+)\": Unable to load config '(.*?)' - a section, (line .*)$", text):
            return f"{match[1]} is {match[2]}, a file that cannot be read: {match[3]}"
        inner = re.search(r"Unable to load config .*?\n *- (Parser key \".*)$", str(error), re.DOTALL)
        if inner and "Unable to load" not in inner[1] and (match := _KEY.match(inner[1])):
            return self._value(match["key"], match["rest"], "", error)
        if match := re.search(r"^Parser key \"(\S+)\": Unable to load config ['\"](.*?)['\"]", text):
            return f"{match[1]} is {match[2]}, but it is a section{self._nearest(f'{match[1]}.')}"
        if match := re.search(r"^the following arguments are required: (.*)$", text):
            verb, what = ("are", "class paths") if "," in match[1] else ("is", "a class path")
            return (
                f"{match[1]} {verb} missing: give {what}, or start from a shipped configuration, for example "
                "-c quickstart"
            )
        if match := re.search(r"^Key must be a string, got: (.*)\.$", text):
            return f"the key {_shown(match[1])} is not text: put it in quotes"
        if match := re.search(r"^(?:Spaces not allowed in keys|Empty nested key): (\".*\")", text):
            return f"unknown key {match[1]}; `{self.command}` lists all keys"
        if match := _KEY.match(str(error)):
            return self._value(match["key"], match["rest"], "", error)
        return text

    def _value(self, key: str, text: str, cls: str, error: BaseException) -> str:
        """Return what is wrong with a value.

        Args:
            key: whole key of the value.
            text: what the parser says about it.
            cls: the class that the value names, or empty.
            error: the parser's error, whose cause may be a failed import.
        """
        text = _NO_PATH.sub("", text)
        if match := _KEY.match(text):
            return self._value(f"{key}.{match['key']}", match["rest"], "", error)
        if match := _CLASS.match(text):
            return self._value(key, match["rest"], match["cls"], error)
        if match := _CALLABLE.match(text):
            inner, _, given = match["rest"].rpartition(". Got value: Namespace(")
            named = re.match(r"class_path='([\w.]+)'", given)
            return self._value(key, inner or match["rest"], named[1] if named else cls, error)
        if match := _ERRORS.match(text):
            return self._union(key, match, text[match.end() :], error)
        text = " ".join(text.split())
        if match := re.match(r"Option '([\w.]+)' is not accepted", text):
            options = options_of(cls) if cls else []
            listed = f" its keys: {', '.join(options)}" if options else " it has no keys"
            hint = suggestion(match[1], options) or ";"
            return f"{key}: unknown key '{match[1]}'{f' of {cls}' if cls else ''}{hint}{listed}"
        if match := re.match(r"the following arguments are required: (.*)$", text):
            return f"{key} lacks {match[1]}: give {', '.join(f'{key}.{name}' for name in match[1].split(', '))}"
        if match := _NO_IMPORT.match(text):
            return self._import(key, cls, match, error)
        for pattern, words in _RULES:
            if match := pattern.match(text):
                found = {"value": "", "types": "", "base": "", **match.groupdict()}
                found |= {"value": _shown(found["value"]), "types": types_in_words(found["types"])}
                return f"{key} {words.format(**found | {'base': self._class(key, found['base'])})}"
        trouble = package_trouble(error)
        return f"{key} {trouble}" if trouble else f"{key}: {text}"

    def _union(self, key: str, match: re.Match[str], text: str, error: BaseException) -> str:
        """Return what is wrong with a value that may have several types; ``text`` has the errors and the value."""
        quoted, _, given = re.sub(
            rf"^{match['indent']}Given value type: .*\n *Given value: ", "\0", text, count=1, flags=re.MULTILINE
        ).partition("\0")
        errors, given = re.split(rf"^{match['indent']}  - ", quoted, flags=re.MULTILINE)[1:], given.strip()
        # An option of a class that is given before, or an item of a section.
        if nested := re.match(r"NestedArg\(key='(?P<key>[^']+)', val=(?P<value>.*)\)$", given, re.DOTALL):
            owner, _, option = nested["key"].rpartition(".")
            for text in (text for text in errors if _CLASS.match(text) or _CALLABLE.match(text)):
                return self._value(f"{key}.{owner}".rstrip("."), text, "", error)
            if match["types"].startswith("dict[") and not owner:
                written = _shown(nested["value"].strip("'"))
                return f"{key}.{option} is {written}, but must be {_CLASS_PATH}"
            return (
                f"unknown key '{key}.{nested['key']}': {f'{key}.{owner}'.rstrip('.')} is not a class with the key "
                f"'{option}'; give its class path first, or check the name"
            )
        for pattern in _TELLING:
            for text in filter(pattern.match, errors):
                named = re.search(r"class_path'?[=:] ?'([\w.]+)'", given)
                # In a union the parser leaves the value out.
                text = text.replace("Import path does", f"Import path {named[1] if named else given} does", 1)
                path = re.search(r"(?:class_path '|Import path |class, but )([\w.]+)", text)
                return self._value(key + ((path and _place(given, path[1])) or ""), text, "", error)
        for text in errors if given.startswith(("[", "{")) else ():
            quoted_value = _WRITTEN.match(" ".join(text.split()))
            if quoted_value and (place := _place(given, quoted_value["value"])) is not None:
                return self._value(f"{key}{place}", text, "", error)
            if _ERRORS.match(text):  # of an item of a list
                return self._value(key, text, "", error)
        names = {name.lower(): name for name in _subclasses(match["types"])}
        near = difflib.get_close_matches(given.lower(), names, n=1, cutoff=0.5)
        hint = f"; did you mean '{names[near[0]]}'?" if near else ""
        return f"{key} is {_shown(given)}, but must be {types_in_words(match['types'])}{hint}"

    def _import(self, key: str, cls: str, match: re.Match[str], error: BaseException) -> str:
        """Return why the class of a class path cannot be imported."""
        if match["module"]:
            known = [name for name in dir(importlib.import_module(match["module"])) if name[0] != "_"]
            return f"{key} is {match['module']}.{match['name']}, but {match['module']} has no '{match['name']}'" + (
                suggestion(match["name"], known) or ": check the name"
            )
        if cls.partition(".")[0] == match["name"].partition(".")[0]:  # a misspelled module is not a package to install
            return (
                f"{key} is {cls}, but there is no module '{match['name']}': check the name, install its package, or "
                f"start the command in the folder that holds it"
            )
        return f"{key} {package_trouble(error) or match[0]}"

    def _class(self, key: str, base: str) -> str:
        """Return what belongs where a class path is expected."""
        extends = f"the path of a class that extends {base}"
        return f"one of {', '.join(self.names[key])} or {extends}" if key in self.names else extends

    def _nearest(self, key: str) -> str:
        """Return a hint: the nearest key, or else the keys of its section."""
        section, _, name = key.rpartition(".")
        known = sorted(self.keys)
        siblings = [other.removeprefix(f"{section}.") for other in known if other.rpartition(".")[0] == section]
        if not section or not siblings:
            return suggestion(key, known) or f"; `{self.command}` lists all keys"
        near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
        listed = f"has {', '.join(siblings)}" if len(siblings) <= 16 else f"is listed by `{self.command}`"
        return f"; did you mean '{section}.{near[0]}'?" if near else f"; its section {listed}"


def _shown(value: str) -> str:
    """Return a value as it is written in YAML, cut off if it is long."""
    value = {"None": "null", "True": "true", "False": "false", "": "''"}.get(value, value)
    return value if len(value) <= 80 else f"{value[:80]}…"


def _place(value: str, written: str) -> str | None:
    """Return the keys that lead to a class inside a value, such as ``.toy`` or ``.0``; None if it is absent.

    Args:
        value: a list or a section, as Python writes it.
        written: the class path, or the part of the value that is not a class.
    """
    path, short = re.escape(written), re.escape(written.rpartition(".")[2])
    part = rf"(?:{{'class_path': '(?:{path}|{short})'|'{path}'|{path})"
    if match := re.search(rf"'(?!class_path|init_args)(\w+)': {part}", value):
        return f".{match[1]}"
    if re.match(part, value):
        return ""
    try:
        items = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # an object of the parser is in it
        return None
    items = enumerate(items if isinstance(items, list) else ())
    return next((f".{place}" for place, item in items if re.match(part, repr(item))), None)


def types_in_words(types: str) -> str:
    """Return what belongs to one of several types, as the parser or ``repr`` writes them.

    Example:
        >>> types_in_words("<class 'int'>, <class 'NoneType'>")
        'an integer or null'
    """
    # Commas inside brackets do not separate types.
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", types)]
    words = list(dict.fromkeys(map(_type_in_words, parts)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)


def _type_in_words(name: str) -> str:
    if name in _TYPES:
        return _TYPES[name]
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", name):
        return f"one of {match[1].replace(chr(39), '')}"
    if match := re.fullmatch(r"<class '([\w.]+)\.(\w+)'>", name):
        if is_dataclass(getattr(importlib.import_module(match[1]), match[2])):
            return f"a section of keys ({match[2]})"
        names = ", ".join(_subclasses(name))
        return f"one of {names} (or a class path)" if names else f"the path of a class that extends {match[2]}"
    if name.startswith("typing.Callable"):
        return _CLASS_PATH
    if match := re.fullmatch(r"(dict|[\w.]*(?:list|Iterable|Sequence|tuple))\[(.*)\]", name):
        parts = dict.fromkeys(part.rpartition(".")[2] for part in re.findall(r"[\w.]+", match[2]))
        inner = " or ".join(part for part in parts if part != "Union")
        return f"a section of keys ({inner})" if match[1] == "dict" else f"a list ({inner})"
    return name.replace("typing.", "").replace("tuple with", "a list with")


def _subclasses(types: str) -> list[str]:
    """Return the names of the imported public subclasses of classes, as the parser writes them; none if many.

    A class of opdlab or Lightning is public if a package above its module has it too, or none stands between them.
    """
    found = []
    for module, name in re.findall(r"<class '((?:opdlab|lightning)[\w.]*)\.(\w+)'>", types):
        todo = [getattr(importlib.import_module(module), name)]
        while todo:
            todo += (below := todo.pop(0).__subclasses__())
            found += [cls.__name__ for cls in below if not inspect.isabstract(cls) and _is_public(cls)]
    return list(dict.fromkeys(found)) if len(found) <= 12 else []


def _is_public(cls: type) -> bool:
    if cls.__name__[0] == "_":
        return False
    packages = cls.__module__.split(".")[:-1]
    if packages[:1] not in (["opdlab"], ["lightning"]) or packages == ["opdlab"]:
        return True
    above = (sys.modules.get(".".join(packages[:depth])) for depth in range(len(packages), 0, -1))
    return any(getattr(package, cls.__name__, None) is cls for package in above)


def options_of(class_path: str) -> list[str]:
    """Return the keys that the parser accepts for a class.

    Example:
        >>> options_of("opdlab.tau.LinearTau")
        ['end', 'num_steps', 'start']
    """
    module, _, name = class_path.rpartition(".")
    added = ArgumentParser(exit_on_error=False).add_class_arguments(getattr(importlib.import_module(module), name))
    return sorted({key.partition(".")[0] for key in added})
