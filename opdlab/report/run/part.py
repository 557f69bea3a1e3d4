"""The part of a report that is about runs: evaluations, settings, curves, rollouts, how to repeat them."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlab.report.drawing import Picture, drawing, picture
from opdlab.report.files import Part, encoded, picture_files, table_files, template
from opdlab.report.run.figures import curves, histograms, positions
from opdlab.report.run.load import Evaluation, Run, load_runs
from opdlab.report.table import Table, csv_text

_ROLLOUTS = 2  # of each run
_CHARACTERS = 1500  # of a response
_VERDICTS = {None: "unchecked", True: "correct", False: "wrong"}
_PICTURES = (
    ("curves", curves, "Metrics by optimizer step; bars of evaluations are 95% intervals"),
    ("histograms", histograms, "Histograms of gate weights and drifts, early, in the middle and late"),
    ("positions", positions, "Divergence, entropy, teacher gap and weight along the response"),
)


def runs_part(paths: Sequence[Path]) -> Part:
    """Return what a report says of runs.

    Args:
        paths: folders of the runs.

    Raises:
        UsageError: a folder is not a run's, or a file in it is damaged.
    """
    runs = load_runs(paths)
    records = [record for run in runs for each in run.evaluations for record in _records(run, each)]
    differences = _differences(runs)
    pictures = _pictures(runs)
    content = picture_files(pictures)
    if records:
        content["tables/evaluations.csv"] = encoded(csv_text(records))
        content |= table_files("evaluations", _long_table(records))
    if differences is not None:
        content["tables/configuration.md"] = encoded(differences.markdown())
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    body = template("runs.html").render(
        title=title,
        runs=runs,
        evaluations=_wide_table(runs) if records else None,
        differences=differences,
        pictures=pictures,
        rollouts={run.name: _shown_rollouts(run) for run in runs if run.rollouts},
        guard={run.name: run.results.get("warnings") or [] for run in runs},
        facts={run.name: _facts(run) for run in runs},
    )
    return Part(title, body, content, [_sentence(run) for run in runs])


def _sentence(run: Run) -> str:
    """Return a line for the console: the first metric before, at the best and at the last evaluation."""
    found = run.evaluations
    if not found or not found[0].shown:
        return f"{run.name}: no evaluation"
    name = found[0].shown[0]
    cells = [f"{each.name} {each.figures[name]:.3f} (step {each.step})" for each in found if name in each.figures]
    return f"{run.name}: {name} {', '.join(cells)}"


def _records(run: Run, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the metrics of an evaluation, for CSV."""
    records = []
    for name in evaluation.shown:
        low, high = evaluation.bounds(name) or (float("nan"), float("nan"))
        benchmark, _, metric = name.partition("/")
        known = {"run": run.name, "evaluation": evaluation.name, "step": evaluation.step}
        known |= {"benchmark": benchmark, "metric": metric, "value": evaluation.figures[name]}
        records.append(known | {"low": low, "high": high})
    return records


def _long_table(records: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for row in records:
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if row["low"] == row["low"] else "-"
        names = (row["run"], row["benchmark"], row["metric"], row["evaluation"])
        rows.append((*names, str(row["step"]), f"{row['value']:.3f}", interval))
    return Table(("run", "benchmark", "metric", "evaluation", "step", "value", "95% interval"), rows, num_names=4)


def _wide_table(runs: Sequence[Run]) -> Table:
    """Return the table of the page: a row for each metric and run, a column for each evaluation."""
    evaluations = {run.name: {each.name: each for each in run.evaluations} for run in runs}
    columns = list(dict.fromkeys(["before", "best", "last", *(name for each in evaluations.values() for name in each)]))
    columns = [name for name in columns if any(name in each for each in evaluations.values())]
    metrics = dict.fromkeys(name for each in evaluations.values() for one in each.values() for name in one.shown)
    rows = []
    for metric in metrics:
        for run, found in evaluations.items():
            rows.append((metric, run, *(_cell(found.get(name), metric) for name in columns)))
    return Table(("metric", "run", *columns), rows, num_names=2)


def _cell(evaluation: Evaluation | None, name: str) -> str:
    if evaluation is None or name not in evaluation.figures:
        return "-"
    decimals = 1 if name.endswith("/length") else 3
    bounds = evaluation.bounds(name)
    interval = "" if bounds is None else f" [{bounds[0]:.{decimals}f}, {bounds[1]:.{decimals}f}]"
    return f"{evaluation.figures[name]:.{decimals}f}{interval}"


def _differences(runs: Sequence[Run]) -> Table | None:
    """Return the keys in which the configurations differ, a column for each run; None for a single run."""
    if len(runs) == 1:
        return None
    absent = object()
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [run.config.get(key, absent) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, *("-" if value is absent else str(value) for value in values)))
    return Table(("key", *(run.name for run in runs)), rows, num_names=len(runs) + 1)


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    made = []
    with drawing():
        for name, draw, alt in _PICTURES:
            figure = draw(runs)
            if figure is not None:
                made.append(picture(figure, name, alt))
    return made


def _shown_rollouts(run: Run) -> list[dict[str, str]]:
    """Return some rollouts of a run's last page: the most and the least drifted one."""
    assert run.rollouts is not None
    step, rollouts = run.rollouts
    chosen = [rollouts[0], rollouts[-1]][: min(_ROLLOUTS, len(rollouts))]
    shown = []
    for rollout in chosen:
        text = "".join(map(str, rollout.get("texts", ())))
        cut = f"{text[:_CHARACTERS]} … ({len(text) - _CHARACTERS} more characters)" if len(text) > _CHARACTERS else text
        about = [f"step {step}", _VERDICTS.get(rollout.get("correct"), "unchecked")]
        about += [f"mean |drift| {rollout.get('mean_drift', '?')}", f"stopped by {rollout.get('stop', '?')}"]
        about += [] if rollout.get("gold") is None else [f"gold answer {rollout['gold']}"]
        shown.append({"about": ", ".join(about), "prompt": str(rollout.get("prompt", "")), "response": cut})
    return shown


def _facts(run: Run) -> dict[str, str]:
    """Return how a run was made and how to repeat it, by name."""
    results = run.results
    found = {"command": f"opdlab fit -c {shlex.quote(str(run.folder.config))}"}
    found["state"] = str(results.get("state", "no results.json: it is running, or was killed"))
    for name in ("steps", "tokens", "seconds"):
        if isinstance(results.get(name), int | float):
            found[name] = f"{results[name]:,}"
    for name in ("seeds", "versions"):
        if isinstance(results.get(name), dict):
            found[name] = ", ".join(f"{key} {value}" for key, value in results[name].items())
    return found
