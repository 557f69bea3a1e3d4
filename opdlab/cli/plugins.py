"""``opdlab gates`` and ``opdlab objectives``: list what is registered."""

from collections.abc import Sequence
from typing import Any

from opdlab.cli.commands import COMMANDS, PlainParser, listing
from opdlab.registry import Registry


def list_gates(arguments: Sequence[str]) -> int:
    """Run ``opdlab gates``, and return the exit code.

    Raises:
        UsageError: arguments are given; the command takes none.
    """
    from opdlab.gating import gate_registry  # here, because gates need neither Lightning nor transformers

    return _list("gates", gate_registry(), arguments)


def list_objectives(arguments: Sequence[str]) -> int:
    """Run ``opdlab objectives``, and return the exit code.

    Raises:
        UsageError: arguments are given; the command takes none.
    """
    from opdlab.objectives import objective_registry

    return _list("objectives", objective_registry(), arguments)


def _list(command: str, registry: Registry[Any], arguments: Sequence[str]) -> int:
    PlainParser(prog=f"opdlab {command}", description=COMMANDS[command].summary).parse_args(arguments)
    print(listing(_first_lines(registry)))
    return 0


def described(registry: Registry[Any]) -> str:
    """Return one line per registered class: its name and the first line of its docstring."""
    width = max(map(len, registry.names()))
    return "\n".join(f"{name:{width}}  {text}" for name, text in _first_lines(registry).items())


def _first_lines(registry: Registry[Any]) -> dict[str, str]:
    documented = {name: (registry.get(name).__doc__ or "").strip() for name in registry.names()}
    return {name: text.partition("\n")[0] for name, text in documented.items()}
