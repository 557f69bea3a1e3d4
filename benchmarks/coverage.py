"""False positives and power of a study's report, on simulated studies.

Seeds and problems are crossed random effects, samples are binomial. On the logit scale, a problem has a difficulty,
and each variant, the baseline included, has an effect for every seed and one for every problem, drawn alike; so without
a shift all variants are equal. The statistics are those of `opdlab study report`, for all studies at once.

- false: share of studies that call an equal variant different; in brackets the upper end of its 95% interval;
- of 5: share of studies with five such variants that call any of them different after Holm;
- power: share of studies that find a variant whose logits are shifted; its mean difference is in the last column.

Each is for studies of 7, 30 and 128 problems.

Run it with `python benchmarks/coverage.py` (`--studies 1000` for a first look); it uses one thread and fixed seeds.
"""

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from opdlab.report.study.statistics import LEVEL, Estimate, estimate, problem_scores

NUM_SAMPLES, NUM_VARIANTS = 8, 5
SEEDS, PROBLEMS = (4, 8, 16), (7, 30, 128)
CHUNK = 500


@dataclass(frozen=True)
class Scenario:
    """A kind of study.

    Args:
        k: of pass@k, with 8 samples of each problem.
        rates: lowest and highest chance of a correct sample, before effects.
        seed_std: standard deviation of the seeds' effects, logits.
        problem_std: standard deviation of the problems' effects, logits.
        shift: of the variant whose difference is to be found, logits.
        tails: degrees of freedom of Student's t, from which seeds' effects are drawn; normal by default.
        collapse: probability that a run answers nothing right.
    """

    k: int
    rates: tuple[float, float]
    seed_std: float
    problem_std: float
    shift: float
    tails: float = np.inf
    collapse: float = 0.0


SCENARIOS = {
    "pass@1, seeds and problems vary": Scenario(1, (0.25, 0.75), 0.2, 0.2, 0.6),
    "pass@1, only seeds vary": Scenario(1, (0.25, 0.75), 0.4, 0.0, 0.6),
    "pass@1, only problems vary": Scenario(1, (0.25, 0.75), 0.0, 0.8, 0.6),
    "pass@1, neither varies": Scenario(1, (0.25, 0.75), 0.0, 0.0, 0.6),
    "pass@8 near 0": Scenario(8, (0.001, 0.005), 0.2, 0.2, 2.0),
    "pass@8 near 1": Scenario(8, (0.5, 0.9), 0.2, 0.2, -2.0),
    "pass@1, heavy-tailed seeds": Scenario(1, (0.25, 0.75), 0.2, 0.2, 0.6, tails=2),
    "pass@1, one run in ten collapses": Scenario(1, (0.25, 0.75), 0.2, 0.2, 0.6, collapse=0.1),
}


def simulate(generator: np.random.Generator, scenario: Scenario, shape: tuple[int, int, int]) -> np.ndarray:
    """Return pass@k of a baseline, equal variants, and one that is shifted: [2 + V, studies, S, P]."""
    studies, num_seeds, num_problems = shape
    low, high = scenario.rates
    rates = generator.uniform(low, high, (studies, 1, num_problems))
    seeds = generator.standard_normal((2 + NUM_VARIANTS, studies, num_seeds, 1))
    if np.isfinite(scenario.tails):
        seeds /= np.sqrt(generator.chisquare(scenario.tails, seeds.shape) / scenario.tails)
    problems = generator.standard_normal((2 + NUM_VARIANTS, studies, 1, num_problems))
    logits = special.logit(rates) + scenario.seed_std * seeds + scenario.problem_std * problems
    logits[-1] += scenario.shift
    chances = special.expit(logits) * (generator.random(seeds.shape) >= scenario.collapse)
    return problem_scores(generator.binomial(NUM_SAMPLES, chances), NUM_SAMPLES, scenario.k)


def found(differences: Estimate, num_comparisons: int = 1) -> np.ndarray:
    """Return the studies whose report calls the variant different, as the first of some comparisons in Holm's order."""
    constant = 2 * 0.25**differences.num_seeds < LEVEL / num_comparisons
    size = np.abs(differences.difference)
    bound = differences.error_bound(LEVEL / 2 / num_comparisons)
    return np.where(differences.varies, size > bound, constant & (size > 1e-12))


def measure(scenario: Scenario, num_seeds: int, num_problems: int, studies: int) -> tuple[np.ndarray, float]:
    """Return numbers of studies: with a false positive, with one among five, with the shift found; and its size."""
    generator = np.random.default_rng([num_seeds, num_problems, list(SCENARIOS.values()).index(scenario)])
    counts, size = np.zeros(3, dtype=int), 0.0
    for start in range(0, studies, CHUNK):
        shape = (min(CHUNK, studies - start), num_seeds, num_problems)
        baseline, *others = simulate(generator, scenario, shape)
        estimates = [estimate([cells - baseline]) for cells in others]
        shifted = estimates.pop()
        family = np.any([found(each, NUM_VARIANTS) for each in estimates], axis=0)
        right = found(shifted) & (np.sign(shifted.difference) == np.sign(scenario.shift))
        counts += [found(estimates[0]).sum(), family.sum(), right.sum()]
        size += float(shifted.difference.sum()) / studies
    return counts, size


def main() -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000, help="simulated studies of each size")
    parser.add_argument("--only", default="", help="only the kinds of study whose name contains this text")
    options = parser.parse_args()
    studies, chosen = options.studies, {name: each for name, each in SCENARIOS.items() if options.only in name}
    columns = [f"{name}, {number}" for name in ("false", "of 5", "power") for number in PROBLEMS]
    print(f"| study | seeds | {' | '.join(columns)} | difference |")
    print("|" + "---|" * (len(columns) + 3))
    worst = 0.0
    for (name, scenario), num_seeds in itertools.product(chosen.items(), SEEDS):
        measured = [measure(scenario, num_seeds, number, studies) for number in PROBLEMS]
        cells = []
        for index in range(2):
            highs = [stats.binomtest(int(counts[index]), studies).proportion_ci().high for counts, _ in measured]
            worst = max(worst, *highs)
            cells += [
                f"{counts[index] / studies:.3f} ({high:.3f})" for (counts, _), high in zip(measured, highs, strict=True)
            ]
        cells += [f"{counts[2] / studies:.2f}" for counts, _ in measured]
        size = sum(size for _, size in measured) / len(measured)
        print(f"| {name} | {num_seeds} | {' | '.join(cells)} | {size:+.2f} |", flush=True)
    print(f"\nhighest upper bound: {worst:.4f}")


if __name__ == "__main__":
    main()
