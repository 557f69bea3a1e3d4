"""The results in the documentation: reports come from their archives, and figures in the text from the reports."""

import importlib.util
import re
import runpy
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from opdlab.report import make_report

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/study.tar.xz"))
# Differences of the text that no report has, over the seeds that two studies have together or between two studies:
# (study, variant, study of the baseline, baseline), as many as are pooled. Beside each, the section that it stands in.
POOLED = {
    "paper-toy-harsh": [[("paper-toy-harsh", "lsm-none", "paper-toy-harsh", "opd-none")]],
    "paper-toy-mild": [
        [("paper-toy-mild", "lsm-none", "paper-toy-mild", "opd-none")],
        [("paper-toy-mild", "opd-none", "paper-toy-harsh", "opd-none")],
    ],
    "lsm-block64": [
        [(study, "lsm-block64", study, "lsm-none") for study in ("paper-toy-harsh", "lsm-block64")],
    ],
    "lsm-token": [
        [("granularity-lsm", "token", "granularity-lsm", "none"), ("lsm-token", "lsm-token", "lsm-token", "lsm-none")],
    ],
    "fresh-seeds": [
        [("controls", "current", "controls", "none"), ("fresh-seeds", "current", "fresh-seeds", "clip-none")],
        [
            ("normalisation", "adaptive-mean", "normalisation", "none"),
            ("fresh-seeds", "noclip-adaptive", "fresh-seeds", "noclip-none"),
        ],
    ],
    "rate": [
        [("rate", "none-low", "controls-lsm", "none")],
        [("rate", "none-high", "controls-lsm", "none")],
    ],
    "normalisation-fresh": [
        [(study, variant, study, "none") for study in ("normalisation-open", "normalisation-fresh")]
        for variant in ("clipped", "residual-25")
    ],
    "rate-token": [
        [("rate", "token-low", "rate", "none-low"), ("rate-token", "token", "rate-token", "none")],
    ],
    "staleness-fresh": [
        [(study, "block64-64", study, "none-64") for study in ("staleness", "staleness-fresh")],
    ],
    "scale-1m-fresh": [[(study, "lsm-block64", study, "lsm-none") for study in ("scale-1m", "scale-1m-fresh")]],
    "fitted-tau": [[("fitted-tau", "fitted", "fitted-tau", "none")]],
}
# A section that says what an earlier one found.
EARLIER = {
    "paper-toy-mild": "paper-toy-harsh",
    "lsm-block64": "paper-toy-harsh",
    "lsm-token": "granularity-lsm",
    "rate-token": "rate",
    "normalisation-fresh": "normalisation-open",
    "staleness": "budgets",
    "staleness-fresh": "staleness",
    "scale-1m-fresh": "scale-1m",
}
MINUS = "\N{MINUS SIGN}"
FIGURE = re.compile(rf"(?<![\w.])([+{MINUS}]?)(\d\.(\d+))")


def table(study: str, name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / study / "tables" / f"{name}.csv")


def last_runs(study: str) -> pd.DataFrame:
    """Return pass@1 after the last step, seeds by variants."""
    runs = table(study, "runs")
    runs = runs[(runs["metric"] == "pass@1") & (runs["step"] == runs["step"].max())]
    return runs.pivot_table(index="seed", columns="variant", values="value")


@dataclass(frozen=True)
class Known:
    """Figures that a text may have: differences, whose sign must be right where it stands, and others without one."""

    differences: Sequence[float]
    others: Sequence[float]

    def __add__(self, other: "Known") -> "Known":
        return Known([*self.differences, *other.differences], [*self.others, *other.others])


def figures(study: str) -> Known:
    """Return the figures of a report's tables, and the two lowest runs of each variant."""
    numbers = [table(study, name).select_dtypes("number").to_numpy(float) for name in ("comparisons", "metrics")]
    lowest = np.sort(last_runs(study).to_numpy(float), axis=0)[:2]
    found = np.unique(np.concatenate([each.ravel() for each in (*numbers, lowest)]))
    differences = table(study, "comparisons")[["difference", "low", "high"]].to_numpy(float).ravel()
    return Known(differences.tolist(), found[~np.isnan(found)].tolist())


def strays(text: str, known: Known, pooled_differences: Sequence[float] = ()) -> list[str]:
    """Return the figures of a text that are none of these."""
    wrong = []
    for sign, shown, decimals in FIGURE.findall(text):
        value, half = float(shown) * (-1 if sign == MINUS else 1), 0.5 * 10 ** -len(decimals)
        # The interval of a report knows the problems too, so its ends may differ from those of the seeds alone.
        for values, more in ((known.differences if sign else known.others, 1e-9), (pooled_differences, 1e-3)):
            if any(abs((each if sign else abs(each)) - value) <= half + more for each in values):
                break
        else:
            wrong.append(sign + shown)
    return wrong


