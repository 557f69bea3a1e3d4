"""A report of folders of studies and runs."""

from pathlib import Path

from opdlab.errors import UsageError, require
from opdlab.report.files import PAGE, Part, Report, page
from opdlab.report.run.part import runs_part
from opdlab.report.study.part import study_part
from opdlab.run_folder import CONFIG, EXAMPLE
from opdlab.studies.schema import REPORT, STUDY


def make_report(*folders: Path, out: Path | None = None) -> Report:
    """Return the report of studies and runs: all variants of a study against their baselines, runs beside each other.

    The report has ``report.html``, which needs no other file; ``report.md`` for a study alone; ``tables/`` as Markdown,
    CSV and LaTeX; ``figures/`` as PNG, SVG and PDF. Equal folders give equal files, byte for byte.

    Args:
        *folders: of studies or runs, at least one.
        out: output folder; ``report`` in the folder by default, or in the current one if there are several.

    Raises:
        UsageError: a folder is neither, or there is nothing to report.
    """
    require(bool(folders), f"give the folder of a run or a study, {EXAMPLE}")
    studies = [folder for folder in folders if (folder / STUDY).is_file()]
    runs = [folder for folder in folders if folder not in studies]
    for folder in runs:
        _check_run(folder)
    parts = [*map(study_part, studies), *([runs_part(runs)] if runs else [])]
    title = parts[0].title if len(parts) == 1 else f"{len(studies)} studies and {len(runs)} runs"
    content = {PAGE: page(title, [part.body for part in parts])}
    for number, part in enumerate(parts, 1):
        content |= part.files if len(parts) == 1 else _numbered(part, number)
    folder = out or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    own = out is None and len(folders) == 1
    return Report(folder, content, [line for part in parts for line in part.conclusion], own)


def _numbered(part: Part, number: int) -> dict[str, bytes]:
    """Return a part's tables and figures with its number before their names, which several parts may share."""
    named = {}
    for path, content in part.files.items():
        folder, _, name = path.rpartition("/")
        if folder:
            named[f"{folder}/{number}-{name}"] = content
    return named


def _check_run(folder: Path) -> None:
    """Raise if a folder is neither a run's nor a study's."""
    require(folder.is_dir(), f"'{folder}' is not a folder: give that of a run or a study, {EXAMPLE}")
    if not (folder / CONFIG).is_file():
        inside = sorted(folder.glob(f"version_*/{CONFIG}"), key=lambda file: file.stat().st_mtime_ns)
        hint = f"; did you mean {inside[-1].parent}?" if inside else f": give a folder {EXAMPLE}"
        raise UsageError(f"'{folder}' has neither {CONFIG} of a run nor {STUDY} of a study{hint}")
