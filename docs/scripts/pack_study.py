"""Puts a study's report and its samples into a folder of the documentation.

``python docs/scripts/pack_study.py runs/studies/NAME docs/results/NAME`` copies the report with its figures (PNG) and
tables, and packs what it is made from into ``study.tar.xz``: the study, the record of each run, and its sample lines
without the texts of problems and responses, which seeds give again. Unpacked, ``opdlab study report NAME`` makes the
same report.
"""

import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opdlab.studies.report import make_report
from opdlab.studies.schema import EVALUATIONS, RUN, RUNS, STUDY, VARIANTS

TEXTS = ("problem", "response")


def pack(study: Path, target: Path) -> None:
    """Write ``study.tar.xz``, and the report that is made of it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    archive = target / "study.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for name, content in members(study):
            entry = tarfile.TarInfo(f"{study.name}/{name}")
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        report = make_report(Path(folder) / study.name).write().parent
        shutil.copytree(report, target, ignore=shutil.ignore_patterns("*.html", "*.svg", "tables"), dirs_exist_ok=True)
        shutil.copytree(report / "tables", target / "tables", ignore=shutil.ignore_patterns("*.md"))


def members(study: Path) -> Iterator[tuple[str, bytes]]:
    """Names below the study's folder, and contents."""
    kept = [study / STUDY, *study.glob(f"{VARIANTS}/*.json"), *study.glob(f"{RUNS}/*/*/{RUN}")]
    # The evaluation before training is the same for all variants of a seed, and no report looks at it.
    evaluations = [path for path in study.glob(f"{RUNS}/*/*/{EVALUATIONS}/*/*") if path.parent.name != "val-step-0"]
    for file in sorted([*kept, *evaluations]):
        content = file.read_bytes()
        if file.suffix == ".jsonl":
            content = b"".join(map(without_texts, content.splitlines()))
        # Where studies lay is nobody's business; a run may have been taken from another one beside this.
        content = content.replace(f"{study.absolute().parent}/".encode(), b"runs/studies/")
        yield file.relative_to(study).as_posix(), content


def without_texts(line: bytes) -> bytes:
    r"""A sample line with empty texts.

    Example:
        >>> without_texts(b'{"id": "1", "problem": "1+1", "response": "2", "correct": true}')
        b'{"id": "1", "problem": "", "response": "", "correct": true}\n'
    """
    return json.dumps(json.loads(line) | dict.fromkeys(TEXTS, "")).encode() + b"\n"


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
