"""A study's folder, read: which runs there are, and how many samples of each problem were correct.

Only finished runs count. What they answered must be comparable: the same problems, and as many samples of each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from opdlab.errors import UsageError, require
from opdlab.evaluation.samples import Sample

STUDY, RUN, FINISHED = "study.yaml", "run.json", "finished"
_KEYS = ("name", "variants", "baseline", "seeds", "budgets")
_Problem = tuple[str, str, str | None]  # id, text, gold answer


@dataclass(frozen=True)
class Variant:
    """One of the things compared.

    Args:
        name: that of its folder.
        label: what the report calls it.
        overrides: what it changes of the base.
        baseline: name of the variant that it is compared with; its own name for the study's baseline.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    baseline: str


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    Args:
        variant: name.
        seed: of the run.
        state: ``finished``, or why the run does not count.
        record: content of ``run.json``.
    """

    variant: str
    seed: int
    state: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark asks; the same in every run.

    Args:
        problems: (id, text, gold answer) of P problems, sorted.
        num_samples: n, answers to each.
    """

    problems: tuple[_Problem, ...]
    num_samples: int


@dataclass(frozen=True)
class Results:
    """A study and what came out of it.

    Args:
        name: of the study.
        base: configurations under the variants.
        variants: V of them, in the order of the file.
        baseline: name of the variant that the others are compared with, where they don't name another.
        seeds: S of them.
        budgets: optimizer steps at which runs were evaluated, ascending.
        benchmarks: by name, sorted.
        runs: all that the study asks for, by variant and seed.
        counts: correct samples of each problem, [P], by variant, seed, budget and benchmark; finished runs alone.
    """

    name: str
    base: tuple[str, ...]
    variants: tuple[Variant, ...]
    baseline: str
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    benchmarks: Mapping[str, Benchmark]
    runs: Mapping[tuple[str, int], Run]
    counts: Mapping[tuple[str, int, int, str], NDArray[np.int64]]

    def label(self, variant: str) -> str:
        """What the report calls a variant."""
        return next(each.label for each in self.variants if each.name == variant)

    def finished(self, variant: str) -> list[int]:
        """Seeds of the variant's finished runs."""
        return [seed for seed in self.seeds if self.runs[variant, seed].state == FINISHED]

    def baseline_of(self, variant: str) -> str:
        """Name of the variant that this one is compared with."""
        return next(each.baseline for each in self.variants if each.name == variant)

    def paired(self, variant: str) -> list[int]:
        """Seeds with which both the variant and its baseline have finished."""
        baseline = set(self.finished(self.baseline_of(variant)))
        return [seed for seed in self.finished(variant) if seed in baseline]

    @property
    def compared(self) -> list[str]:
        """Variants that share at least one seed with their baseline; that of the study is not among them."""
        return [v.name for v in self.variants if v.name != self.baseline and self.paired(v.name)]

    @property
    def baselines(self) -> list[str]:
        """What variants are compared with, each once."""
        return list(dict.fromkeys(self.baseline_of(name) for name in self.compared))


def load_results(folder: Path) -> Results:
    """Read a study's folder.

    Args:
        folder: with ``study.yaml`` and ``runs/VARIANT/seed-SEED``.

    Raises:
        UsageError: it is no study, nothing has finished, the baseline has not, or the samples cannot be compared; the
            message says which.
    """
    study = _read_study(folder / STUDY)
    baseline = str(study["baseline"])
    variants = tuple(_variant(each, baseline, folder) for each in study["variants"])
    names = [variant.name for variant in variants]
    unknown = next((each for each in (baseline, *(v.baseline for v in variants)) if each not in names), None)
    require(unknown is None, f"{folder / STUDY}: baseline '{unknown}' is no variant; variants: {', '.join(names)}")
    seeds, budgets = tuple(study["seeds"]), tuple(sorted(study["budgets"]))
    runs = {(v.name, seed): _read_run(folder, v.name, seed) for v in variants for seed in seeds}
    reader = _SampleReader(folder)
    finished = [key for key, run in runs.items() if run.state == FINISHED]
    require(
        bool(finished), f"{folder}: none of its {len(runs)} runs has finished: `opdlab study run` goes on with them"
    )
    for variant, seed in finished:
        for budget in budgets:
            reader.read(variant, seed, budget)
    results = Results(
        name=str(study["name"]),
        base=tuple(map(str, study.get("base") or ())),
        variants=variants,
        baseline=baseline,
        seeds=seeds,
        budgets=budgets,
        benchmarks=dict(sorted(reader.benchmarks.items())),
        runs=runs,
        counts=reader.counts,
    )
    require(
        bool(results.finished(baseline)),
        f"{folder}: no run of the baseline '{baseline}' has finished, so there is nothing to compare with",
    )
    require(
        bool(results.compared),
        f"{folder}: no variant has finished with a seed that its baseline, such as '{baseline}', has finished with too",
    )
    return results


def run_folder(folder: Path, variant: str, seed: int) -> Path:
    """Where a run is."""
    return folder / "runs" / variant / f"seed-{seed}"


