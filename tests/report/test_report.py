"""Reports of study folders with a known truth, and folders that cannot be compared."""

import base64
import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from numpy.typing import NDArray

from opdlab.errors import UsageError
from opdlab.report import make_report
from opdlab.report.drawing import short_name
from opdlab.report.study.compare import Place, compare
from opdlab.report.study.figures import every_run, forest
from opdlab.report.study.load import load_results
from tests.report.synthetic_study import SyntheticStudy, evaluation, write_samples

Rows = list[dict[str, str]]
Array = NDArray[np.bool_]


def read_csv(report: Path, name: str = "comparisons") -> Rows:
    with (report.parent / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(report: Path) -> dict[str, bytes]:
    return {str(path.relative_to(report.parent)): path.read_bytes() for path in report.parent.rglob("*.*")}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = SyntheticStudy(
        {"none": 0.0, "span": 0.2, "block64": 0.0, "odd": 0.0},
        benchmarks={"toy": 30, "gsm": 20},
        labels={"odd": "<script>alert(1)</script> | $x_1$ & 50% [a](http://b.c) \\ #~^{}\u202e"},
        collapsed=["odd"],
    )
    return make_report(study.write(tmp_path_factory.mktemp("study"))).write()


def test_a_known_effect_is_found_and_a_collapse_too(report: Path) -> None:
    rows = {(r["variant"], r["metric"], r["benchmark"], r["step"]): r for r in read_csv(report)}
    assert len(rows) == 3 * 2 * 3 * 2  # variants, metrics, benchmarks and their mean, budgets
    span = rows["span", "pass@1", "mean", "40"]
    assert float(span["low"]) <= 0.2 <= float(span["high"])
    assert float(span["p_holm"]) < 0.05
    assert (span["seeds"], span["seeds_ahead"]) == ("4", "4")
    collapsed = rows["odd", "pass@1", "mean", "40"]
    assert float(collapsed["variant_mean"]) == 0
    assert float(collapsed["high"]) < 0
    text = report.read_text()
    assert "pass@1 on the mean over benchmarks: better than none: span (+" in text
    assert re.search(
        r"cannot be told apart from none: block64 \(the smallest difference that this study would detect", text
    )


def test_every_run_is_drawn_and_tabulated(tmp_path: Path) -> None:
    """One of ten runs collapsed, another is missing: each dot is at its figure, and at the height of its seed."""
    study = SyntheticStudy({"none": 0.0, "span": 0.0}, seeds=range(10), budgets=[40]).write(tmp_path)
    write_samples(evaluation(study, "none", 3, 40), "toy", np.zeros((24, 8), bool))
    shutil.rmtree(study / "runs/span/seed-5")
    report = make_report(study).write()
    runs = {
        (row["variant"], row["seed"]): float(row["value"])
        for row in read_csv(report, "runs")
        if row["metric"] == "pass@1"
    }
    every = {(variant, str(seed)) for variant in ("none", "span") for seed in range(10)}
    assert runs.keys() == every - {("span", "5")}
    assert [key for key, value in runs.items() if value == 0] == [("none", "3")]
    assert {path.name for path in (report.parent / "figures").glob("*runs*.png")} == {
        f"0{n}-runs-pass{k}-toy.png" for n, k in ((1, 1), (2, 8))
    }
    axes = every_run(load_results(study), Place("pass@1", "toy", 40)).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert np.concatenate([line.get_xdata() for line in dots]).tolist() == list(runs.values())
    none, span = (np.asarray(line.get_ydata()) for line in dots)
    assert np.allclose(np.delete(none, 5) + 1, span)


def test_figures_are_the_plain_ones(report: Path) -> None:
    """Means as the sample lines have them, unweighted over benchmarks."""
    folder = report.parents[1]
    means = []
    for seed in range(4):
        for benchmark in ("toy", "gsm"):
            lines = (evaluation(folder, "span", seed, 40) / f"{benchmark}-0.jsonl").read_text().splitlines()
            means.append(np.mean([json.loads(line)["correct"] for line in lines]))
    (row,) = [
        r
        for r in read_csv(report, "metrics")
        if (r["variant"], r["metric"], r["benchmark"], r["step"]) == ("span", "pass@1", "mean", "40")
    ]
    assert float(row["mean"]) == pytest.approx(np.mean(means))
    spread = np.reshape(means, (4, 2)).mean(1).std(ddof=1)
    assert float(row["std_over_seeds"]) == pytest.approx(spread)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    study = SyntheticStudy({"none": 0.0, "a": 0.1}, [0, 1], [20, 40], {"toy": 8}, num_samples=4)
    first = make_report(study.write(tmp_path / "study")).write()
    folder = shutil.copytree(first.parents[1], tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
    stale = folder / "report" / "figures" / "99-forest-gone.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier report")
    assert len(files(first)) == 2 + 7 + 9
    assert files(make_report(folder).write()) == files(first)


def test_page_stands_alone(report: Path) -> None:
    page = (report.parent / "report.html").read_text()
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    assert "<script" not in page
    assert "\u202e" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3 * 6  # forest, runs and curves of two metrics on two benchmarks and their mean
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(content)
    assert not re.findall(r"(?:href|url\(|@import)", page)


def test_markdown_shows_names_as_they_are(report: Path) -> None:
    tokens = MarkdownIt().enable("table").parse(report.read_text())
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *inline) if token.type.startswith(("html", "link"))]
    label = "<script>alert(1)</script> | $x_1$ & 50% [a](http://b.c) \\ #~^{}⟨U+202E⟩"
    assert label in [child.content for child in inline] or any(
        "".join(child.content for child in token.children or ()) == label for token in tokens
    )
    pictures = [str(child.attrs["src"]) for child in inline if child.type == "image"]
    assert pictures
    assert all((report.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_latex_escapes_names(report: Path) -> None:
    text = (report.parent / "tables" / "comparisons.tex").read_text()
    assert text.startswith("\\begin{tabular}{lllrrrr}")
    label = (
        r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} \textbar{} \$x\_1\$ \& 50\% "
        r"[a](http://b.c) \textbackslash{} \#\textasciitilde{}\textasciicircum{}\{\}\textlangle{}U+202E\textrangle{}"
    )
    assert label in text
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    columns = text.split("}{")[1].split("}")[0]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(columns) - 1}


