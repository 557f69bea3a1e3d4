"""Reading of a study's folder: its runs, and of each problem the number of correct samples and the reverse KL.

Only finished runs count. Their samples must be comparable: the same problems, and equally many samples of each.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opdlab.errors import UsageError, require
from opdlab.evaluation.samples import Sample
from opdlab.records import read_json
from opdlab.studies.schema import (
    EVALUATIONS,
    FAILED,
    FINISHED,
    MISSING,
    RUN,
    RUNS,
    STUDY,
    UNFINISHED,
    VARIANTS,
    VERSION,
    Record,
    StudyRun,
    evaluation_path,
    run_path,
)
from opdlab.studies.study import Study, read_study

_PASS_AT = (1, 8)
_Problem = tuple[str, str, str | None]  # id, text, gold answer


@dataclass(frozen=True)
class Benchmark:
    """Problems and number of samples of a benchmark; the same in every run.

    Args:
        problems: (id, text, gold answer) of P problems, sorted.
        num_samples: n, answers to each.
    """

    problems: tuple[_Problem, ...]
    num_samples: int


@dataclass(frozen=True)
class Results:
    """A study and its results.

    Args:
        study: V variants, S seeds.
        benchmarks: by name, sorted.
        runs: record of every run that the study asks for, by variant and seed; only finished ones count.
        counts: correct samples of each problem, [P], by variant, seed, step and benchmark; only finished runs.
        reverse_kl: parts of the reverse KL to the teacher, [P], nats per token, whose mean it is, by the same keys;
            empty unless all evaluations of finished runs have measured it.
        lacks_reverse_kl: some evaluations have measured it, and others not.
        collapsed: variant and seed of the finished runs in which training has collapsed; they count.
        may_have_collapsed: variant and seed of those of which it is not known.
        pass_at: k of each pass@k, of all variants, ascending.
    """

    study: Study
    benchmarks: Mapping[str, Benchmark]
    runs: Mapping[tuple[str, int], Record]
    counts: Mapping[tuple[str, int, int, str], NDArray[np.int64]]
    reverse_kl: Mapping[tuple[str, int, int, str], NDArray[np.float64]]
    lacks_reverse_kl: bool
    collapsed: Set[tuple[str, int]]
    may_have_collapsed: Set[tuple[str, int]]
    pass_at: Sequence[int]

    def finished(self, variant: str) -> list[int]:
        """Return the seeds of the variant's finished runs."""
        return [seed for seed in self.study.seeds if self.runs[variant, seed].state == FINISHED]

    def paired(self, variant: str) -> list[int]:
        """Return the seeds with which both the variant and its baseline have finished."""
        baseline = set(self.finished(self.study.baseline_of(variant)))
        return [seed for seed in self.finished(variant) if seed in baseline]

    def failed(self, *variants: str) -> list[int]:
        """Return the seeds with which a run of one of the variants has failed."""
        return [seed for seed in self.study.seeds if any(self.runs[name, seed].state == FAILED for name in variants)]

    @property
    def num_comparisons(self) -> int:
        """Return the number of variants that the whole study compares, whether their runs have finished or not."""
        return len(self.study.variants) - 1

    @property
    def steps(self) -> list[int]:
        """Return the optimizer steps after which runs are compared, ascending."""
        return sorted(self.study.budgets)

    @property
    def compared(self) -> list[str]:
        """Return the variants that share at least one seed with their baseline, without the study's baseline."""
        return [v.name for v in self.study.variants if v.name != self.study.baseline and self.paired(v.name)]

    @property
    def baselines(self) -> list[str]:
        """Return the names of all baselines, each once."""
        return list(dict.fromkeys(self.study.baseline_of(name) for name in self.compared))

    @property
    def lacking(self) -> list[Record]:
        """Return the records of the runs that do not count."""
        return [record for record in self.runs.values() if record.state != FINISHED]


