"""The plan of a study: a resolved configuration for each variant, and a command for each run."""

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdlab.aliases import migrate
from opdlab.devices import devices_per_node
from opdlab.errors import UsageError, require
from opdlab.files import replacing
from opdlab.locks import locked
from opdlab.records import RESULTS, difference, digest, flat, package_versions, read_json, write_json
from opdlab.studies.job import RunSpec
from opdlab.studies.schema import EVALUATIONS, RUN, RUNS, SAMPLES, STUDY, VARIANTS, VERSION, StudyRun, run_path
from opdlab.studies.study import OWN_KEYS, Study, Variant, read_study

# Keys of a resolved configuration that a study sets, or that name files but not their content. The number of training
# steps stays, because a schedule may depend on it.
_LEFT_OUT = {"config", *OWN_KEYS} - {"trainer.max_steps", "collapse_guard.stop"}
# Trainer options that could prevent a full evaluation at every budget, and their allowed values.
_WHOLE: Mapping[str, tuple[Any, ...]] = {
    "limit_val_batches": (None, 1.0),
    "max_epochs": (None, -1),
    "max_time": (None,),
    "fast_dev_run": (None, False),
    "overfit_batches": (None, 0.0),
    "logger": (None, True),
}

Resolve = Callable[[Sequence[str]], Mapping[str, Any]]
"""Function from arguments of ``opdlab fit`` to its configuration as plain values; it may raise a UsageError."""


@dataclass(frozen=True)
class Plan:
    """A study whose configurations are all resolved and valid.

    Args:
        study: with the names of its base settled.
        folder: of the study.
        configs: the configuration of each variant, as the parser gives it.
    """

    study: Study
    folder: Path
    configs: Mapping[str, Mapping[str, Any]]

    @functools.cached_property
    def resolved(self) -> dict[str, dict[str, Any]]:
        """Return the configurations by dotted key; what differs from run to run is left out."""
        return {
            name: {key: value for key, value in flat(dict(config)).items() if key not in _LEFT_OUT}
            for name, config in self.configs.items()
        }

    def runs(self) -> list[RunSpec]:
        """Return every run: all variants with the first seed, then with the next: an unfinished study is balanced."""
        return [self._run(variant, seed) for seed in self.study.seeds for variant in self.study.variants]

    def _run(self, variant: Variant, seed: int) -> RunSpec:
        path = run_path(self.folder, variant.name, seed)
        resolved = self.resolved[variant.name]
        # Lightning counts intervals between evaluations in micro-batches.
        micro_batches = int(resolved["trainer.accumulate_grad_batches"])
        own = {
            "trainer.val_check_interval": self.study.interval * micro_batches,
            "seed_everything": seed,
            "data.seed": seed,
            "model.evaluation.seed": seed,
            "model.evaluation.samples": path / SAMPLES,
            "trainer.default_root_dir": path,
            # A collapsed run goes on, so that all are compared after equally many steps; the report marks it.
            "collapse_guard.stop": "false",
            # The recorder does not influence the run, so the command has it but the comparison does not.
            "trainer.callbacks+": "opdlab.studies.step_file.StepFile",
            "trainer.callbacks.folder": path,
        }
        return RunSpec(
            path=path,
            evaluated_at=self.study.evaluated_at,
            variant=variant.name,
            seed=seed,
            arguments=(*_arguments(self.study, variant), *(f"--{key}={value}" for key, value in own.items())),
            threads=self.study.threads,
            accelerator=str(resolved["trainer.accelerator"]),
            devices=devices_per_node(resolved["trainer.devices"]),
            nodes=int(resolved["trainer.num_nodes"]),
            keep_checkpoints=self.study.keep_checkpoints,
            digest=digest([resolved, self.study.threads]),
            siblings=tuple(run_path(self.folder, v.name, seed) for v in self.study.variants if v.name != variant.name),
        )

    def settle(self) -> None:
        """Write the study and its variants' configurations into its folder. Variants and seeds may be added.

        Raises:
            UsageError: the folder has runs that depend on settings that have changed since.
        """
        if (self.folder / STUDY).exists():
            changes = self._changes(read_study(self.folder))
            require(
                not changes,
                f"{self.folder} has runs of another study: {changes}; change it back, or give another --folder",
            )
        (self.folder / VARIANTS).mkdir(parents=True, exist_ok=True)
        for name, config in self.resolved.items():
            write_json(self.folder / VARIANTS / f"{name}.json", config)
        text = self.study.as_yaml().encode()
        if not (self.folder / STUDY).exists() or (self.folder / STUDY).read_bytes() != text:
            with replacing(self.folder / STUDY) as file:
                file.write(text)

    def _changes(self, before: Study) -> str | None:
        """Return what has changed since ``before`` that its runs depend on; None if nothing has."""
        begun = [each for each in before.variants if any((self.folder / RUNS / each.name).glob("seed-*/*"))]
        if not begun:
            return None
        # Not its base: what that says is in the variants' configurations, and its files may have been moved.
        old, new = (
            {"overrides": it.overrides, "budgets": sorted(it.budgets), "threads": it.threads}
            for it in (before, self.study)
        )
        if changes := difference(old, new):
            return changes
        ours = {variant.name: variant for variant in self.study.variants}
        for variant in begun:
            where, now = f"variants: '{variant.name}'", ours.get(variant.name)
            if now is None:
                return f"{where} is gone, but has runs"
            if now.overrides != variant.overrides:
                return f"{where}: overrides is {variant.overrides} there and {now.overrides} now"
            theirs = migrate(read_json(self.folder / VARIANTS / f"{variant.name}.json"))
            if not theirs:
                return f"{where}: its configuration in {VARIANTS}/ cannot be read"
            if changes := difference(theirs, self.resolved[variant.name]):
                return f"{where}: {changes}"
        for seed in before.seeds:
            if seed not in self.study.seeds and any((self.folder / RUNS).glob(f"*/seed-{seed}/{RUN}")):
                return f"seeds has no {seed} any more, which has runs"
        return None


