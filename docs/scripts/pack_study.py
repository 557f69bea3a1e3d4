"""Puts a study's report and its samples into a folder of the documentation.

``python docs/scripts/pack_study.py runs/studies/NAME docs/results/NAME`` copies the report with its figures (PNG) and
tables, and packs what it is made from into ``study.tar.xz``: the study, the record of each run, and its sample lines
without the texts of problems and responses and without their seeds, all of which the run's seed gives again, and with
a reverse KL of four decimals. Unpacked, ``opdlab study report NAME`` makes the same report.
``python docs/scripts/pack_study.py docs/results/NAME`` makes the report in the documentation again, after the code of
reports has changed.
"""

import io
import json
import lzma
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opdlab.records import RESULTS
from opdlab.report import make_report
from opdlab.studies.schema import EVALUATIONS, RUN, RUNS, STUDY, VARIANTS, VERSION

ARCHIVE = "study.tar.xz"
LEFT_OUT = {"problem": "", "response": "", "seed": None}
# pb is for data of several bytes, and text has none: without it an archive is smaller by a quarter.
COMPRESSION = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}]


def pack(study: Path, target: Path) -> None:
    """Write ``study.tar.xz``, and the report that is made from it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with (
        lzma.open(target / ARCHIVE, "wb", filters=COMPRESSION) as file,
        tarfile.open(fileobj=file, mode="w") as packed,
    ):
        for name, content in members(study):
            entry = tarfile.TarInfo(f"{study.name}/{name}")
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    report(target)


def report(target: Path) -> None:
    """Write the report that is made from ``study.tar.xz``, in place of an earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(target / ARCHIVE) as packed:
            packed.extractall(folder, filter="data")
        (study,) = Path(folder).iterdir()
        made = make_report(study).write().parent
        for part in ("figures", "tables"):
            shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(
            made, target, ignore=shutil.ignore_patterns("*.html", "*.svg", "*.pdf", "tables"), dirs_exist_ok=True
        )
        shutil.copytree(made / "tables", target / "tables", ignore=shutil.ignore_patterns("*.md"))


def members(study: Path) -> Iterator[tuple[str, bytes]]:
    """Names below the study's folder, and contents."""
    kept = [study / STUDY, *study.glob(f"{VARIANTS}/*.json")]
    kept += [file for name in (RUN, f"{VERSION}/{RESULTS}") for file in study.glob(f"{RUNS}/*/*/{name}")]
    # The evaluation before training is the same for all variants of a seed, and no report looks at it.
    evaluations = [path for path in study.glob(f"{RUNS}/*/*/{EVALUATIONS}/*/*") if path.parent.name != "val-step-0"]
    for file in sorted([*kept, *evaluations]):
        content = file.read_bytes()
        if file.suffix == ".jsonl":
            content = b"".join(map(packed_line, content.splitlines()))
        # Paths of this machine are left out; a run may have been taken from another study beside this one.
        content = content.replace(f"{study.absolute().parent}/".encode(), b"runs/studies/")
        yield file.relative_to(study).as_posix(), content


def packed_line(line: bytes) -> bytes:
    r"""A sample line with empty texts and no seed, and a reverse KL of four decimals: more of one answer are noise.

    Example:
        >>> packed_line(b'{"id": "1", "problem": "1+1", "response": "2", "seed": 7, "reverse_kl": 0.0123456789}')
        b'{"id": "1", "problem": "", "response": "", "seed": null, "reverse_kl": 0.0123}\n'
    """
    sample = json.loads(line) | LEFT_OUT
    if sample.get("reverse_kl") is not None:
        sample["reverse_kl"] = round(sample["reverse_kl"], 4)
    return json.dumps(sample).encode() + b"\n"


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2])) if sys.argv[2:] else report(Path(sys.argv[1]))
