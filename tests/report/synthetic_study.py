"""Study folders with known effects: seeds and problems as crossed random effects, binomial samples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from opdlab.evaluation.samples import Sample


def draw_correct(
    generator: np.random.Generator,
    shape: tuple[int, int],
    *,
    effect: float = 0.0,
    seed_std: float = 0.05,
    problem_std: float = 0.05,
    num_samples: int = 8,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Correct samples of a baseline and of a variant, [S, P] each.

    A problem's probability under the baseline is uniform between 0.25 and 0.75. Both sides get an effect of their own
    for each seed, and the variant one for each problem, so that ``effect`` is its mean difference.
    """
    num_seeds, num_problems = shape
    base = generator.uniform(0.25, 0.75, num_problems)
    taste = problem_std * generator.standard_normal(num_problems)
    luck = seed_std * generator.standard_normal((2, num_seeds, 1))
    ours, theirs = base + luck[0], base + taste + luck[1] + effect
    return tuple(generator.binomial(num_samples, np.clip(p, 0, 1)) for p in (ours, theirs))


@dataclass
class SyntheticStudy:
    """What to write.

    Args:
        effects: by variant, added to a problem's probability; the first is the baseline.
        seeds: of the runs.
        budgets: at the largest, effects are full; before, all figures are lower.
        benchmarks: number of problems, by name.
        num_samples: answers to each problem.
        seed_std: of a run's mean.
        labels: by variant, where there is one.
        baselines: by variant, where it is not compared with the first.
        collapsed: variants that answer nothing right.
    """

    effects: Mapping[str, float]
    seeds: Sequence[int] = (0, 1, 2, 3)
    budgets: Sequence[int] = (20, 40)
    benchmarks: Mapping[str, int] = field(default_factory=lambda: {"toy": 24})
    num_samples: int = 8
    seed_std: float = 0.02
    labels: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    collapsed: Sequence[str] = ()

    def write(self, folder: Path) -> Path:
        """Write the folder."""
        names = list(self.effects)
        variants = [
            {
                "name": name,
                "overrides": [f"--model.gate={name}"],
                **({"label": self.labels[name]} if name in self.labels else {}),
                **({"baseline": self.baselines[name]} if name in self.baselines else {}),
            }
            for name in names
        ]
        study = {
            "name": "synthetic",
            "base": ["quickstart"],
            "variants": variants,
            "baseline": names[0],
            "seeds": list(self.seeds),
            "budgets": list(self.budgets),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        generator = np.random.default_rng(7)
        base = {name: generator.uniform(0.2, 0.7, number) for name, number in self.benchmarks.items()}
        for variant, effect in self.effects.items():
            for seed in self.seeds:
                luck = self.seed_std * generator.standard_normal()
                self._write_run(folder, variant, seed)
                for budget in self.budgets:
                    for benchmark, easy in base.items():
                        chance = np.clip((easy + effect + luck) * budget / max(self.budgets), 0, 1)
                        chance = 0 * chance if variant in self.collapsed else chance
                        correct = generator.random((len(easy), self.num_samples)) < chance[:, None]
                        write_samples(evaluation(folder, variant, seed, budget), benchmark, correct)
        return folder

    def _write_run(self, folder: Path, variant: str, seed: int) -> None:
        path = folder / "runs" / variant / f"seed-{seed}"
        path.mkdir(parents=True)
        record: dict[str, Any] = {
            "variant": variant,
            "seed": seed,
            "state": "finished",
            "command": ["opdlab", "fit", "-c", "quickstart", f"--model.gate={variant}", f"--seed_everything={seed}"],
            "seconds": 36.5,
            "machine": {"host": "node", "cpus": 2},
            "versions": {"opdlab": "0.1.0", "torch": "2.13.0"},
        }
        (path / "run.json").write_text(json.dumps(record))


def evaluation(folder: Path, variant: str, seed: int, budget: int) -> Path:
    """Where an evaluation's samples are."""
    return folder / "runs" / variant / f"seed-{seed}" / "evaluations" / f"val-step-{budget}"


def write_samples(place: Path, benchmark: str, correct: NDArray[np.bool_], rank: int = 0) -> None:
    """Write the sample lines of a benchmark, [P, n]."""
    place.mkdir(parents=True, exist_ok=True)
    lines = [
        Sample(benchmark, f"p{row}", i, f"What is {row}?", "1", "text", "1", bool(right), "same", "eos", 12, 5).line()
        for row, rights in enumerate(correct)
        for i, right in enumerate(rights)
    ]
    (place / f"{benchmark}-{rank}.jsonl").write_bytes(b"".join(lines))
