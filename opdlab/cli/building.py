"""Build classes from a configuration, and add the user's key to the messages of constructors.

A class names its own field: ``num_samples is 0, but must be at least 1``. This module turns that into
``model.eval_sampling.num_samples is 0, but must be at least 1``.
"""

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from opdlab.errors import UsageError, first_line, user_line
from opdlab.packages import package_trouble
from opdlab.seeds import FOLLOWING_SEEDS


def with_key(error: UsageError, key: str, fields: Container[str]) -> UsageError:
    """Return ``error`` with ``key`` before its message if the message begins with one of ``fields``.

    Args:
        error: error of a constructor.
        key: key of the section that the class is built from.
        fields: the keys in that section.

    Example:
        >>> str(with_key(UsageError("r is 0, but must be at least 1"), "model.student.adapter", ["r", "alpha"]))
        'model.student.adapter.r is 0, but must be at least 1'
    """
    field = re.match(r"\w+(?=[ .])", str(error))
    return UsageError(f"{key}.{error}") if key and field is not None and field[0] in fields else error


@contextmanager
def under(key: str, fields: Container[str]) -> Iterator[None]:
    """Raise a :class:`UsageError` of the block again with the key; see :func:`with_key`."""
    try:
        yield
    except UsageError as error:
        raise with_key(error, key, fields) from error


def with_seeds(config: Namespace) -> Namespace:
    """Return a copy of a configuration in which seeds that are null have the value of ``seed_everything``.

    Only objects are built from the copy; a saved configuration keeps the null, so it can be run with another seed.

    Example:
        >>> config = Namespace(seed_everything=3, data=Namespace(seed=None))
        >>> with_seeds(config).data.seed, config.data.seed
        (3, None)
    """
    filled = config.clone()
    for key in FOLLOWING_SEEDS:
        if key in config and config[key] is None:
            filled[key] = config.seed_everything
    return filled


def build(parser: ArgumentParser, config: Namespace, *, groups: bool = True) -> Namespace:
    """Return ``config`` with each described class replaced by an instance.

    jsonargparse tries every type of a union and then quotes all errors. This function raises only the error of the
    class that the configuration names, with the key of its section.

    Args:
        parser: the parser that parsed ``config``.
        config: the whole configuration, or the sections to build; see :func:`with_seeds` for its seeds.
        groups: also build classes of fixed sections, such as ``model``, not only those with a ``class_path``.

    Raises:
        UsageError: a constructor refused its arguments, or code outside opdlab failed in it.
    """
    config = with_seeds(config)
    refused: dict[str, UsageError] = {}

    def instantiate(cls: Any, *args: Any, **options: Any) -> Any:
        try:
            return cls(*args, **options)
        except Exception as error:
            key = _key_of(config.as_dict(), cls, options)
            if (told := _told(error, cls, key, options)) is not None:
                refused[" ".join(str(error).split())] = told
            raise

    parser.add_instantiator(instantiate, object, prepend=True)
    try:
        built: Namespace = parser.instantiate_classes(config, instantiate_groups=groups)
    except Exception as error:
        whole = " ".join(str(error).split())  # the parser indents the lines of a message
        quoted = [told for said, told in refused.items() if said in whole]
        if not quoted or quoted[-1] is error:
            raise
        raise quoted[-1] from error
    return built


def _told(error: Exception, cls: Any, key: str, options: Mapping[str, Any]) -> UsageError | None:
    """Return an error of a constructor as one that names the key; None for an error inside opdlab."""
    if isinstance(error, UsageError):
        return with_key(error, key, options)
    if isinstance(error, ImportError) and (trouble := package_trouble(error)) is not None:
        return UsageError(f"{key or cls.__name__} {trouble}")
    name = cls.__name__
    key = key or name
    if (line := user_line(error)) is not None:
        return UsageError(
            f"{key} cannot be built: {name} fails, change its options or {line}: {type(error).__name__}: "
            f"{first_line(error)}"
        )
    if not str(cls.__module__).startswith("opdlab."):
        keys = f"options ({', '.join(options)})"
        return UsageError(f"{key} cannot be built: {name} refuses its {keys}, change them: {first_line(error)}")
    return None


def _key_of(config: Mapping[str, Any], cls: Any, options: Mapping[str, Any]) -> str:
    """Return the key of the section that ``cls`` is built from, the first if several have equal values.

    A class may get other values than the section has, such as a path for a text; then its only section counts.
    """
    named = []
    for key, section in sections(config):
        own = section
        if "class_path" in section:
            if str(section["class_path"]).rpartition(".")[2] != cls.__name__:
                continue
            own = section.get("init_args") or {}
            named.append(key)
        elif section.keys() != options.keys():
            continue
        plain = {name: value for name, value in own.items() if isinstance(value, str | int | float | None)}
        if own.keys() <= options.keys() and all([options[name]] == [value] for name, value in plain.items()):
            return key
    return named[0] if len(named) == 1 else ""


def sections(value: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield all sections with their keys, innermost first. Keys omit ``init_args``, as the command line allows."""
    if not isinstance(value, Mapping | list):
        return
    for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from sections(inner, key if name == "init_args" else f"{key}.{name}".removeprefix("."))
    if isinstance(value, Mapping):
        yield key, value
