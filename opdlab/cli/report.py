"""``opdlab report``: one page about runs and studies, with tables and figures."""

from collections.abc import Sequence
from pathlib import Path

from opdlab.cli.commands import COMMANDS, PlainParser
from opdlab.errors import require
from opdlab.run_folder import EXAMPLE


def parser() -> PlainParser:
    """Return the parser of ``opdlab report``."""
    made = PlainParser(
        prog="opdlab report",
        description=f"{COMMANDS['report'].summary} Runs are shown beside each other; the variants of a study are "
        "compared with their baselines. Nothing that a configuration names is imported.",
        allow_abbrev=False,
    )
    made.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of runs and studies")
    made.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to; RUN/report, or report/ here if there are several folders"
    )
    return made


def report_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab report``, and return the exit code.

    Args:
        arguments: arguments after ``report``.

    Raises:
        UsageError: a folder is neither a run's nor a study's, or there is nothing to report.
    """
    require(bool(arguments), f"give the folder of a run or a study, {EXAMPLE}; see opdlab report --help")
    options = parser().parse_intermixed_args(arguments)  # folders may stand behind --out
    return write_report(options.folders, options.out)


def write_report(folders: Sequence[Path], out: Path | None = None) -> int:
    """Write the report of some folders, print its conclusion, and return the exit code.

    Args:
        folders: of runs and studies.
        out: output folder; None for the default.

    Raises:
        UsageError: see :func:`report_command`.
    """
    from opdlab.report import make_report  # here, because it imports matplotlib and scipy

    report = make_report(*folders, out=out)
    print(*report.conclusion, f"report: {report.write()}", sep="\n")
    return 0