def pooled(pairs: Iterable[tuple[str, str, str, str]]) -> list[float]:
    """Return the mean difference over all pairs, the ends of its t interval, and the means of both sides."""
    sides = [(last_runs(a)[variant], last_runs(b)[base]) for a, variant, b, base in pairs]
    variant, base = (np.concatenate([side[place] for side in sides]) for place in (0, 1))
    low, high = stats.t.interval(0.95, len(base) - 1, np.mean(variant - base), stats.sem(variant - base))
    return [float(value) for value in (np.mean(variant - base), low, high, np.mean(variant), np.mean(base))]


def sections(text: str) -> dict[str, str]:
    """Return the prose above each study's table, by study."""
    parts = re.split(r"(?=^\*\*\[[\w-]+\]\([\w-]+/report\.md\)\*\*)", text, flags=re.MULTILINE)[1:]
    return {part[3 : part.index("]")]: part[: part.index("<!-- study")] for part in parts}


@pytest.mark.parametrize("study", STUDIES)
def test_a_report_is_made_again_from_its_archive(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(figure: Figure, file: Any, **options: Any) -> None:
        file.write(b"a picture, which takes most of the time and depends on fonts")

    monkeypatch.setattr(Figure, "savefig", nothing)
    with tarfile.open(RESULTS / study / "study.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    made = make_report(folder).files
    tables = [name for name in made if name.startswith("tables/") and not name.endswith(".md")]
    assert len(tables) == 5
    for name in ["report.md", *tables]:
        assert made[name].decode() == (RESULTS / study / name).read_text(encoding="utf-8"), name


def test_tables_of_the_results_come_from_the_reports() -> None:
    script, text = runpy.run_path(str(DOCS / "scripts/result_tables.py")), (RESULTS / "index.md").read_text()
    assert script["page"](text) == text, "run python docs/scripts/result_tables.py"
    assert sorted(found[1] for found in script["TABLE"].findall(text)) == STUDIES


def test_a_second_method_agrees_with_closed_forms() -> None:
    script = runpy.run_path(str(DOCS / "scripts/result_tables.py"))
    assert script["sign_flips"](np.array([1.0, 2.0, 3.0, 4.0])) == 2 / 2**4
    # A zero may have either sign.
    assert script["sign_flips"](np.array([1.0, 2.0, 3.0, 0.0])) == 4 / 2**4
    differences = np.array([0.1, 0.3, 0.2])  # t = 0.2 / (0.1 / sqrt(3)), with two degrees of freedom
    t = 0.2 / (0.1 / 3**0.5)
    assert script["t_test"](differences) == pytest.approx(1 - t / (2 + t * t) ** 0.5)


def test_methods_disagree_only_where_the_text_says() -> None:
    text, disagreeing = (RESULTS / "index.md").read_text(encoding="utf-8"), set()
    for study, rows in re.findall(r"<!-- study: (\S+)[^\n]*-->\n(.*?)<!-- end", text, re.DOTALL):
        for row in rows.strip().splitlines()[2:]:
            alone, *others = (float(cell.replace("&lt;", "")) for cell in row.split("|")[-4:-1])
            if any((other < 0.05) != (alone < 0.05) for other in others):
                disagreeing.add(study)
    assert disagreeing == {"budgets", "support-tail", "proxy-and-truth", "real-pair", "normalisation-open"}


@pytest.mark.parametrize("study", STUDIES)
def test_figures_in_the_text_are_those_of_the_report(study: str) -> None:
    text = (RESULTS / "index.md").read_text(encoding="utf-8")
    prose, shown = sections(text)[study], text.partition(f"<!-- study: {study} -->")[2].partition("<!-- end")[0]
    # The two other tests of significance stand in the table only, which another test makes again.
    others = [
        float(cell) for row in shown.strip().splitlines()[2:] for cell in row.split("|")[-3:-1] if "&" not in cell
    ]
    settings = [float(found[1]) for label in table(study, "comparisons")["label"] for found in FIGURE.findall(label)]
    known = figures(study) + Known([], [0.001, *others, *settings])
    if study in EARLIER:
        known += figures(EARLIER[study])
    assert strays(prose, known, [value for pairs in POOLED.get(study, []) for value in pooled(pairs)]) == []


def test_the_summary_repeats_figures_of_the_questions() -> None:
    text = (RESULTS / "index.md").read_text(encoding="utf-8")
    tables = "".join(re.findall(r"<!-- study.*?<!-- end of study -->", text, re.DOTALL)).replace("-", MINUS)
    begin, first, replay, after, together = map(
        text.index,
        ("## In ten lines", "## Question by question", "**[replay]", "### Not run yet", "### Together"),
    )
    checked = [
        (sign, float(shown) * (-1 if sign == MINUS else 1))
        for sign, shown, _ in FIGURE.findall(tables + "".join(sections(text).values()) + text[replay:after])
    ]
    known = Known([value for sign, value in checked if sign], [value for _, value in checked])
    assert strays(text[begin:first], known) == []
    # What explains the tables also has p values that are corrected for both figures of a study.
    corrected = pd.concat([2 * table(study, "comparisons")["p_holm"] for study in STUDIES])
    known += Known([], corrected.tolist())
    assert strays(text[together:], known) == []


def test_what_gates_did_to_the_gradient_comes_from_the_replays() -> None:
    script, text = runpy.run_path(str(DOCS / "scripts/why.py")), (RESULTS / "why.md").read_text(encoding="utf-8")
    assert script["page"](text) == text, "run python docs/scripts/why.py"
    assert {found[1] for found in script["TABLE"].findall(text)} == set(script["TABLES"])
    tables = "".join(found[0] for found in re.finditer(r"<!-- table.*?<!-- end of table -->", text, re.DOTALL))
    shown = [
        (sign, float(value) * (-1 if sign == MINUS else 1))
        for sign, value, _ in FIGURE.findall(tables.replace("-", MINUS))
    ]
    known = Known([value for sign, value in shown if sign], [value for _, value in shown])
    assert strays(re.sub(r"<!-- table.*?<!-- end of table -->", "", text, flags=re.DOTALL), known) == []


def test_pictures_of_why_are_drawn_from_the_replays() -> None:
    script = runpy.run_path(str(DOCS / "scripts/why.py"))
    predicted, found = script["predicted_and_measured"](), script["gates"]()
    (axes,) = predicted.axes
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axes.containers]
    assert points == list(zip(found["change"], found["difference"], strict=True))
    _, lower = script["by_part"]().axes
    parts = script["parts"]().set_index(["variant", "gate", "part"])["weight_mean"]
    names = [label.get_text().replace("\n", "") for label in lower.get_xticklabels()]
    for variant, bars in zip(script["DRAWN"], lower.containers, strict=True):
        assert [bar.get_height() for bar in bars] == [parts[variant, "own", name] for name in names]
    _, lower = script["by_age"]().axes
    ages = script["ages"]().set_index("variant")
    for variant, drawn in zip(script["DRAWN"], lower.containers, strict=True):
        assert list(drawn.lines[0].get_ydata()) == ages.loc[variant, "change"].tolist()


@pytest.mark.parametrize(("study", "prefix"), [("why", ""), ("why-staleness", "old-")])
def test_replays_of_a_study_are_gathered(
    study: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gate and under the run's own, at the steps that are shown; parts over stale steps."""
    spec = importlib.util.spec_from_file_location("why", DOCS / "scripts/why.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "why")
    for seed in (0, 1):
        run = tmp_path / f"{study}/runs/v/seed-{seed}/version_0/replay"
        run.mkdir(parents=True)
        rows = [
            {"step": step, "age": age, "gate": gate, "own": own, "part": "digit"}
            | dict.fromkeys([*script._STEP[2:], *script._FRESH, *script._PART], step + 10.0 * seed)
            for step, age in ((5, 4.0), (10, 9.0), (20, 3.0), (30, 0.0))
            for gate, own in (("none", False), ("token", False), ("token", True))
        ]
        for name in ("replay", "parts"):
            pd.DataFrame(rows).to_csv(run / f"{name}.csv", index=False)
    script.gather(tmp_path / study)
    files = (tmp_path / "why" / f"{prefix}{name}.csv" for name in ("steps", "parts"))
    steps, parts = (pd.read_csv(file, keep_default_na=False) for file in files)
    assert [tuple(row) for row in steps[["seed", "gate", "step"]].to_numpy()] == [
        (seed, gate, step) for seed in (0, 1) for step in (10, 20) for gate in ("none", "own")
    ]
    assert parts.set_index(["seed", "gate"])["weight_mean"].to_dict() == {
        (seed, gate): 15.0 + 10 * seed for seed in (0, 1) for gate in ("none", "own")
    }


def test_steps_are_averaged_within_a_seed_before_seeds_are_counted() -> None:
    over_runs = runpy.run_path(str(DOCS / "scripts/why.py"))["over_runs"]
    values = pd.DataFrame({"variant": ["a"] * 4, "seed": [1, 1, 1, 2], "x": [0.0, 0.0, 3.0, 3.0]})
    found = over_runs(values, ["variant"], ["x"]).loc["a"]
    assert found["x", "mean"] == 2
    assert found["x", "sem"] == pytest.approx(1.0)  # sd of 1 and 3 is sqrt(2), over sqrt(2)
