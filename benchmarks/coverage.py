"""Coverage of the 95% interval of a study's report, on simulated studies.

Seeds and problems are crossed random effects, samples are binomial: a problem's probability under the baseline is
uniform, and run, problem and variant shift it by normal effects. Three intervals are compared:

- report: the interval of `opdlab study report`;
- plain: percentiles of the uncorrected crossed bootstrap;
- pairs: percentiles over seeds alone, with fixed problems.

Run it with `python benchmarks/coverage.py` (`--studies 2000` for a smaller error); it uses one thread.
"""

import argparse
import itertools
import json
from collections.abc import Sequence

import numpy as np

from opdlab.studies.report.statistics import (
    crossed_bootstrap,
    detectable_difference,
    estimate,
    holm,
    interval,
    problem_scores,
)

NUM_SAMPLES = 8
EFFECT = 0.03
NUM_VARIANTS = 5


def simulate(
    generator: np.random.Generator,
    shape: tuple[int, int],
    seed_std: float,
    problem_std: float,
    effects: Sequence[float],
) -> np.ndarray:
    """Return correct samples of a baseline and of variants, [1 + V, S, P]."""
    num_seeds, num_problems = shape
    base = generator.uniform(0.25, 0.75, num_problems)
    luck = seed_std * generator.standard_normal((1 + len(effects), num_seeds, 1))
    taste = problem_std * generator.standard_normal((1 + len(effects), 1, num_problems))
    taste[0] = 0
    chance = base + luck + taste + np.array([0.0, *effects])[:, None, None]
    return generator.binomial(NUM_SAMPLES, np.clip(chance, 0, 1))


def differences(correct: np.ndarray) -> np.ndarray:
    """Return pass@1 of variants minus that of the baseline, [V, S, P]."""
    found = problem_scores(correct, NUM_SAMPLES, 1)
    return found[1:] - found[0]


def measure(shape: tuple[int, int], seed_std: float, problem_std: float, studies: int, resamples: int) -> dict:
    """Return coverage, width, and false positives of a family of variants that all equal the baseline."""
    generator = np.random.default_rng([*shape, int(1000 * seed_std), int(1000 * problem_std)])
    covered, widths, false, detectable = np.zeros(3), [], 0, []
    for study in range(studies):
        (cells,) = differences(simulate(generator, shape, seed_std, problem_std, [EFFECT]))
        resampled = crossed_bootstrap([cells[None]], study, resamples)[:, 0, 0]
        estimated = estimate([cells])
        found = interval(estimated, resampled, study)
        # A column of means has one problem: only seeds are drawn.
        pairs = np.percentile(crossed_bootstrap([cells.mean(1)[None, :, None]], study, resamples), [2.5, 97.5])
        bounds = [(found.low, found.high), (found.plain_low, found.plain_high), pairs]
        covered += [low <= EFFECT <= high for low, high in bounds]
        widths.append(found.high - found.low)
        detectable.append(detectable_difference(estimated.standard_error, estimated.degrees_of_freedom))
        family = differences(simulate(generator, shape, seed_std, problem_std, [0.0] * NUM_VARIANTS))
        means = crossed_bootstrap([family], study, resamples)[:, 0]
        p_values = [interval(estimate([each]), means[:, index], study).p for index, each in enumerate(family)]
        false += min(holm(p_values)) < 0.05
    names = ("report", "plain", "pairs")
    return {
        "seeds": shape[0],
        "problems": shape[1],
        "seed_std": seed_std,
        "problem_std": problem_std,
        **{name: round(float(share), 3) for name, share in zip(names, covered / studies, strict=True)},
        "width": round(float(np.median(widths)), 4),
        "detectable": round(float(np.median(detectable)), 4),
        "false_positives": round(false / studies, 3),
    }


def main() -> None:
    """Print the table, and a line of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=400, help="simulated studies of each size")
    parser.add_argument("--resamples", type=int, default=1000, help="of each study")
    options = parser.parse_args()
    for seed_std, problem_std in itertools.product((0.05, 0.0), (0.05, 0.0)):
        for shape in itertools.product((4, 8, 16), (64, 256)):
            print(json.dumps(measure(shape, seed_std, problem_std, options.studies, options.resamples)), flush=True)


if __name__ == "__main__":
    main()