def test_nothing_differs(tmp_path: Path) -> None:
    study = SyntheticStudy({"none": 0.0, "a": 0.0, "b": 0.0}, budgets=[40], seed_std=0.05)
    report = make_report(study.write(tmp_path)).write()
    rows = [row for row in read_csv(report) if row["metric"] == "pass@1"]
    low, high = (f"{extreme(float(r['detectable_difference']) for r in rows):.3f}" for extreme in (min, max))
    text = report.read_text()
    assert "pass@1 on toy: nothing can be told apart from none at this size." in text
    assert (
        f"after correction for 2 variants, is {low} to {high}, depending on the variant. For 0.05 it would take" in text
    )
    assert "mean over benchmarks" not in text
    assert not list((report.parent / "figures").glob("*curves*"))  # one budget


def test_a_single_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    study = SyntheticStudy({"none": 0.0, "a": 0.1}, seeds=[3], budgets=[40], num_samples=4)
    report = make_report(study.write(tmp_path)).write()
    text = report.read_text()
    assert "intervals cover the choice of problems only" in text
    assert "pass@8 is left out: a benchmark has only 4 samples of each problem" in text
    (row,) = read_csv(report)
    assert row["metric"] == "pass@1"
    assert float(row["seed_share"]) == 0
    assert row["seeds_for_0.05"] == row["detectable_difference"] == ""
    (mean, _) = read_csv(report, "metrics")
    assert mean["std_over_seeds"] == ""


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 4])
def test_below_four_seeds_there_are_estimates_and_no_verdict(tmp_path: Path, num_seeds: int) -> None:
    """However large the difference: nothing is known about how much runs vary."""
    study = SyntheticStudy({"none": 0.0, "a": 0.3}, range(num_seeds), [40], {"toy": 200})
    report = make_report(study.write(tmp_path)).write()
    results, text = load_results(tmp_path), report.read_text()
    compared = [each for each in compare(results) if each.place.metric == "pass@1"]
    (marker,) = [line for line in forest(compared, results).axes[0].lines if line.get_marker() == "o"]
    row = read_csv(report)[0]
    assert float(row["difference"]) == pytest.approx(0.3, abs=0.1)
    assert float(row["low"]) < float(row["difference"]) < float(row["high"])
    columns = ("p", "p_holm", "probability_of_improvement", "detectable_difference")
    if num_seeds < 4:
        assert [row[key] for key in columns] == [""] * 4
        assert "pass@1 on toy: no verdict with fewer than 4 seeds; differences from none: a (+0." in text
        assert re.search(rf"- a against none: \+0\..*, {num_seeds} seeds?; no verdict with fewer than 4 seeds\.", text)
        assert marker.get_markerfacecolor() == "white"
    else:
        assert all(row[key] for key in columns)
        assert marker.get_markerfacecolor() != "white"
    for word in ("better than", "worse than"):
        assert (word in text) == (num_seeds == 4 and word == "better than")


