"""``opdlab gates``: list the registered gates. Imports torch, but neither Lightning nor transformers."""

from collections.abc import Sequence
from typing import Any

from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.gating import gate_registry
from opdlab.registry import Registry


def list_gates(arguments: Sequence[str]) -> int:
    """Run ``opdlab gates``, and return the exit code.

    Raises:
        UsageError: arguments are given; the command takes none.
    """
    PlainParser(prog="opdlab gates", description=COMMANDS["gates"].summary).parse_args(arguments)
    print(described(gate_registry()))
    return 0


def described(registry: Registry[Any]) -> str:
    """Return one line per registered class: its name and the first line of its docstring."""
    width = max(map(len, registry.names()))
    documented = {name: (registry.get(name).__doc__ or "").strip() for name in registry.names()}
    return "\n".join(f"{name:{width}}  {text.partition(chr(10))[0]}" for name, text in documented.items())
