"""What a study comes down to: a resolved configuration for each variant, and a command for each run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdlab.cli.config_files import config_path, shipped_configs
from opdlab.cli.parsing import parse_fit
from opdlab.errors import UsageError, require
from opdlab.evaluation.settings import difference, digest
from opdlab.studies.folder import RUNS, SAMPLES, STUDY, VARIANTS
from opdlab.studies.job import RunSpec
from opdlab.studies.study import OWN_KEYS, Study, Variant, read_study

# Keys of a resolved configuration that a study decides, or that name files and not what is in them. The steps to train
# for stay: a schedule may depend on them.
_LEFT_OUT = {"config", *OWN_KEYS} - {"trainer.max_steps"}
_FIXED = ("base", "overrides", "budgets", "threads")


@dataclass(frozen=True)
class Plan:
    """A study whose every configuration is known to be one.

    Args:
        study: with the names of its base settled.
        folder: of the study.
        resolved: the configuration of each variant, by dotted key; what differs from run to run is left out.
    """

    study: Study
    folder: Path
    resolved: Mapping[str, Mapping[str, Any]]

    def runs(self) -> list[RunSpec]:
        """Every run: all variants with the first seed, then with the next, so that a study cut short is balanced."""
        return [self._spec(variant, seed) for seed in self.study.seeds for variant in self.study.variants]

    def _spec(self, variant: Variant, seed: int) -> RunSpec:
        folder = run_path(self.folder, variant.name, seed)
        # Intervals between evaluations are counted in micro-batches.
        micro_batches = int(self.resolved[variant.name]["trainer.accumulate_grad_batches"])
        own = {
            "trainer.val_check_interval": self.study.interval * micro_batches,
            "seed_everything": seed,
            "data.seed": seed,
            "model.evaluation.seed": seed,
            "model.evaluation.samples": folder / SAMPLES,
            "trainer.default_root_dir": folder,
        }
        arguments = [*variant_arguments(self.study, variant), *(f"--{key}={value}" for key, value in own.items())]
        # It only writes beside the run, so it is in the command but not in what is compared.
        arguments += ["--trainer.callbacks+=opdlab.studies.progress.StepFile", f"--trainer.callbacks.folder={folder}"]
        others = [other.name for other in self.study.variants if other.name != variant.name]
        return RunSpec(
            variant=variant.name,
            seed=seed,
            folder=folder,
            arguments=tuple(arguments),
            evaluated_at=self.study.evaluated_at,
            threads=self.study.threads,
            keep_checkpoints=self.study.keep_checkpoints,
            digest=digest([self.resolved[variant.name], self.study.threads]),
            siblings=tuple(run_path(self.folder, other, seed) for other in others),
        )

    def settle(self) -> None:
        """Write the study and its variants' configurations into its folder, or see that they are those of its runs.

        Variants and seeds may be added.

        Raises:
            UsageError: the study has runs, and something that they depend on is another now.
        """
        if (self.folder / STUDY).exists():
            self._compare(read_study(self.folder))
        (self.folder / VARIANTS).mkdir(parents=True, exist_ok=True)
        for name, config in self.resolved.items():
            (self.folder / VARIANTS / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
        (self.folder / STUDY).write_text(self.study.as_yaml(), encoding="utf-8")

    def _compare(self, before: Study) -> None:
        has_runs = {v.name for v in before.variants if any((self.folder / RUNS / v.name).glob("seed-*/*"))}
        if not has_runs:
            return
        changes = difference(_fixed(before), _fixed(self.study)) or ""
        ours = {variant.name: variant for variant in self.study.variants}
        for variant in before.variants:
            if variant.name in has_runs:
                changes = changes or self._change_of(variant, ours.get(variant.name))
        gone = [seed for seed in before.seeds if seed not in self.study.seeds]
        gone = [seed for seed in gone if any((self.folder / RUNS).glob(f"*/seed-{seed}/run.json"))]
        changes = changes or (f"seeds has no {gone[0]} any more, which has runs" if gone else "")
        require(
            not changes,
            f"{self.folder} has runs of another study: {changes}; change it back, or give another --folder",
        )

    def _change_of(self, before: Variant, now: Variant | None) -> str:
        where = f"variants: '{before.name}'"
        if now is None:
            return f"{where} is gone, but has runs"
        if before.overrides != now.overrides:
            return f"{where}: overrides is {before.overrides} there and {now.overrides} now"
        try:
            theirs = json.loads((self.folder / VARIANTS / f"{before.name}.json").read_text())
        except (OSError, ValueError):
            return f"{where}: its configuration in {VARIANTS}/ cannot be read"
        differs = difference(theirs, self.resolved[before.name])
        return f"{where}: {differs}" if differs else ""


def _fixed(study: Study) -> dict[str, Any]:
    return {key: getattr(study, key) if key != "budgets" else sorted(study.budgets) for key in _FIXED}


def run_path(study_folder: Path, variant: str, seed: int) -> Path:
    """The folder of a run."""
    return study_folder / RUNS / variant / f"seed-{seed}"


def variant_arguments(study: Study, variant: Variant) -> list[str]:
    """What ``opdlab fit`` is given for a variant, whatever the seed."""
    arguments = [part for name in study.base for part in ("-c", name)] + [*study.overrides, *variant.overrides]
    steps = (f"--trainer.max_steps={study.max_steps}", "--trainer.check_val_every_n_epoch=null")
    return [*arguments, *steps, "--trainer.num_sanity_val_steps=0"]


def make_plan(study: Study, folder: Path) -> Plan:
    """Resolve and check every variant.

    Raises:
        UsageError: a configuration is missing, a key unknown or its value refused, or a run would not be evaluated at
            the budgets.
    """
    study = Study(**{**vars(study), "base": [_settled(name) for name in study.base]})
    resolved = {}
    for variant in study.variants:
        try:
            config = _resolve(study, variant)
        except UsageError as error:
            raise UsageError(f"{_blamed(study, variant, str(error))}: {error}") from error
        flat = _flat(config)
        resolved[variant.name] = {key: value for key, value in flat.items() if key not in _LEFT_OUT}
    return Plan(study, folder.absolute(), resolved)


def _resolve(study: Study, variant: Variant) -> dict[str, Any]:
    parsed = parse_fit([*variant_arguments(study, variant), "--seed_everything=false"])
    config: dict[str, Any] = json.loads(json.dumps(parsed.as_dict(), default=str))
    _check(config)
    return config


def _blamed(study: Study, variant: Variant, fault: str) -> str:
    """Where a fault lies: in what all variants have, if that is refused likewise without the variant's own."""
    for part, overrides in (("base", []), ("overrides", study.overrides)):
        try:
            _resolve(replace(study, overrides=overrides), replace(variant, overrides=[]))
        except UsageError as error:
            if str(error) == fault:
                return part
    return f"variants: '{variant.name}'"


def _settled(name: str) -> str:
    """A shipped configuration by its name, a file by its whole path."""
    path = Path(config_path(name)).resolve()
    shipped = {file.resolve(): known for known, file in shipped_configs().items()}
    return shipped.get(path, str(path))


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = [_flat(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()]
    return {name: leaf for part in parts for name, leaf in part.items()}


def _check(config: dict[str, Any]) -> None:
    """Check that every run trains to its end and is evaluated."""
    trainer = config["trainer"]
    benchmarks = config["data"].get("benchmarks")
    require(bool(benchmarks), "data.benchmarks is empty, so that nothing would be evaluated: give at least one")
    whole = {
        "limit_val_batches": (None, 1.0),
        "max_epochs": (None, -1),
        "max_time": (None,),
        "fast_dev_run": (None, False),
        "overfit_batches": (None, 0.0),
        "logger": (None, True),
    }
    for key, allowed in whole.items():
        value = trainer.get(key)
        require(
            value in allowed or (key == "logger" and isinstance(value, dict | list)),
            f"trainer.{key} is {value}, with which a run may not be evaluated in full at every budget: leave it out",
        )
