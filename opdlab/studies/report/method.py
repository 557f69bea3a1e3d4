"""Description of the methods of a report, with references."""

from opdlab.studies.report.compare import PASS_AT, TARGET, figure_names
from opdlab.studies.report.load import Results
from opdlab.studies.report.statistics import NUM_RESAMPLES

SOURCES = (
    "Efron & Tibshirani, An Introduction to the Bootstrap, Chapman & Hall 1993",
    "Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007), arXiv 0712.1111",
    "Satterthwaite, An approximate distribution of estimates of variance components, Biometrics Bulletin 2 (1946)",
    "Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979)",
    "Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374 (pass@k)",
    "Miller, Adding Error Bars to Evals, arXiv 2411.00640 (the problem as the unit)",
)


def method(results: Results) -> list[str]:
    """Return a paragraph each on metrics, intervals and tests."""
    samples = sorted({benchmark.num_samples for benchmark in results.benchmarks.values()})
    average = " and ".join(f"avg@{number}" for number in samples)
    figures = (
        "pass@k is estimated without bias for each problem and run, and averaged over problems. pass@1 is the "
        f"share of correct samples, which is {average}."
    )
    lacking = [f"pass@{k}" for k in PASS_AT if f"pass@{k}" not in figure_names(results)]
    if lacking:
        figures += f" {lacking[0]} is left out: a benchmark has only {samples[0]} samples of each problem."
    if len(results.benchmarks) > 1:
        figures += " The mean over benchmarks is unweighted: each counts the same, however many problems it has."
    intervals = (
        "Runs are paired by seed, and samples by problem. Seeds and problems are resampled independently, the "
        f"same draws for both sides of a pair (pigeonhole bootstrap, {NUM_RESAMPLES:,} resamples), since both "
        "another seed and other problems would have given another difference. Such resamples are too narrow with "
        "few seeds, and too wide where the noise of single answers dominates. They are therefore rescaled to the "
        "standard error of the two-way analysis of variance with seeds and problems as random effects, each "
        "divided by the square root of a chi-square draw over its degrees of freedom (Satterthwaite), which gives "
        "them the tails of Student's t. The 95% interval lies between their 2.5% and 97.5% quantiles; P(better) "
        "is the share of them above 0; p is twice the smaller share at or beyond 0. comparisons.csv also has the "
        "percentile interval of the resamples as they are (bootstrap_low, bootstrap_high)."
    )
    tests = (
        "p (Holm) corrects for the number of variants, within a figure, a benchmark and a budget; nothing "
        "corrects for looking at several of these, and intervals are not corrected: one may leave out 0 where p "
        "(Holm) is above 0.05. Intervals are cut at -1 and 1, between which differences of rates lie. The conclusion "
        "rests on the largest budget, which is fixed before. Detectable is the smallest true difference that would be "
        "found with a probability of 80% at 5% two-sided, from t quantiles, and with 5% divided by the number of "
        "variants; above 1, none would be. It is unknown, which a dash says, with one seed, and where neither runs nor "
        f"problems vary. 'Seeds for {TARGET}' is the number of seed pairs at which {TARGET} would be detectable on as "
        "many problems; a dash says that this is unknown, or that more seeds would not do without more problems. "
        "'Ahead in' counts the seeds in which the variant's figure is the higher one."
    )
    return [figures, intervals, tests]
