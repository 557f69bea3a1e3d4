"""``opdlab.load_run``: curves, evaluations and configuration from a run's folder."""

import csv
import json
import math
from pathlib import Path

import pytest

import opdlab
from opdlab.cli import EXIT_USAGE, main
from opdlab.errors import UsageError

RESULTS = {
    "before": {
        "toy/pass@1": {"value": 0.25, "standard_error": 0.1},
        "toy/length": {"value": 12.0, "standard_error": None},
    },
    "after": {
        "toy/pass@1": {"value": 0.5, "standard_error": 0.2},
        "toy/length": {"value": 9.0, "standard_error": None},
    },
    "teacher": {},
    "teacher-a": {"toy/pass@1": {"value": 1.0, "standard_error": 0.0}},
    "steps": 3,
    "seeds": {"seed": 0},
    "state": "finished",
}
CONFIG = """\
model:
  student: a.Student
  teacher: a.Teacher
  objective: {class_path: a.B, init_args: {k: 32}}
  gate: block64
data:
  train: a.Problems
"""
ROWS = [{"step": 0, "val/toy/pass@1": 0.25}, {"step": 1, "train/loss": 2.5}, {"step": 3, "train/loss": 1.0}]


def write(folder: Path) -> Path:
    run = folder / "version_0"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(RESULTS))
    (run / "config.yaml").write_text(CONFIG)
    with (run / "metrics.csv").open("w") as file:
        table = csv.DictWriter(file, ["step", "train/loss", "val/toy/pass@1"])
        table.writeheader()
        table.writerows(ROWS)
    return run


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = opdlab.load_run(write(tmp_path))
    assert run.scalars.index.tolist() == [0, 1, 3]
    assert run.scalars["train/loss"].dropna().to_dict() == {1: 2.5, 3: 1.0}
    assert run.scalars["val/toy/pass@1"].dropna().to_dict() == {0: 0.25}
    assert run.table.columns.tolist() == ["before", "after", "teacher-a"]
    assert run.table.loc["toy/pass@1"].tolist() == [0.25, 0.5, 1.0]
    assert run.table["after"].to_dict() == {"toy/pass@1": 0.5, "toy/length": 9.0}
    assert run.errors.loc["toy/pass@1"].tolist() == [0.1, 0.2, 0.0]
    assert math.isnan(run.errors.loc["toy/length", "before"])
    assert math.isnan(run.table.loc["toy/length", "teacher-a"])
    assert run.config["model"]["objective"]["init_args"]["k"] == 32
    assert run.results == RESULTS


def test_a_run_that_has_just_begun_or_was_killed_is_empty_where_nothing_is(tmp_path: Path) -> None:
    run = write(tmp_path)
    (run / "results.json").unlink()
    (run / "config.yaml").unlink()
    (run / "metrics.csv").write_text("")
    found = opdlab.load_run(str(run))
    assert (len(found.scalars), len(found.table), found.config, found.results) == (0, 0, {}, {})


def test_a_row_that_a_kill_has_cut_off_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path)
    (run / "metrics.csv").write_text("step,train/loss\n1,2.5\n2,1.")
    found = opdlab.load_run(run)
    assert found.scalars["train/loss"].to_dict() == {1: 2.5}
    assert found.scalars.index.name == "step"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.csv", b"a,b\n1,2\n", "has no column 'step', as a run writes it: mend it, or remove it"),
        ("metrics.csv", b"step,train/loss\n1,\xff\n", "is not text in UTF-8"),
        ("metrics.csv", b"step,train/loss\n1,x\n", "step 1: train/loss is 'x', which is no number"),
        ("metrics.csv", b"step,train/loss\n1,1,2\n", "which is no number"),
        ("results.json", b"", "is not JSON, as a run writes it: mend it, or remove it (Expecting value"),
        ("results.json", b'{"steps": 3, "sta', "is not JSON, as a run writes it: mend it, or remove it (Unterminated"),
        ("results.json", b"\xff", "is not JSON, as a run writes it"),
        ("results.json", b"[]", "holds a list, but must hold an object: mend it, or remove it"),
        ("results.json", b'{"before": 3}', "before is 3, which is no evaluation: mend it, or remove it"),
        ("results.json", b'{"before": {}, "after": null}', "after is null, which is no evaluation"),
        ("results.json", b'{"teacher-a": {"x": {"value": "1"}}}', 'teacher-a is {"x": {"value": "1"}}, which is no'),
        ("results.json", b'{"warnings": 3}', "warnings is 3, but must be a list: mend it, or remove it"),
        ("config.yaml", b"", "lacks model.student, model.teacher, model.objective, model.gate, data.train: it may be "),
        (
            "config.yaml",
            b"- 1\n",
            "lacks model.student, model.teacher, model.objective, model.gate, data.train: it may",
        ),
        ("config.yaml", CONFIG[: CONFIG.index("  gate")].encode(), "lacks model.gate, data.train: it may be cut off"),
        ("config.yaml", CONFIG[:-2].encode(), "lacks the end of its last line: it may be cut off; mend it, such as"),
    ],
)
def test_damaged_files_are_one_line(
    tmp_path: Path, name: str, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path)
    (run / name).write_bytes(content)
    with pytest.raises(UsageError, match=name) as refused:
        opdlab.load_run(run)
    assert words in str(refused.value)
    assert main(["report", str(run)]) == EXIT_USAGE
    assert words in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_another_folder_is_refused_with_the_runs_in_it(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(
        UsageError, match=r"neither metrics.csv nor results.json: give one of the runs in it: version_0"
    ):
        opdlab.load_run(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere.*: give ROOT/version_N of a run"):
        opdlab.load_run(tmp_path / "nowhere")