def make_plan(study: Study, folder: Path, resolve: Resolve) -> Plan:
    """Resolve and check every variant.

    Args:
        study: with the names of its base settled, so that they mean the same from any folder.
        folder: of the study.
        resolve: see :data:`Resolve`.

    Raises:
        UsageError: a configuration is missing, a key unknown or its value refused, or a run is not evaluated at all
            budgets.
    """
    configs = {}
    for variant in study.variants:
        try:
            configs[variant.name] = _resolve(resolve, study, variant)
        except UsageError as error:
            raise UsageError(f"{_blamed(resolve, study, variant, str(error))}: {error}") from error
    return Plan(study, folder.absolute(), configs)


def _arguments(study: Study, variant: Variant) -> list[str]:
    """Return the arguments of ``opdlab fit`` for a variant, without the seed."""
    arguments = [part for name in study.base for part in ("-c", name)] + [*study.overrides, *variant.overrides]
    steps = (f"--trainer.max_steps={study.max_steps}", "--trainer.check_val_every_n_epoch=null")
    return [*arguments, *steps, "--trainer.num_sanity_val_steps=0"]


def _resolve(resolve: Resolve, study: Study, variant: Variant) -> Mapping[str, Any]:
    """Return a variant's configuration, after checking that every run ends and is evaluated."""
    config = resolve([*_arguments(study, variant), f"--seed_everything={study.seeds[0]}"])
    require(
        bool(config["data"].get("benchmarks")),
        "data.benchmarks is empty, so that nothing would be evaluated: give at least one",
    )
    for key, allowed in _WHOLE.items():
        value = config["trainer"].get(key)
        require(
            value in allowed or (key == "logger" and isinstance(value, dict | list)),
            f"trainer.{key} is {value}, with which a run may not be evaluated in full at every budget: leave it out",
        )
    devices = config["trainer"]["devices"]
    listed = isinstance(devices, list) or "," in str(devices)
    require(
        not listed,
        f"trainer.devices is {devices}, but a study chooses the devices of each run: give their number, "
        f"{devices_per_node(devices)}",
    )
    require(
        not (config.get("checkpoint") or {}).get("save_weights_only"),
        "checkpoint.save_weights_only is true, with which a run that is killed cannot go on: leave it out",
    )
    return config


def _blamed(resolve: Resolve, study: Study, variant: Variant, fault: str) -> str:
    """Return the part of the study with the fault: the first part that gives this fault without later parts."""
    for part, overrides in (("base", []), ("overrides", study.overrides)):
        try:
            _resolve(resolve, replace(study, overrides=overrides), replace(variant, overrides=[]))
        except UsageError as error:
            if str(error) == fault:
                return part
    return f"variants: '{variant.name}'"


def take_over(specs: Iterable[RunSpec], studies: Sequence[Path]) -> int:
    """Copy runs from other studies that equal the requested ones in configuration, seed, threads and versions.

    Such a run would give the same results, so it is not repeated. Its ``run.json`` names the folder it comes from.

    Args:
        specs: the requested runs; runs that have begun are not changed.
        studies: folders of other studies.

    Returns:
        Number of copied runs.
    """
    versions, taken = package_versions(), 0
    for spec in specs:
        if any((spec.path / name).exists() for name in (RUN, EVALUATIONS, SAMPLES, VERSION)):
            continue
        paths = [path for study in studies for path in sorted((study / RUNS).glob(f"*/seed-{spec.seed}"))]
        for source in (StudyRun(path, spec.evaluated_at) for path in paths):
            record = source.record
            if record.digest != spec.digest or not record.versions.items() >= versions.items() or not source.finished:
                continue
            with locked(spec.path) as mine:
                if mine:
                    shutil.copytree(source.evaluations, spec.evaluations, dirs_exist_ok=True)
                    if (results := source.path / VERSION / RESULTS).is_file():
                        (spec.path / VERSION).mkdir(exist_ok=True)
                        shutil.copyfile(results, spec.path / VERSION / RESULTS)
                    # Written last: a run counts as finished once this file exists.
                    replace(record, variant=spec.variant, taken_from=str(source.path.resolve())).write(spec.path)
                    taken += 1
            break
    return taken
