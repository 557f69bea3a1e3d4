"""Gates and objectives as a user names them for a replay."""

import pkgutil
from dataclasses import dataclass
from typing import Generic, TypeVar

from opdlab.errors import UsageError, first_line, require, user_code
from opdlab.registry import Registry

T = TypeVar("T")


@dataclass(frozen=True)
class Named(Generic[T]):
    """A gate or an objective with options, and its name in tables.

    Args:
        name: such as ``block:block_size=16``.
        plugin: the gate or objective.
    """

    name: str
    plugin: T


def plugin_class(flag: str, name: str, registry: Registry[T], base: type[T]) -> type[T]:
    """Return the class of a registered name or class path.

    Args:
        flag: name of the argument, for messages.
        name: what was given.
        registry: of the kind.
        base: the class that it must extend.

    Raises:
        UsageError: there is no such class; for a name the message has the nearest one.
    """
    if "." not in name:
        return registry.get(name)
    kind = f"{'an' if registry.kind[0] in 'aeiou' else 'a'} {registry.kind}"
    try:
        with user_code(f"importing {flag} {name}"):
            cls = pkgutil.resolve_name(name)
    except UsageError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{flag} has '{name}', but {error}: give the class path of {kind}") from error
    require(
        isinstance(cls, type) and issubclass(cls, base),
        f"{flag} has '{name}', which is not {kind}: give a class that extends "
        f"{base.__module__.rpartition('.')[0]}.{base.__name__}",
    )
    return cls  # type: ignore[no-any-return] # looked up by name


def plugin_name(flag: str, name: str, registry: Registry[T], base: type[T]) -> str:
    """Return the name of a class in tables: the registered one, or the class's own.

    Args:
        flag: name of the argument, for messages.
        name: registered name or class path.
        registry: of the kind.
        base: the class that it must extend.

    Raises:
        UsageError: see :func:`plugin_class`.

    Example:
        >>> from opdlab.gating import GateStrategy, gate_registry
        >>> plugin_name("--gates", "opdlab.strategies.SpanGate", gate_registry(), GateStrategy)
        'span'
    """
    cls = plugin_class(flag, name, registry, base)
    return registry.name_of(cls) or cls.__name__


def with_defaults(flag: str, name: str, cls: type[T]) -> T:
    """Return an instance of a class that was named without options.

    Args:
        flag: name of the argument, for messages.
        name: what was given.
        cls: its class.

    Raises:
        UsageError: the class needs options.
    """
    try:
        return cls()
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{flag} has '{name}', which cannot be built without options ({first_line(error)}): give them, as in "
            f"{name}:option=value"
        ) from error
