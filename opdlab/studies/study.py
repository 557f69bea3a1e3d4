"""The file of a study, checked before anything runs."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from opdlab.errors import UsageError, require
from opdlab.parser_messages import Explainer
from opdlab.registry import suggestion
from opdlab.studies.schema import STUDY
from opdlab.yaml_files import read_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Keys that a study sets for each run: an override would break the pairing or lose the samples.
OWN_KEYS = {
    "seed_everything": "seeds",
    "data.seed": "seeds",
    "model.evaluation.seed": "seeds",
    "model.evaluation.samples": "the folder of the study",
    "trainer.default_root_dir": "the folder of the study",
    "trainer.max_steps": "budgets",
    "trainer.val_check_interval": "budgets",
    "trainer.check_val_every_n_epoch": "budgets",
    "collapse_guard.stop": "the comparison, for which all runs take equally many steps",
    "ckpt_path": "what a run left when it was stopped",
}


@dataclass(frozen=True)
class Variant:
    """A configuration that a study compares with others.

    Args:
        name: of the variant and its folder.
        overrides: changes to the base, as on the command line: ``--model.gate=span``. Later ones win.
        label: name in the report; ``name`` by default.
        baseline: name of the variant that this one is compared with; the study's by default.

    Raises:
        UsageError: the name is not a valid folder name, or an override does not have the form ``--key=value`` or sets
            a key that the study sets.
    """

    name: str
    overrides: list[str] = field(default_factory=list)
    label: str | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, "variants: the name")
        check_overrides(self.overrides, f"variants: overrides of '{self.name}'")


@dataclass(frozen=True)
class Study:
    """Variants of one configuration, each run once per seed.

    With equal seed, variants share training prompts and their order, evaluation problems, and the seeds that answers
    are sampled with, so that differences are due to the variants alone.

    Args:
        name: of the study, and of its folder.
        base: configurations, stacked as with ``-c``: files or shipped names.
        variants: the variants to compare.
        baseline: name of the variant that the others are compared with, unless they name another.
        seeds: every variant is run once per seed; at least one seed.
        budgets: optimizer steps at which runs are evaluated; they train to the largest. Evaluations are made at every
            multiple of their greatest common divisor.
        overrides: for all variants; a variant's own are applied after them.
        threads: CPU threads of each process of a run; rounding depends on it. Null leaves the number to PyTorch.
        keep_checkpoints: keep the checkpoints of finished runs.

    Raises:
        UsageError: a name is not a valid folder name or occurs twice, nothing is to run, a baseline is not a variant,
            or a value is out of range; the message says which.

    Example:
        >>> gates = [Variant(gate, [f"--model.gate={gate}"]) for gate in ("none", "span")]
        >>> Study("mine", ["quickstart"], gates, baseline="none", seeds=[0, 1], budgets=[20, 30]).evaluated_at
        (10, 20, 30)
    """

    name: str
    base: list[str]
    variants: list[Variant]
    baseline: str
    seeds: list[int]
    budgets: list[int]
    overrides: list[str] = field(default_factory=list)
    threads: int | None = 1
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name, "name")
        require(bool(self.base), "base is empty: name at least one configuration, for example quickstart")
        check_overrides(self.overrides, "overrides")
        names = [variant.name for variant in self.variants]
        require(bool(names), "variants is empty: give at least one, for example {name: none, overrides: []}")
        # Some file systems ignore case.
        twice = _repeated(name.casefold() for name in names)
        require(not twice, f"variants has the name '{twice}' twice: give every variant a name of its own")
        self._check_baselines(names)
        self._check_numbers()

    def _check_baselines(self, names: Sequence[str]) -> None:
        own = {f"variants: baseline of '{each.name}'": each.baseline for each in self.variants if each.baseline}
        for key, baseline in {"baseline": self.baseline, **own}.items():
            known = f"{suggestion(baseline, names) or ';'} variants: {', '.join(names)}"
            require(baseline in names, f"{key} is '{baseline}', which is no variant{known}")
        for variant in self.variants:
            require(
                variant.baseline is None or self.baseline != variant.name != variant.baseline,
                f"variants: baseline of '{variant.name}' is '{variant.baseline}', but '{variant.name}' is "
                f"{'that of the study' if variant.name == self.baseline else 'the variant itself'}: leave it out",
            )

    def _check_numbers(self) -> None:
        from opdlab.seeds import LARGEST_SEED  # here, because it imports torch, which supervisors of runs do without

        seeds, steps = f"numbers from 0 to {LARGEST_SEED}", "optimizer steps, at least 1"
        for key, lowest, highest, meaning in (("seeds", 0, LARGEST_SEED, seeds), ("budgets", 1, math.inf, steps)):
            values = getattr(self, key)
            require(bool(values), f"{key} is empty: give {meaning}, for example [40]")
            wrong = next((value for value in values if not lowest <= value <= highest), None)
            require(wrong is None, f"{key} has {wrong}, but must be {meaning}")
            repeated = _repeated(values)
            require(repeated is None, f"{key} has {repeated} twice: take one out")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}: give at least 1, or null")

    def label(self, name: str) -> str:
        """Return the label of a variant in the report."""
        return next(each.label for each in self.variants if each.name == name) or name

    def baseline_of(self, name: str) -> str:
        """Return the name of the variant that a variant is compared with; its own for the study's baseline."""
        return next(each.baseline for each in self.variants if each.name == name) or self.baseline

    @property
    def max_steps(self) -> int:
        """Return the largest budget."""
        return max(self.budgets)

    @property
    def interval(self) -> int:
        """Return the optimizer steps between evaluations."""
        return math.gcd(*self.budgets)

    @property
    def evaluated_at(self) -> tuple[int, ...]:
        """Return the optimizer steps after which a run is evaluated."""
        return tuple(range(self.interval, self.max_steps + 1, self.interval))

    def as_yaml(self) -> str:
        """Return the study as a file that :func:`read_study` reads."""
        variants = [{key: value for key, value in asdict(v).items() if value is not None} for v in self.variants]
        content = {**asdict(self), "variants": variants}
        text: str = yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)
        return text