def load_results(folder: Path) -> Results:
    """Read a study's folder.

    Raises:
        UsageError: the folder is not a study, or one of a single variant, no run has finished, no run of the baseline
            has, or the samples cannot be compared; the message says which.
    """
    there = (folder / STUDY).is_file()
    require(there, f"{folder / STUDY} does not exist: give the folder of a study, as `opdlab study run` makes it")
    study = read_study(folder)
    require(
        len(study.variants) > 1,
        f"{folder}: the study has one variant, so there is nothing to compare: add another, or look at its runs with "
        f"opdlab report {shlex.quote(str(folder))}/{RUNS}/*/*/{VERSION}",
    )
    keys = [(variant.name, seed) for variant in study.variants for seed in study.seeds]
    runs = {key: _read_run(folder, *key) for key in keys}
    finished = [key for key, record in runs.items() if record.state == FINISHED]
    require(
        bool(finished), f"{folder}: none of its {len(runs)} runs has finished: `opdlab study run` goes on with them"
    )
    benchmarks: dict[str, Benchmark] = {}
    counts: dict[tuple[str, int, int, str], NDArray[np.int64]] = {}
    reverse_kl: dict[tuple[str, int, int, str], NDArray[np.float64]] = {}
    first = Path()
    for (variant, seed), budget in product(finished, sorted(study.budgets)):
        run = run_path(folder, variant, seed)
        place = evaluation_path(run / EVALUATIONS, budget)
        evaluated = _read_evaluation(place)
        require(
            bool(evaluated),
            f"{place} has no sample lines, though {RUN} says that the run has finished: delete {run} and run the study "
            "again",
        )
        if not benchmarks:
            benchmarks, first = {name: each.benchmark for name, each in evaluated.items()}, place
        for name in sorted({*benchmarks, *evaluated}):
            ours = evaluated[name].benchmark if name in evaluated else None
            _check_equal(name, benchmarks.get(name), first, ours, place)
        for name, each in evaluated.items():
            counts[variant, seed, budget, name], reverse_kl[variant, seed, budget, name] = each.correct, each.reverse_kl
    collapsed = {key: StudyRun(run_path(folder, *key), ()).collapsed for key in finished}
    measured = [bool(np.isfinite(values).all()) for values in reverse_kl.values()]
    results = Results(
        study,
        dict(sorted(benchmarks.items())),
        runs,
        counts,
        reverse_kl if all(measured) else {},
        any(measured) and not all(measured),
        {key for key, known in collapsed.items() if known},
        {key for key, known in collapsed.items() if known is None},
        _pass_at(folder, study),
    )
    base = study.baseline
    require(
        bool(results.finished(base)),
        f"{folder}: no run of the baseline '{base}' has finished, so there is nothing to compare with",
    )
    require(
        bool(results.compared),
        f"{folder}: no variant has finished with a seed that its baseline, such as '{base}', has finished with too",
    )
    return results


def _read_run(folder: Path, variant: str, seed: int) -> Record:
    path = run_path(folder, variant, seed)
    record = Record.read(path)
    broken = record.state == UNFINISHED and (path / RUN).is_file()
    require(not broken, f"{path / RUN} cannot be read: delete it, and `opdlab study run` repeats the run")
    return replace(record, variant=variant, seed=seed, state=record.state if path.is_dir() else MISSING)


def _pass_at(folder: Path, study: Study) -> list[int]:
    """Return the k of all pass@k that the variants' configurations ask for; 1 and 8 where none is known."""
    configs = [read_json(folder / VARIANTS / f"{variant.name}.json") for variant in study.variants]
    asked = {k for config in configs for k in config.get("model.evaluation.pass_at") or () if isinstance(k, int)}
    return sorted(asked) or list(_PASS_AT)


