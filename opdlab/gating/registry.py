"""Registration of gates, and construction by name."""

from typing import Any

from opdlab.gating.base import GateStrategy
from opdlab.registry import Registry

_REGISTRY: Registry[GateStrategy] = Registry("gate", GateStrategy, "opdlab.strategies", "opdlab.gates")  # type: ignore[type-abstract]


def gate_registry() -> Registry[GateStrategy]:
    """Return the registry of gates, for the command line."""
    return _REGISTRY


register_gate = _REGISTRY.register
"""Class decorator that registers a gate under a name; see :meth:`opdlab.registry.Registry.register`."""


def gate_names() -> list[str]:
    """Return the names of all registered gates, built-in and installed.

    Example:
        >>> {"none", "token", "sequence", "block64", "span"} <= set(gate_names())
        True
    """
    return _REGISTRY.names()


def build_gate(name: str, **options: Any) -> GateStrategy:
    """Return a new gate by its registered name.

    Args:
        name: see :func:`gate_names`.
        options: keyword arguments of the gate's class.

    Raises:
        UsageError: no such gate (the nearest name is given), or an option is out of range.

    Example:
        >>> build_gate("block64", tau=2.0)
        Block64Gate(tau=2.0, statistic='signed_mean', normalization='mean', block_size=64)
        >>> build_gate("blok64")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: unknown gate 'blok64'; did you mean 'block64'? registered: ...
    """
    return _REGISTRY.build(name, **options)