def test_collapsed_runs_are_marked_and_count(tmp_path: Path) -> None:
    folder = SyntheticStudy({"none": 0.0, "a": 0.3, "b": 0.0}, range(4), [40]).write(tmp_path)
    before = read_csv(make_report(folder).write())
    assert {row["collapsed"] for row in before} == {"0"}
    for variant, seed, state in (
        ("a", 1, "collapsed"),
        ("a", 3, "collapsed"),
        ("none", 0, "collapsed"),
        ("b", 0, "finished"),
    ):
        results = folder / "runs" / variant / f"seed-{seed}" / "version_0/results.json"
        results.parent.mkdir()
        results.write_text(json.dumps({"state": state}))
    report = make_report(folder).write()
    rows = read_csv(report)
    assert [row | {"collapsed": "0"} for row in rows] == before
    assert {row["variant"]: row["collapsed"] for row in rows} == {"a": "2", "b": "0"}
    marked = {(r["variant"], r["seed"]) for r in read_csv(report, "runs") if r["collapsed"] == "True"}
    assert marked == {("a", "1"), ("a", "3"), ("none", "0")}
    text = report.read_text()
    assert "Runs in which training collapsed: a: 2, none: 1." in text
    assert re.search(r"better than none: a \(\+0\.\d+; 2 of 4 runs collapsed\)", text)
    assert re.search(r"- a is better than none: .*; 2 of 4 runs collapsed\.", text)
    axes = every_run(load_results(folder), Place("pass@1", "toy", 40)).axes[0]
    assert sum(line.get_marker() == "x" for line in axes.lines) == 3
    assert "crosses: collapsed" in axes.get_xlabel()


def test_long_names_differ_at_their_ends() -> None:
    names = [f"runs/sampled-token-temperature-0.7-lr-1e-5-seed-{seed}" for seed in (0, 1)]
    first, second = map(short_name, names)
    assert len(first) == len(second) == 40
    assert (first[:10], first[-7:], second[-7:]) == ("runs/sampl", "-seed-0", "-seed-1")