def _check_equal(name: str, theirs: Benchmark | None, first: Path, ours: Benchmark | None, place: Path) -> None:
    """Raise if the benchmark in ``place`` differs from the one in ``first``."""
    if ours is None or theirs is None:
        has, lacks = (first, place) if ours is None else (place, first)
        raise UsageError(f"benchmark '{name}' is in {has} and not in {lacks}: runs of other problems don't compare")
    ids = sorted({problem_id for problem_id, *_ in set(ours.problems) ^ set(theirs.problems)})
    require(
        not ids,
        f"benchmark '{name}' has other problems in {place} than in {first}: {len(ids)} differ, among "
        f"them {', '.join(map(repr, ids[:3]))}; variants can be compared on the same problems only",
    )
    require(
        ours.num_samples == theirs.num_samples,
        f"benchmark '{name}' has {ours.num_samples} samples of each problem in {place} and {theirs.num_samples} in "
        f"{first}: evaluate with the same model.eval_sampling.num_samples",
    )


@dataclass(frozen=True)
class _Evaluated:
    """A benchmark of an evaluation: correct samples, [P], and reverse KL, [P], which is NaN where none was measured."""

    benchmark: Benchmark
    correct: NDArray[np.int64]
    reverse_kl: NDArray[np.float64]


def _read_evaluation(place: Path) -> dict[str, _Evaluated]:
    """Return the benchmarks of an evaluation by name."""
    lines: dict[str, dict[tuple[str, int], Sample]] = {}
    for path in sorted(place.glob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                sample = Sample.parse(line)
                if sample is None:
                    raise UsageError(f"{path}: line {number} is no whole sample line; repeat the run")
                # A problem that was given to two processes, to make their shares equal, counts once.
                lines.setdefault(sample.benchmark, {}).setdefault(sample.key, sample)
    return {name: _count(place, name, samples.values()) for name, samples in lines.items()}


def _count(place: Path, name: str, samples: Iterable[Sample]) -> _Evaluated:
    verdicts: dict[_Problem, list[bool]] = {}
    nats: dict[_Problem, list[tuple[float, int]]] = {}  # reverse KL per token, and tokens, of each sample
    for sample in samples:
        if sample.correct is None:
            raise UsageError(f"{place}: benchmark '{name}' has answers without a verdict: give it a verifier")
        problem = sample.id, sample.problem, sample.gold
        verdicts.setdefault(problem, []).append(sample.correct)
        nats.setdefault(problem, []).append((np.nan if sample.reverse_kl is None else sample.reverse_kl, sample.tokens))
    problems = sorted(verdicts, key=lambda problem: (problem[0], problem[1], problem[2] or ""))
    numbers = {len(verdicts[problem]): problem[0] for problem in reversed(problems)}
    if len(numbers) > 1:
        (one, first), (other, second), *_ = numbers.items()
        raise UsageError(
            f"{place}: benchmark '{name}' has {one} samples of problem {first!r} and {other} of {second!r}, but must "
            "have as many of each: repeat the run"
        )
    counts = np.array([sum(verdicts[problem]) for problem in problems], dtype=np.int64)
    table = np.array([nats[problem] for problem in problems], dtype=np.float64)  # [P, n, 2]
    return _Evaluated(Benchmark(tuple(problems), next(iter(numbers))), counts, _ratio_parts(*np.moveaxis(table, 2, 0)))


def _ratio_parts(per_token: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a value for each problem, [P], whose mean is that over all tokens, as the evaluation has it.

    A mean over tokens is a ratio of two sums over problems. It is taken apart by its linearization, whose spread over
    problems gives the ratio's variance (Cochran, "Sampling Techniques", 3rd ed., 6.5).

    Args:
        per_token: [P, n], mean over the tokens of a sample.
        tokens: [P, n], their number.
    """
    sums, weights = (per_token * tokens).sum(1), tokens.sum(1)
    ratio = sums.sum() / weights.sum()
    parts: NDArray[np.float64] = ratio + (sums - ratio * weights) / weights.mean()
    return parts
