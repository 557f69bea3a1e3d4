"""Writes the tables of ``docs/results/index.md`` from packed studies: ``python docs/scripts/result_tables.py``.

A table stands between ``<!-- study: NAME [METRIC] -->`` and ``<!-- end of study -->``. It has a row for each comparison
of the study: of ``pass@1``, if the mark names no other metric, at every optimizer step with an evaluation. Two other
methods stand beside the report's p: the t test on pairs of runs, and all changes of sign of the pairs' differences.
Both know the seeds only, and neither is corrected for the number of variants; ``p alone`` is not either.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from opdlab.report.study.sentences import detectable, number, p_text
from opdlab.report.table import Table

RESULTS = Path(__file__).parents[1] / "results"
PAGE = RESULTS / "index.md"
TABLE = re.compile(r"(<!-- study: (\S+)(?: (\S+))? -->\n).*?(<!-- end of study -->)", re.DOTALL)
_HEAD = (
    *("variant", "baseline", "steps", "baseline's", "difference", "95% interval"),
    *("detectable", "seeds", "p (Holm)", "p alone", "t test", "signs"),
)
_PLACE = ["metric", "benchmark", "step"]
_MAX_CHANGES = 2**16  # of signs: all of them for 16 pairs; of more pairs as many random ones


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{_table(found[2], found[3] or 'pass@1')}\n\n{found[4]}", text)


def comparisons(study: str, metric: str) -> pd.DataFrame:
    """Return the comparisons of a packed study, with ``t_test`` and ``signs``, the two other p values.

    Args:
        study: name of its folder.
        metric: the one that is compared.
    """
    folder = RESULTS / study / "tables"
    found, runs = (pd.read_csv(folder / f"{name}.csv") for name in ("comparisons", "runs"))
    found = found[found["metric"] == metric].copy()
    pairs = [_pairs(runs, row) for row in found.to_dict("records")]
    labels = dict(zip(runs["variant"], runs["label"], strict=True))
    found["baseline"] = found["baseline"].map(labels)
    return found.assign(t_test=[t_test(each) for each in pairs], signs=[sign_flips(each) for each in pairs])


def t_test(differences: np.ndarray) -> float:
    """Return the two-sided p of Student's t test that pairs differ by nothing; NaN where they do not vary."""
    return float(stats.ttest_1samp(differences, 0.0).pvalue) if np.ptp(differences) else float("nan")


def sign_flips(differences: np.ndarray) -> float:
    """Return the share of changes of sign whose sum is at least as far from 0.

    Example:
        >>> sign_flips(np.array([1.0, 2.0, 3.0]))
        0.25
    """
    given = {"permutation_type": "samples", "n_resamples": _MAX_CHANGES, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((differences,), np.sum, vectorized=True, **given).pvalue)


def _pairs(runs: pd.DataFrame, row: dict[str, object]) -> np.ndarray:
    here = runs.loc[(runs[_PLACE] == [row[name] for name in _PLACE]).all(axis=1)]
    values = here.pivot_table(index="seed", columns="variant", values="value")[[row["variant"], row["baseline"]]]
    values = values.dropna()
    return np.asarray(values[row["variant"]] - values[row["baseline"]])


def _table(study: str, metric: str) -> str:
    rows = [_cells(row) for row in comparisons(study, metric).itertuples()]
    return Table(_HEAD, rows, num_names=2).markdown().rstrip()


def _cells(row: Any) -> list[str]:
    return [
        *(row.label, row.baseline, str(row.step), number(row.baseline_mean), number(row.difference, sign=True)),
        f"{number(row.low, sign=True)} to {number(row.high, sign=True)}",
        *(detectable(row.detectable_difference), str(row.seeds)),
        *(p_text(value) for value in (row.p_holm, row.p, row.t_test, row.signs)),
    ]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
