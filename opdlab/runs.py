"""Read a run's folder in Python: curves, configuration, evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from opdlab.errors import require
from opdlab.run_folder import RunFolder, read_config, read_metrics, read_results

_EVALUATIONS = ("before", "after", "teacher")


@dataclass(frozen=True)
class Run:
    """What a run of ``opdlab fit`` has left in its folder.

    Args:
        folder: of the run.
        scalars: one row for each logged optimizer step, a column for each metric; NaN where a metric was not logged.
        table: metrics of the evaluations: a row for each metric, the columns ``before``, ``after`` and ``teacher``, or
            ``teacher-NAME`` for each of several teachers.
        errors: standard errors of ``table``, NaN where there is none.
        config: the configuration, as ``config.yaml`` has it; empty without that file.
        results: the content of ``results.json``; empty if the run was killed before it was written.
    """

    folder: Path
    scalars: pandas.DataFrame
    table: pandas.DataFrame
    errors: pandas.DataFrame
    config: dict[str, Any]
    results: dict[str, Any]


def load_run(folder: str | Path) -> Run:
    r"""Return the curves, the evaluations and the configuration of a run.

    Args:
        folder: of the run, ``ROOT/version_N``. The run may still be training.

    Raises:
        UsageError: the folder is not a run's, or a file in it is damaged. A row that a kill has cut off is left out.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.25\n")
        >>> load_run(folder).scalars["train/loss"].to_dict()
        {1: 0.5, 2: 0.25}
    """
    run = RunFolder(Path(folder))
    known = run.metrics.is_file() or run.results.is_file()
    inside = sorted(path.name for path in run.path.glob("version_*"))
    hint = f"give one of the runs in it: {', '.join(inside[-3:])}" if inside else "give ROOT/version_N of a run"
    require(known, f"folder is '{folder}', which has neither {run.metrics.name} nor {run.results.name}: {hint}")
    scalars = _scalars(run.metrics)
    results = read_results(run.results)
    columns = [name for name in results if name in _EVALUATIONS or name.startswith("teacher-")]
    figures = {name: results[name] for name in columns if results[name]}
    tables = [
        pandas.DataFrame(
            {name: {key: each.get(part) for key, each in found.items()} for name, found in figures.items()}
        )
        for part in ("value", "standard_error")
    ]
    config = read_config(run.config) if run.config.is_file() else {}
    table, errors = (frame.astype(float) for frame in tables)
    return Run(run.path, scalars, table, errors, config, results)


def _scalars(path: Path) -> pandas.DataFrame:
    """Return the rows of ``metrics.csv``, which may still grow, without one that a kill has cut off."""
    return pandas.DataFrame.from_dict(read_metrics(path), orient="index").rename_axis("step")
