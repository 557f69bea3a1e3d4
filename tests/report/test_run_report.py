"""Reports of runs: what they show of a run's files, and folders that are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.diagnostics.histograms import Histogram
from opdlab.loggers import log_media
from opdlab.report import make_report
from opdlab.report.run.load import load_runs
from opdlab.run_folder import HISTOGRAMS, read_histograms
from opdlab.training.run_trainer import MetricsFile
from opdlab.viewer import render_page, write_page
from tests.report.synthetic_study import SyntheticStudy
from tests.viewer_pages import HOSTILE, plain_text, shown

CONFIG: dict[str, Any] = {
    "model": {
        **dict.fromkeys(("student", "teacher", "objective"), "a.Part"),
        "gate": {"class_path": "block64", "init_args": {"tau": 1.0}},
    },
    "data": {"train": "a.Problems"},
    "checkpoint": {"monitor": "val/toy/pass@1", "mode": "max"},
    "note": "<script>alert(1)</script>",
}


def histogram(count: int) -> Histogram:
    return Histogram(0.5, 2.0, 3 + count, 4.0, 5.0, [1.0, 1.5, 2.0], [1, count, 2])


def write_run(folder: Path, tau: float = 1.0, steps: int = 6, pages: bool = True) -> Path:
    """Write the folder of a run without training it."""
    folder.mkdir(parents=True)
    gate = {"class_path": "block64", "init_args": {"tau": tau}}
    config = {**CONFIG, "model": {**CONFIG["model"], "gate": gate}}
    (folder / "config.yaml").write_text(yaml.dump(config))
    file = MetricsFile(folder / "metrics.csv")
    scores = {0: 0.25, 2: 0.5, 4: 0.625, 6: 0.5}
    for step in range(steps + 1):
        row = {"train/loss": 1.0 / (step + 1), "gate/effective_sample_size": 0.9}
        row |= {f"position/{name}/{n:02d}": n * tau for name in ("divergence", "weight") for n in range(32)}
        if step in scores:
            row |= {"val/toy/pass@1": scores[step], "val/toy/pass@1_se": 0.1, "val/mean/pass@1": scores[step]}
        file.log_metrics(row, step)
        log_media([file], step, histograms={"gate/weights": histogram(step), "gate/block/000": histogram(1)})
    file.log_metrics({"teacher/toy/pass@1": 0.75, "teacher/toy/pass@1_se": 0.05}, steps)
    results = {"state": "collapsed", "steps": steps, "tokens": 1200, "warnings": ["loss has grown <b>tenfold</b>"]}
    (folder / "results.json").write_text(json.dumps({**results, "seeds": {"seed_everything": 3}}))
    if pages:
        words = [*HOSTILE, *(f"w{n}" for n in range(40))][:40]
        write_page(
            folder / "rollouts",
            4,
            render_page(4, [shown(40), shown(30, seed=1)], [plain_text(words), plain_text(words[:30])]),
        )
    return folder


def test_a_run_has_its_evaluations_curves_rollouts_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "quick/version_0")
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert (
        "quick/version_0: toy/pass@1 before 0.250 (step 0), best 0.625 (step 4), last 0.500 (step 6), teacher" in said
    )
    page = (run / "report/report.html").read_text()
    for cell in ("0.250 [0.054, 0.446]", "0.625 [0.429, 0.821]", "0.500 [0.304, 0.696]", "0.750 [0.652, 0.848]"):
        assert cell in page
    assert page.count("data:image/svg+xml") == 3
    assert "loss has grown &lt;b&gt;tenfold&lt;/b&gt;" in page
    assert f"opdlab fit -c {run}/config.yaml" in page
    assert "seed_everything 3" in page
    assert "1,200" in page
    assert f"w{39 - len(HOSTILE)}" in page
    assert "<b>" not in page
    assert not re.findall(r"(?:<script|href=|@import|url\()", page)
    assert "Differences of configuration" not in page
    figures = {path.name for path in (run / "report/figures").iterdir()}
    assert figures == {
        f"{name}.{kind}" for name in ("curves", "histograms", "positions") for kind in ("png", "svg", "pdf")
    }
    latex = (run / "report/tables/evaluations.tex").read_text()
    assert latex.startswith("\\begin{tabular}{llllrrr}")


def test_runs_and_a_study_are_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "a/version_0"), write_run(tmp_path / "b/version_0", tau=5.0, pages=False)
    study = SyntheticStudy({"none": 0.0, "span": 0.2}, [0, 1], [40], {"toy": 8}, num_samples=4).write(
        tmp_path / "study"
    )
    report = make_report(study, one, other)
    assert report.write() == Path("report/report.html")
    page = Path("report/report.html").read_text()
    assert re.search(r"model\.gate\.init_args\.tau</th><td class=\"name\">1\.0</td><td class=\"name\">5\.0<", page)
    assert "Differences in pass@1 on toy to none" in page
    names = sorted(path.name for path in Path("report/tables").iterdir())
    assert "1-comparisons.tex" in names
    assert "2-evaluations.tex" in names
    assert make_report(study, one, other).files == report.files


def test_a_run_that_was_killed_has_a_report_too(tmp_path: Path) -> None:
    run = tmp_path / "version_3"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.dump(CONFIG))
    page = make_report(run).files["report.html"].decode()
    assert "it is running, or was killed" in page
    with (run / "metrics.csv").open("w") as file:
        file.write("step,train/loss\n1,0.5\n2,0.4\n3,0.")
    (run / HISTOGRAMS).write_bytes(b'[1]\n{"a": 1}\n\xff\n{"step": 1, "gate')
    (run / "results.json").write_text('{"state": "failed", "steps": null}')
    (tmp_path / "link").symlink_to(run)
    (loaded,) = load_runs([run, run, tmp_path / "link"])  # a run is shown once
    assert list(loaded.metrics) == [1, 2]
    assert loaded.histograms == {}
    assert "steps" not in loaded.results or make_report(run).files


def test_folders_may_stand_behind_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = (write_run(tmp_path / f"version_{number}", pages=False) for number in range(2))
    assert main(["report", str(one), "--out", "both", str(other)]) == 0
    assert {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()} == {
        *("version_0", "version_1", "report"),
    }


def test_histograms_of_later_steps_go_when_a_run_resumes(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in (1, 2, 3):
        file.log_metrics({"train/loss": 0.5}, step)
        log_media([file], step, histograms={"gate/weights": histogram(step), "gate/block/000": histogram(1)})
    with (tmp_path / HISTOGRAMS).open("a") as lines:
        lines.write('{"step": 4, "gate')
    file.drop_after(2)
    kept = read_histograms(tmp_path / HISTOGRAMS)
    assert {step: (list(row), row["gate/weights"]["counts"]) for step, row in kept.items()} == {
        step: (["gate/weights"], [1, step, 2]) for step in (1, 2)
    }


@pytest.mark.parametrize("command", [("report",), ("study", "report")])
def test_folders_of_something_else_are_refused(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "version_0", pages=False)
    for folder, said in (
        (tmp_path / "nowhere", "is not a folder: give that of a run or a study"),
        (tmp_path, f"neither config.yaml of a run nor study.yaml of a study; did you mean {run}?"),
        (run / "report", "is not a folder"),
    ):
        assert main([*command, str(folder)]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert main([*command, str(run)]) == 0
