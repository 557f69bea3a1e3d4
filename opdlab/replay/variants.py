"""The gates of a replay: every combination of gate, statistic, normalisation and tau."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from transformers import PreTrainedTokenizerBase

from opdlab.errors import require
from opdlab.gating import DriftGate, GateStrategy, NormalizationName, Statistic, gate_registry
from opdlab.registry import suggestion
from opdlab.replay.plugins import Named, plugin_class, plugin_name
from opdlab.tau import TauSchedule, check_tau

STATISTICS: tuple[str, ...] = get_args(Statistic)
NORMALIZATIONS: tuple[str, ...] = get_args(NormalizationName)
UNGATED = "none"
KEYS = ("gate", "statistic", "normalization", "tau")
"""Names of the columns that identify a variant."""
_PAPER = {"statistic": "signed_mean", "normalization": "mean"}


def has_papers_form(options: Mapping[str, object]) -> bool:
    """True if statistic and normalisation of a variant are the paper's, or it has none."""
    return all(options[name] in (None, value) for name, value in _PAPER.items())


@dataclass(frozen=True)
class Grid:
    """Options to combine.

    Args:
        gates: registered names, class paths, or gates with options; None for all registered gates and the run's own.
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

    gates: Sequence[str | Named[GateStrategy]] | None = None
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
        gate: its registered name, or its class's, with the options that were given.
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
    """Return the variants of a grid.

    The ungated one comes first, even if not requested; the run's own is included if the record has its inputs.
    A gate that is named without options has the defaults, or those of the run's gate if it is of its class, such as
    ``block_size``.

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
    chosen: dict[str, type[GateStrategy] | GateStrategy]
    if grid.gates is not None:
        chosen = {gate_name(each): gate_class(each) if isinstance(each, str) else each.plugin for each in grid.gates}
    else:
        # Without its own options, `block` equals `block64`.
        chosen = {name: registry.get(name) for name in registry.names() if name != "block"}
        if type(own) not in chosen.values():
            chosen[own_name] = type(own)
    served, skipped = set(served), {}

    def missing(gate: GateStrategy) -> str:
        return ", ".join(need for need in gate.needs if need not in served)

    variants = [Variant.of(UNGATED, registry.build(UNGATED), own)]
    for name, gate in chosen.items():
        try:
            base = gate if isinstance(gate, GateStrategy) else own if type(own) is gate else gate()
        except (TypeError, ValueError) as error:
            skipped[name] = f"cannot be built without options ({error})"
            continue
        base.setup(tokenizer)
        if lacking := missing(base):
            skipped[name] = f"needs {lacking}, which the record does not have"
            continue
        variants += [Variant.of(name, each, own) for each in _gates(base, grid)]
    if not any(variant.own for variant in variants) and not missing(own):
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


def gate_name(gate: str | Named[GateStrategy]) -> str:
    """Return the name of a gate in tables."""
    if isinstance(gate, Named):
        return gate.name
    return plugin_name("--gates", gate, gate_registry(), GateStrategy)  # type: ignore[type-abstract]


def gate_class(name: str) -> type[GateStrategy]:
    """Return the gate class of a registered name or class path; see :func:`plugin_class`."""
    return plugin_class("--gates", name, gate_registry(), GateStrategy)  # type: ignore[type-abstract]