def test_missing_runs_are_named_and_left_out_pairwise(tmp_path: Path) -> None:
    folder = SyntheticStudy({"none": 0.0, "a": 0.1, "b": 0.0, "c": 0.0}, budgets=[40]).write(tmp_path)
    runs = folder / "runs"
    shutil.rmtree(runs / "none" / "seed-0")
    (runs / "a" / "seed-1" / "run.json").unlink()
    (runs / "a" / "seed-2" / "run.json").write_text(json.dumps({"state": "failed"}))
    for seed in (1, 2, 3):
        (runs / "c" / f"seed-{seed}" / "run.json").unlink()
    report = make_report(folder).write()
    assert {row["variant"]: row["seeds"] for row in read_csv(report)} == {"a": "1", "b": "3"}
    assert {row["p_holm"] for row in read_csv(report)} == {""}
    text = report.read_text()
    for line in ("| none | 0 | missing |", "| a | 1 | unfinished |", "| a | 2 | failed |"):
        assert line in text
    assert "6 of 16 runs have not finished" in text
    assert "Not compared, since no finished run shares a seed with its baseline: c." in text
    # Its score is the mean of one seed, and its baseline's of three.
    paper = (report.parent / "tables" / "comparisons.tex").read_text()
    assert "a (1 seeds)" in paper
    assert "b (" not in paper


def _study_of(folder: Path, correct: dict[str, list[Array]], num_problems: int) -> Path:
    """A study of one budget with the given samples, [P, n], of each variant and seed."""
    seeds = range(len(correct["none"]))
    study = SyntheticStudy(dict.fromkeys(correct, 0.0), list(seeds), [40], {"toy": num_problems})
    study.write(folder)
    for variant, runs in correct.items():
        for seed in seeds:
            write_samples(evaluation(folder, variant, seed, 40), "toy", runs[seed])
    return folder


