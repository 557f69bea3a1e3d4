"""``opdlab gates``: list the registered gates. Imports torch, but neither Lightning nor transformers."""

from collections.abc import Sequence
from typing import Any

from opdlab.cli.arguments import PlainParser
from opdlab.cli.commands import COMMANDS
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
    lines = []
    for name in registry.names():
        documentation = (registry.get(name).__doc__ or "").strip().splitlines()
        lines.append(f"{name:{width}}  {documentation[0] if documentation else ''}")
    return "\n".join(lines)