def _check_name(name: str, key: str) -> None:
    require(
        _NAME.fullmatch(name) is not None,
        f"{key} is '{name}', but names a folder: use at most 100 of letters, digits, . _ - and no mark first",
    )


def check_overrides(overrides: Sequence[str], where: str) -> None:
    """Raise for overrides that lack the form ``--key=value`` or set a key that the study sets."""
    for override in overrides:
        key, equals, _ = override.removeprefix("--").partition("=")
        require(
            override.startswith("--") and bool(key) and bool(equals),
            f"{where} has '{override}': write --key=value, for example --model.gate=span",
        )
        owner = OWN_KEYS.get(key.rstrip("+"))
        require(owner is None, f"{where} has '{override}', but {key} follows from {owner}: leave it out")


def _repeated(values: Iterable[Any]) -> Any:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def parse_study(content: Any) -> Study:
    """Return the study that the content of a file describes.

    Raises:
        UsageError: a key is unknown, missing, or of the wrong type; or see :class:`Study`.

    Example:
        >>> parse_study({"name": "mine", "sedes": [0]})
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: unknown key 'sedes'; did you mean 'seeds'? ...
    """
    from jsonargparse import ArgumentParser

    require(isinstance(content, dict), "it holds no keys: see the shipped studies for an example")
    variants = content.get("variants")
    variants = [each for each in variants if isinstance(each, dict)] if isinstance(variants, list) else []
    for cls, section in [(Study, content), *((Variant, each) for each in variants)]:
        known = [each.name for each in fields(cls)]
        for key in section:
            hint = suggestion(str(key), known) or ";"
            require(key in known, f"unknown key '{key}'{hint} keys of a {cls.__name__.lower()}: {', '.join(known)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        config = parser.parse_object(content).as_dict()
        # Some versions of jsonargparse have already built a Variant.
        made = [vars(v) if isinstance(v, Variant) else dict(v) for v in config["variants"]]
        return Study(**{**config, "variants": [Variant(**each) for each in made]})
    except UsageError:
        raise
    except Exception as error:  # argparse's own error is not a ValueError
        required = re.search(r"arguments are required: (.+)$", " ".join(str(error).split()))
        raise UsageError(f"{required[1]} is missing: give it" if required else Explainer()(error)) from error


def read_study(path: Path) -> Study:
    """Read a study's file, or ``study.yaml`` in its folder; base configurations may lie beside it.

    Raises:
        UsageError: the file is missing, or its content is invalid; see :func:`parse_study`.
    """
    file = path / STUDY if path.is_dir() else path
    content = read_yaml(file)
    try:
        study = parse_study(content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    base = []
    for name in study.base:
        beside = (path for path in (file.parent / name, file.parent / f"{name}.yaml") if path.is_file())
        base.append(str(next((path.resolve() for path in beside), name)))
    return replace(study, base=base)