def test_where_nothing_varies_nothing_is_known(tmp_path: Path) -> None:
    """Equal pass@8 in all runs tells nothing of what a study would detect; pass@1 varies."""
    answers = np.random.default_rng(5).random((2, 4, 4, 8)) < 0.5
    answers[..., 0] = True
    correct = {name: list(runs) for name, runs in zip(("none", "a"), answers, strict=True)}
    report = make_report(_study_of(tmp_path, correct, 4)).write()
    (varied, same) = read_csv(report)
    assert (varied["metric"], same["metric"], same["standard_error"]) == ("pass@1", "pass@8", "0.0")
    assert varied["detectable_difference"]
    assert [same[key] for key in ("low", "high", "detectable_difference", "seeds_for_0.05")] == [""] * 4
    text = report.read_text()
    assert "What this study would detect is unknown, since runs and problems do not vary here.\n" in text
    assert "a and none have the same pass@8 on every problem and seed." in text
    (row,) = [line for line in (report.parent / "tables/comparisons.md").read_text().splitlines() if "pass@8" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert (cells[8], cells[9], cells[-3], cells[-2]) == ("0.000", "-", "-", "-")


def test_a_constant_difference_has_no_interval(tmp_path: Path) -> None:
    """Its p bounds the probability that equal variants give this, 2 / 4^S."""
    right, wrong = np.ones((4, 8), bool), np.zeros((4, 8), bool)
    report = make_report(_study_of(tmp_path, {"none": [wrong] * 4, "a": [right] * 4}, 4)).write()
    assert "a is better than none: +1.000, on all problems and seeds, p = 0.008." in report.read_text()
    assert {(row["low"], float(row["p"])) for row in read_csv(report)} == {("", 2 / 4**4)}


def test_rates_differ_by_one_at_most(tmp_path: Path) -> None:
    """Seeds that contradict each other: t quantiles alone would reach beyond what a rate can be."""
    high, low = (np.arange(8) < np.array([[number]]).repeat(4, 0) for number in (7, 1))
    correct = {"none": [low, high] * 2, "a": [high, low] * 2, "b": [high] * 4}
    report = make_report(_study_of(tmp_path, correct, 4)).write()
    rows = {(row["variant"], row["metric"]): row for row in read_csv(report)}
    a, b = rows["a", "pass@1"], rows["b", "pass@1"]
    assert (float(a["low"]), float(a["high"]), float(b["high"])) == (-1, 1, 1)
    assert float(a["detectable_difference"]) > 1
    text = report.read_text()
    expected = "variants, is more than 1, so that it can find no difference here at all: rates differ by 1 at most."
    assert expected in text
    assert "no difference would be detected at this size, since rates differ by 1 at most." in text
    assert "> 1 |" in (report.parent / "tables/comparisons.md").read_text().replace("&gt;", ">")


def test_the_conclusion_can_be_printed(tmp_path: Path) -> None:
    labels = {"a": "a\u202e[2J\nof two lines"}
    folder = SyntheticStudy({"none": 0.0, "a": 0.2}, [0, 1], budgets=[40], labels=labels).write(tmp_path)
    report = make_report(folder)
    assert not (folder / "report").exists()
    heading, *lines = report.conclusion
    assert heading == "at optimizer step 40:"
    assert [line.split(" on ")[0] for line in lines[:2]] == ["- pass@1", "- pass@8"]
    assert "a⟨U+202E⟩[2J of two lines" in lines[0]
    assert lines[2].startswith("With fewer than 4 seeds hardly anything is known")
    text = report.write().read_text().replace("\\", "").replace("&lt;", "<")
    assert all(line in text for line in lines)


def test_what_only_the_correction_hides_is_said(tmp_path: Path) -> None:
    """An interval that leaves out 0 beside "cannot be told apart" would look like a contradiction."""
    effects = {"none": 0.0, "a": 0.08} | {f"v{i}": 0.0 for i in range(9)}
    report = make_report(SyntheticStudy(effects, range(6), [40], seed_std=0.0).write(tmp_path)).write()
    hidden = [row for row in read_csv(report) if float(row["p"]) < 0.05 <= float(row["p_holm"])]
    said = re.findall(
        r"- (\w+) cannot be told apart from none: .*; alone it would be \(p .*\), among 10 variants it is not; "
        r"a difference of .* would be detected four times out of five",
        report.read_text(),
    )
    assert said == [row["variant"] for row in hidden] != []


def test_fewer_nats_are_better(tmp_path: Path) -> None:
    """A variant whose answers have half the baseline's reverse KL; a long answer counts for more than a short one."""
    study = SyntheticStudy({"none": 0.0, "near": 0.0}, seeds=range(4), budgets=[40], benchmarks={"toy": 20})
    folder, rng, wanted = study.write(tmp_path), np.random.default_rng(0), {}
    for variant, scale in (("none", 4.0), ("near", 2.0)):
        for seed in range(4):
            path = evaluation(folder, variant, seed, 40) / "toy-0.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            sums: dict[str, list[float]] = {}
            for row in rows:
                row |= {"reverse_kl": rng.normal(scale, 0.1), "tokens": int(rng.integers(1, 50))}
                both = sums.setdefault(row["id"], [0.0, 0.0])
                both[0] += row["reverse_kl"] * row["tokens"]
                both[1] += row["tokens"]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            wanted[variant, str(seed)] = float(np.divide(*np.sum(list(sums.values()), axis=0)))
    report = make_report(folder).write()
    (row,) = [row for row in read_csv(report) if row["metric"] == "reverse_kl"]
    assert float(row["difference"]) == pytest.approx(-2, abs=0.1)
    assert float(row["low"]) < -1  # it is no rate
    assert row["seeds_ahead"] == "4"
    assert float(row["p"]) < 0.05
    assert float(row["probability_of_improvement"]) > 0.95
    runs = {
        (r["variant"], r["seed"]): float(r["value"]) for r in read_csv(report, "runs") if r["metric"] == "reverse_kl"
    }
    assert runs == pytest.approx(wanted)
    text = report.read_text()
    assert "reverse KL on toy: better than none: near (-" in text
    assert "## reverse KL on toy (nats per token; less is better)" in text
    # Where one evaluation has not measured it, there is nothing to compare.
    path.write_text("".join(json.dumps(row | {"reverse_kl": None}) + "\n" for row in rows))
    text = make_report(folder).write().read_text()
    assert "reverse KL" not in text
    assert "Reverse KL is left out, because only some evaluations have measured it" in text


def test_the_error_of_nats_a_token_is_that_of_leaving_problems_out(tmp_path: Path) -> None:
    """With one seed only problems vary; the jackknife of the difference of two ratios knows no linearization."""
    study = SyntheticStudy({"none": 0.0, "near": 0.0}, seeds=[0], budgets=[40], benchmarks={"toy": 200})
    folder, rng, sums = study.write(tmp_path), np.random.default_rng(1), []
    for variant, scale in (("none", 4.0), ("near", 2.0)):
        path = evaluation(folder, variant, 0, 40) / "toy-0.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            tokens = int(rng.integers(1, 50))
            row |= {"reverse_kl": scale + 0.02 * tokens + rng.normal(0, 0.1), "tokens": tokens}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        nats = np.array([(row["reverse_kl"] * row["tokens"], row["tokens"]) for row in rows]).reshape(200, -1, 2).sum(1)
        sums.append(nats.sum(0) - nats)  # [P, 2], without one problem
    without = np.divide(*sums[1].T) - np.divide(*sums[0].T)
    jackknife = np.sqrt(199 / 200 * ((without - without.mean()) ** 2).sum())
    (row,) = [row for row in read_csv(make_report(folder).write()) if row["metric"] == "reverse_kl"]
    assert float(row["standard_error"]) == pytest.approx(jackknife, rel=0.02)


def test_failed_runs_leave_no_verdict(tmp_path: Path) -> None:
    """Of five seeds one failed: the other four would say that the variant is better."""
    folder = SyntheticStudy({"none": 0.0, "a": 0.3, "b": 0.3}, range(5), [40]).write(tmp_path)
    path = folder / "runs/a/seed-2/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "failed"}))
    report = make_report(folder).write()
    rows = {row["variant"]: row for row in read_csv(report) if row["metric"] == "pass@1"}
    assert [(row["seeds"], row["failed"]) for row in rows.values()] == [("4", "1"), ("5", "0")]
    assert (rows["a"]["p"], rows["a"]["p_holm"], rows["a"]["detectable_difference"]) == ("", "", "")
    assert float(rows["b"]["p_holm"]) == pytest.approx(min(1, 2 * float(rows["b"]["p"])))
    text = report.read_text()
    assert "Runs that failed: a: 1 of 5. A comparison that lacks them has no verdict" in text
    assert re.search(
        r"pass@1 on toy: better than none: b .*no verdict, since runs of 1 seed failed; .* a \(\+0\.", text
    )


def test_variants_still_to_run_are_corrected_for(tmp_path: Path) -> None:
    names = [f"v{number}" for number in range(10)]
    study = SyntheticStudy({"none": 0.0, "v0": 0.06, **dict.fromkeys(names[1:], 0.0)}, range(4), [40])
    folder = study.write(tmp_path)
    for name in names[1:]:
        shutil.rmtree(folder / "runs" / name)
    (row,) = [row for row in read_csv(make_report(folder).write()) if row["metric"] == "pass@1"]
    assert 0 < float(row["p"]) < 0.1
    assert float(row["p_holm"]) == pytest.approx(10 * float(row["p"]))


def test_what_is_not_known_of_runs_is_said(tmp_path: Path) -> None:
    folder = SyntheticStudy({"none": 0.0, "a": 0.0}, [0, 1], [40]).write(tmp_path)
    for variant, seed in (("none", 0), ("none", 1), ("a", 0)):
        results = folder / "runs" / variant / f"seed-{seed}" / "version_0/results.json"
        results.parent.mkdir()
        results.write_text(json.dumps({"state": "finished"}))
    report = make_report(folder).write()
    assert "Whether training collapsed is not known of 1 run, whose folder has no results.json." in report.read_text()
    assert "different versions" not in report.read_text()
    known = {(r["variant"], r["seed"]): r["collapsed"] for r in read_csv(report, "runs") if r["metric"] == "pass@1"}
    assert list(known.values()) == ["False", "False", "False", ""]
    path = folder / "runs/a/seed-1/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"opdlab": "0.1.0", "torch": "2.12.0"}}))
    assert "Finished runs are of different versions of packages" in make_report(folder).write().read_text()


def test_runs_of_another_study_are_named(tmp_path: Path) -> None:
    folder = SyntheticStudy({"none": 0.0, "a": 0.0}, budgets=[40]).write(tmp_path)
    for seed in (0, 1):
        path = folder / "runs" / "none" / f"seed-{seed}" / "run.json"
        origin = f"/somewhere/other/runs/none/seed-{seed}"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"taken_from": origin}))
    assert "- runs: 8 of 8 finished, 2 of them taken over from other\n" in make_report(folder).write().read_text()


