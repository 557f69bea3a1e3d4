"""A study that was packed into the documentation makes the same report."""

import json
import runpy
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from opdlab.report import make_report

SCRIPT = Path(__file__).parents[2] / "docs/scripts/pack_study.py"


def test_a_packed_study_makes_the_same_report(
    finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(figure: Figure, file: Any, **options: Any) -> None:
        file.write(b"a picture, which takes most of the time")

    monkeypatch.setattr(Figure, "savefig", nothing)
    study = tmp_path / "runs/studies/tiny"
    shutil.copytree(finished_study / "runs/studies/tiny", study)
    record = next(study.glob("runs/*/*/run.json"))
    other = {"taken_from": str(study.parent / "other" / "runs" / "none" / "seed-0")}  # as written by --share
    record.write_text(json.dumps(json.loads(record.read_text()) | other))
    collapsed = next(study.glob("runs/token/*")) / "version_0/results.json"
    collapsed.write_text(json.dumps({"state": "collapsed"}))
    script = runpy.run_path(str(SCRIPT))
    script["pack"](study, tmp_path / "packed")
    (tmp_path / "packed/tables/runs.csv").write_text("of an earlier version")
    (tmp_path / "packed/tables/figures.csv").write_text("of an earlier version")
    script["report"](tmp_path / "packed")
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"figures", "report.md", "study.tar.xz", "tables"}
    assert b"of an earlier version" not in b"".join(
        path.read_bytes() for path in (tmp_path / "packed/tables").iterdir()
    )
    with tarfile.open(tmp_path / "packed/study.tar.xz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = make_report(tmp_path / "unpacked/tiny")
    assert unpacked.conclusion == make_report(study).conclusion
    assert any("training collapsed: token: 1" in line for line in unpacked.conclusion)
    assert unpacked.write().read_text() == (tmp_path / "packed/report.md").read_text()
    everything = b"".join(file.read_bytes() for file in (tmp_path / "unpacked").rglob("*.json*"))
    assert b'"response": ""' in everything
    assert b'"runs/studies/other/runs/none/seed-0"' in everything
    assert str(tmp_path).encode() not in everything
