"""A study that was packed into the documentation makes the same report."""

import json
import runpy
import tarfile
from pathlib import Path

import pytest

from opdlab.studies.report import make_report
from tests.studies.tiny import study_run, write

SCRIPT = Path(__file__).parents[2] / "docs/scripts/pack_study.py"


def test_a_packed_study_makes_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert study_run(monkeypatch, write(tmp_path)) == 0
    study = tmp_path / "runs/studies/tiny"
    record = next(study.glob("runs/*/*/run.json"))
    other = {"taken_from": str(study.parent / "other" / "runs" / "none" / "seed-0")}  # as written by --share
    record.write_text(json.dumps(json.loads(record.read_text()) | other))
    runpy.run_path(str(SCRIPT))["pack"](study, tmp_path / "packed")
    with tarfile.open(tmp_path / "packed/study.tar.xz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = make_report(tmp_path / "unpacked/tiny")
    assert unpacked.conclusion == make_report(study).conclusion
    assert unpacked.write().read_text() == (tmp_path / "packed/report.md").read_text()
    everything = b"".join(file.read_bytes() for file in (tmp_path / "unpacked").rglob("*.json*"))
    assert b'"response": ""' in everything
    assert b'"runs/studies/other/runs/none/seed-0"' in everything
    assert str(tmp_path).encode() not in everything