def test_a_variant_may_have_a_baseline_of_its_own(tmp_path: Path) -> None:
    """Figures are those of a study with that baseline alone; p values are corrected for all variants."""
    effects, seeds = {"none": 0.0, "other": 0.25, "gated": 0.25, "span": 0.0}, range(8)
    folder = SyntheticStudy(effects, seeds, [20, 40], baselines={"gated": "other"}).write(tmp_path / "two")
    report = make_report(folder).write()
    rows = {(row["variant"], row["metric"], row["step"]): row for row in read_csv(report)}
    assert {name: rows[name, "pass@1", "40"]["baseline"] for name in ("other", "gated", "span")} == {
        "other": "none",
        "gated": "other",
        "span": "none",
    }
    shutil.copytree(folder, tmp_path / "one")
    study = yaml.safe_load((folder / "study.yaml").read_text())
    study["variants"] = [{"name": "gated"}, {"name": "other"}]
    (tmp_path / "one" / "study.yaml").write_text(yaml.safe_dump(study | {"baseline": "other"}))
    (alone,) = [
        r for r in read_csv(make_report(tmp_path / "one").write()) if (r["metric"], r["step"]) == ("pass@1", "40")
    ]
    gated = rows["gated", "pass@1", "40"]
    for key in ("baseline_mean", "variant_mean", "difference", "standard_error", "seeds_ahead"):
        assert gated[key] == alone[key]
    assert float(gated["p_holm"]) >= float(alone["p_holm"])
    assert float(gated["detectable_difference"]) > float(alone["detectable_difference"])
    text = report.read_text()
    assert text.startswith("# Study synthetic: 3 variants against none or other")
    assert re.search(r"pass@1 on toy: better than none: other .*cannot be told apart from none: span \(", text)
    assert re.search(
        r"pass@1 on toy: nothing can be told apart from other at this size.*correction for 3 variants", text
    )
    assert "- gated cannot be told apart from other: " in text
    assert "| gated | gated | other | " in text
    figures = "".join(part.decode() for name, part in files(report).items() if name.endswith(".md"))
    assert "by optimizer step, each variant beside none or other" in figures