def _read_study(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"{path} does not exist: give the folder of a study, as `opdlab study run` makes it")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    require(isinstance(content, dict), f"{path} holds no keys: it must have {', '.join(_KEYS)}")
    study: dict[str, Any] = content
    for key in _KEYS:
        require(bool(study.get(key)), f"{path}: {key} is missing or empty")
    for key in ("variants", "seeds", "budgets"):
        require(isinstance(study[key], list), f"{path}: {key} must be a list")
    for key in ("seeds", "budgets"):
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in study[key])
        require(whole, f"{path}: {key} must be whole numbers, got {study[key]}")
        require(len(set(study[key])) == len(study[key]), f"{path}: {key} has a number twice: {study[key]}")
    return study


def _variant(content: Any, baseline: str, folder: Path) -> Variant:
    valid = isinstance(content, dict) and isinstance(content.get("name"), str)
    require(valid, f"{folder / STUDY}: each of variants must have a name, got {content}")
    name = content["name"]
    plain = Path(name).name == name and name not in ("", ".", "..")
    require(plain, f"{folder / STUDY}: variants: '{name}' is no name for a folder")
    overrides = tuple(map(str, content.get("overrides") or ()))
    own = name if name == baseline else str(content.get("baseline") or baseline)
    return Variant(name, str(content.get("label") or name), overrides, own)


def _read_run(folder: Path, variant: str, seed: int) -> Run:
    path = run_folder(folder, variant, seed) / RUN
    if not path.parent.is_dir():
        return Run(variant, seed, "missing", {})
    if not path.is_file():
        return Run(variant, seed, "unfinished", {})
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    require(isinstance(record, dict), f"{path} cannot be read: delete it, and `opdlab study run` repeats the run")
    return Run(variant, seed, str(record.get("state", "unfinished")), record)


class _SampleReader:
    """Counts the correct samples of one evaluation after another, and holds each against the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.benchmarks: dict[str, Benchmark] = {}
        self.counts: dict[tuple[str, int, int, str], NDArray[np.int64]] = {}
        self._first = Path()

    def read(self, variant: str, seed: int, budget: int) -> None:
        place = run_folder(self.folder, variant, seed) / "evaluations" / f"val-step-{budget}"
        lines = _read_lines(place)
        require(
            bool(lines),
            f"{place} has no sample lines, though {RUN} says that the run has finished: delete "
            f"{run_folder(self.folder, variant, seed)} and run the study again",
        )
        evaluated = {name: _count(place, name, samples) for name, samples in lines.items()}
        if not self.benchmarks:
            self.benchmarks = {name: benchmark for name, (benchmark, _) in evaluated.items()}
            self._first = place
        for name in sorted({*self.benchmarks, *evaluated}):
            ours = evaluated[name][0] if name in evaluated else None
            self._compare(name, ours, place)
        for name, (_, counts) in evaluated.items():
            self.counts[variant, seed, budget, name] = counts

    def _compare(self, name: str, ours: Benchmark | None, place: Path) -> None:
        theirs = self.benchmarks.get(name)
        if ours is None or theirs is None:
            has, lacks = (self._first, place) if ours is None else (place, self._first)
            raise UsageError(f"benchmark '{name}' is in {has} and not in {lacks}: runs of other problems don't compare")
        if ours.problems != theirs.problems:
            only = set(ours.problems) ^ set(theirs.problems)
            ids = sorted({problem_id for problem_id, *_ in only})
            raise UsageError(
                f"benchmark '{name}' has other problems in {place} than in {self._first}: {len(ids)} differ, among "
                f"them {', '.join(repr(each) for each in ids[:3])}; variants can be compared on the same problems only"
            )
        require(
            ours.num_samples == theirs.num_samples,
            f"benchmark '{name}' has {ours.num_samples} samples of each problem in {place} and {theirs.num_samples} in "
            f"{self._first}: evaluate with the same model.eval_sampling.num_samples",
        )


def _read_lines(place: Path) -> dict[str, dict[tuple[str, int], Sample]]:
    """Samples by benchmark and key."""
    lines: dict[str, dict[tuple[str, int], Sample]] = {}
    for path in sorted(place.glob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                sample = Sample.parse(line)
                if sample is None:
                    raise UsageError(f"{path}: line {number} is no whole sample line; repeat the run")
                # A problem that two processes were given, to make their shares equal, counts once.
                lines.setdefault(sample.benchmark, {}).setdefault(sample.key, sample)
    return lines


def _count(place: Path, name: str, samples: Mapping[tuple[str, int], Sample]) -> tuple[Benchmark, NDArray[np.int64]]:
    verdicts: dict[_Problem, list[bool]] = {}
    for sample in samples.values():
        if sample.correct is None:
            raise UsageError(f"{place}: benchmark '{name}' has answers without a verdict: give it a verifier")
        verdicts.setdefault((sample.id, sample.problem, sample.gold), []).append(sample.correct)
    problems = sorted(verdicts, key=lambda problem: (problem[0], problem[1], problem[2] or ""))
    numbers = {len(verdicts[problem]): problem[0] for problem in reversed(problems)}
    if len(numbers) > 1:
        (one, first), (other, second), *_ = numbers.items()
        raise UsageError(
            f"{place}: benchmark '{name}' has {one} samples of problem {first!r} and {other} of {second!r}, but must "
            "have as many of each: repeat the run"
        )
    counts = np.array([sum(verdicts[problem]) for problem in problems], dtype=np.int64)
    return Benchmark(tuple(problems), next(iter(numbers))), counts
