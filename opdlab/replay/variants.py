"""The gates of a replay: every combination of gate, statistic, normalisation and tau."""

import copy
import itertools
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from opdlab.errors import UsageError, require, user_code
from opdlab.gating import DriftGate, GateStrategy, NormalizationName, Statistic, gate_registry
from opdlab.registry import Registry, suggestion
from opdlab.tau import TauSchedule, check_tau

T = TypeVar("T")
STATISTICS: tuple[str, ...] = get_args(Statistic)
NORMALIZATIONS: tuple[str, ...] = get_args(NormalizationName)
UNGATED = "none"
KEYS = ("gate", "statistic", "normalization", "tau")
"""Names of the columns that identify a variant."""


@dataclass(frozen=True)
class Grid:
    """Options to combine.

    Args:
        gates: registered names, or class paths; None for all registered gates and the run's own.
        statistics: for gates on drift; see :class:`opdlab.gating.DriftGate`.
        normalizations: see :class:`opdlab.gating.GateStrategy`.
        taus: per nat, of gates on drift.

    Raises:
        UsageError: a statistic or normalisation is unknown (the nearest is given), or a tau is out of range.

    Example:
        >>> Grid(statistics=("rsm",))
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: --statistics has 'rsm'; did you mean 'rms'? there are signed_mean, abs_mean, rms, max
    """

    gates: Sequence[str] | None = None
    statistics: Sequence[str] = STATISTICS
    normalizations: Sequence[str] = NORMALIZATIONS
    taus: Sequence[float] = (1.0, 5.0, 20.0)

    def __post_init__(self) -> None:
        for key, values, known in (
            ("--statistics", self.statistics, STATISTICS),
            ("--normalizations", self.normalizations, NORMALIZATIONS),
        ):
            require(bool(values), f"{key} is empty: give at least one of {', '.join(known)}")
            for value in values:
                hint = suggestion(value, known) or ";"
                require(value in known, f"{key} has '{value}'{hint} there are {', '.join(known)}")
        require(bool(self.taus), "--taus is empty: give at least one number")
        for tau in self.taus:
            check_tau("--taus", tau)


@dataclass(frozen=True)
class Variant:
    """A gate with all its options.

    Args:
        gate: its registered name, or its class's.
        statistic: None if the gate does not use one.
        normalization: None for a gate with constant weights of 1.
        tau: per nat; ``schedule`` if a schedule sets it; None if the gate has none.
        strategy: the gate itself.
        own: True if the run was trained with exactly this gate.
    """

    gate: str
    statistic: str | None
    normalization: str | None
    tau: float | str | None
    strategy: GateStrategy = field(compare=False, repr=False)
    own: bool = False

    @classmethod
    def of(cls, name: str, strategy: GateStrategy, own: GateStrategy) -> "Variant":
        """Return the variant of a gate called ``name``; ``own`` is the run's gate."""
        drift = strategy if isinstance(strategy, DriftGate) and not strategy.uniform else None
        tau = None if drift is None else "schedule" if isinstance(drift.tau, TauSchedule) else float(drift.tau)
        return cls(
            name,
            None if drift is None else drift.statistic,
            None if strategy.uniform else strategy.normalization.name,
            tau,
            strategy,
            type(strategy) is type(own) and (strategy.uniform or vars(strategy) == vars(own)),
        )


def expand(
    grid: Grid, own: GateStrategy, tokenizer: PreTrainedTokenizerBase, served: Iterable[str]
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants of a grid. The ungated one comes first, even if not requested; the run's own is included.

    A gate of the run's own class keeps the options that are not varied, such as ``block_size``; others have their
    defaults.

    Args:
        grid: what to combine.
        own: the run's gate.
        tokenizer: the student's.
        served: optional inputs that the record has; see :attr:`GateStrategy.needs`.

    Returns:
        The variants, and the reason for each omitted gate, by name.

    Raises:
        UsageError: a gate is unknown.
    """
    registry = gate_registry()
    own_name = registry.name_of(type(own)) or type(own).__name__
    if grid.gates is not None:
        classes = {name.rpartition(".")[2]: gate_class(name) for name in grid.gates}
    else:
        # Without its own options, `block` equals `block64`.
        classes = {name: registry.get(name) for name in registry.names() if name != "block"}
        if type(own) not in classes.values():
            classes[own_name] = type(own)
    served, skipped = set(served), {}
    variants = [Variant.of(UNGATED, registry.build(UNGATED), own)]
    for name, cls in classes.items():
        try:
            base = own if type(own) is cls else cls()
        except (TypeError, ValueError) as error:
            skipped[name] = f"cannot be built without options ({error})"
            continue
        base.setup(tokenizer)
        if missing := [need for need in base.needs if need not in served]:
            skipped[name] = f"needs {', '.join(missing)}, which the record does not have"
            continue
        variants += [Variant.of(name, gate, own) for gate in _gates(base, grid)]
    if not any(variant.own for variant in variants):
        variants.append(Variant.of(own_name, own, own))
    return list(dict.fromkeys(variants)), skipped


def _gates(base: GateStrategy, grid: Grid) -> Iterable[GateStrategy]:
    """Return copies of a gate, varying only its effective options: rule gates have neither statistic nor tau."""
    if base.uniform:
        yield base
        return
    of_drift = list(itertools.product(grid.statistics, grid.taus)) if isinstance(base, DriftGate) else [("", 0.0)]
    for normalization, (statistic, tau) in itertools.product(grid.normalizations, of_drift):
        gate = copy.copy(base)
        gate.normalization = replace(base.normalization, name=normalization)  # type: ignore[arg-type] # was checked
        if isinstance(gate, DriftGate):
            gate.statistic, gate.tau = statistic, tau  # type: ignore[assignment] # was checked
        yield gate


def gate_class(name: str) -> type[GateStrategy]:
    """Return the gate class of a registered name or class path; see :func:`plugin_class`."""
    return plugin_class("--gates", name, gate_registry(), GateStrategy)  # type: ignore[type-abstract]


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