# -- incomparable runs ------------------------------------------------------------------------------------------------


def _rewrite(folder: Path, change: Callable[[dict[str, object]], object], lines: slice = slice(None)) -> None:
    path = evaluation(folder, "a", 1, 40) / "toy-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[lines]:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _only(folder: Path, *kept: str) -> None:
    for path in folder.glob("runs/*/*/run.json"):
        if path.parts[-3] not in kept:
            path.unlink()


def _truncate(folder: Path, lines: int, cut: int = 0) -> None:
    path = evaluation(folder, "a", 1, 40) / "toy-0.jsonl"
    content = b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
    path.write_bytes(content[: len(content) - cut])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no study": (lambda f: (f / "study.yaml").unlink(), "has neither config.yaml of a run nor study.yaml"),
    "no keys": (lambda f: (f / "study.yaml").write_text("- 1"), "holds no keys"),
    "no yaml": (lambda f: (f / "study.yaml").write_text("a: ["), "is not YAML"),
    "no seeds": (lambda f: (f / "study.yaml").write_text("{name: x, variants: [{name: a}], baseline: a}"), "seeds"),
    "no lines": (
        lambda f: shutil.rmtree(f / "runs/a/seed-1/evaluations"),
        "seed-1/.* has no sample lines, .* delete .*seed-1 and run the study again",
    ),
    "other problems": (
        lambda f: _rewrite(f, lambda row: row.update(problem="another"), slice(4)),
        "benchmark 'toy' has other problems in .*a/seed-1.* than in .*none/seed-0.*: 1 differ, among them 'p0'",
    ),
    "other ids": (lambda f: _rewrite(f, lambda row: row.update(id="q9"), slice(4)), "2 differ, among them 'p0', 'q9'"),
    "another benchmark": (
        lambda f: _rewrite(f, lambda row: row.update(benchmark="new")),
        "benchmark 'new' is in .*a/seed-1.* and not in .*none/seed-0",
    ),
    "a benchmark lacks": (
        lambda f: write_samples(evaluation(f, "none", 0, 40), "extra", np.ones((2, 4), bool)),
        "benchmark 'extra' is in .*none/seed-0.* and not in .*none/seed-1",
    ),
    "unequal samples": (lambda f: _truncate(f, 47), "has 4 samples of problem 'p0' and 3 of 'p11'"),
    "half a line": (lambda f: _truncate(f, 48, cut=5), "line 48 is no whole sample line"),
    "other samples": (
        lambda f: write_samples(evaluation(f, "a", 1, 40), "toy", np.ones((12, 5), bool)),
        "has 5 samples of each problem in .*a/seed-1.* and 4 in",
    ),
    "no verdict": (lambda f: _rewrite(f, lambda row: row.update(correct=None)), "without a verdict"),
    "no baseline": (lambda f: _only(f, "a"), "no run of the baseline 'none' has finished"),
    "baseline alone": (lambda f: _only(f, "none"), "no variant has finished with a seed that"),
    "one variant": (
        lambda f: (f / "study.yaml").write_text(
            (f / "study.yaml").read_text().replace("- name: a", "").replace("  overrides:\n  - --model.gate=a\n", "")
        ),
        r"the study has one variant, so there is nothing to compare: .* opdlab report .*/runs/\*/\*/version_0$",
    ),
    "nothing": (_only, "none of its 4 runs has finished"),
    "broken record": (lambda f: (f / "runs/a/seed-1/run.json").write_text("{"), "run.json cannot be read"),
    "baseline unknown": (
        lambda f: (f / "study.yaml").write_text(
            (f / "study.yaml").read_text().replace("baseline: none", "baseline: x")
        ),
        "baseline is 'x', which is no variant",
    ),
    "baseline of a variant unknown": (
        lambda f: (f / "study.yaml").write_text(
            (f / "study.yaml").read_text().replace("name: a", "name: a\n  baseline: y")
        ),
        "baseline of 'a' is 'y', which is no variant",
    ),
    "path": (
        lambda f: (f / "study.yaml").write_text((f / "study.yaml").read_text().replace("name: a", "name: ../a")),
        "is '../a', but names a folder",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_compared_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    study = SyntheticStudy({"none": 0.0, "a": 0.0}, [0, 1], [40], {"toy": 12}, num_samples=4)
    folder = study.write(tmp_path)
    load_results(folder)
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(UsageError, match=message) as raised:
        make_report(folder).write()
    assert "\n" not in str(raised.value)
    assert not (folder / "report").exists()


def test_a_problem_that_two_processes_had_counts_once(tmp_path: Path) -> None:
    study = SyntheticStudy({"none": 0.0, "a": 0.0}, [0], [40], {"toy": 12}, num_samples=4)
    folder = study.write(tmp_path)
    before = load_results(folder).counts["a", 0, 40, "toy"]
    write_samples(evaluation(folder, "a", 0, 40), "toy", np.ones((3, 4), bool), rank=1)
    np.testing.assert_array_equal(load_results(folder).counts["a", 0, 40, "toy"], before)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = SyntheticStudy({"none": 0.0, "a": 0.0}, [0], [40], {"toy": 4}).write(tmp_path)
    (folder / "report").write_text("in the way")
    with pytest.raises(UsageError, match="report cannot be written"):
        make_report(folder).write()
