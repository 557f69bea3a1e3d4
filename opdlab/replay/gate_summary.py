"""Results of a replay for each gate over all recorded steps, as a table on the console, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from opdlab.files import replacing
from opdlab.replay.comparison import ReplayedStep, Row, Value
from opdlab.replay.parts import part_means
from opdlab.replay.variants import KEYS, has_papers_form


@dataclass(frozen=True)
class GateSummary:
    """Means of a gate over the recorded steps with stale rollouts.

    Args:
        key: gate, statistic, normalisation and tau; None if the gate has none.
        own: True for the gate that the run was trained with.
        num_steps: recorded steps.
        sample_size: mean effective sample size.
        norm_ratio: mean of |gradient| / |ungated gradient|.
        ungated_cosine: mean cosine with the ungated gradient.
        cosine: mean cosine with a fresh gradient.
        change: mean of ``cosine`` minus the ungated gradient's, paired by step.
        change_se: standard error of ``change`` over the steps; None with a single step.
    """

    key: tuple[str | None, ...]
    own: bool
    num_steps: int
    sample_size: float
    norm_ratio: float
    ungated_cosine: float
    cosine: float
    change: float
    change_se: float | None

    @property
    def is_paper(self) -> bool:
        """True if statistic and normalisation are the paper's, or the gate has none."""
        return has_papers_form(dict(zip(KEYS, self.key, strict=True)))


def summarise(
    steps: Sequence[ReplayedStep], gates: Collection[str] | None = None, reference: str = "fresh"
) -> list[GateSummary]:
    """Return averages over the steps with stale rollouts; on fresh ones every gate on drift has weights of 1.

    Args:
        steps: of one replay.
        gates: names of those to return; None for all.
        reference: ``fresh`` or ``other``.

    Returns:
        A summary for each gate whose gradient is never zero, in the order of the rows.
    """
    stale, groups = _of_stale(steps, gates)
    means = ("effective_sample_size", "ungated_norm_ratio", "ungated_cosine")
    names = [*means, f"{reference}_cosine", f"{reference}_change"]
    summaries = []
    for key, rows in groups.items():
        if len(rows) < len(stale) or any(row[f"{reference}_change"] is None for row in rows):
            continue
        values = np.array([[row[name] for name in names] for row in rows], dtype=float)
        error = float(values[:, -1].std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else None
        labels = tuple(None if part is None else _text(part) for part in key)
        own = any(row["own"] for row in rows)
        size, norm, ungated, cosine, change = values.mean(0).tolist()
        summaries.append(GateSummary(labels, own, len(rows), size, norm, ungated, cosine, change, error))
    return summaries


def undefined(steps: Sequence[ReplayedStep], reference: str = "fresh") -> dict[str, str]:
    """Return the gates without a summary, and the stale steps at which their gradient, or a fresh one, is zero."""
    found = {}
    for key, rows in _of_stale(steps, None)[1].items():
        if numbers := [str(row["step"]) for row in rows if row[f"{reference}_change"] is None]:
            name = " ".join(_text(part) for part in key if part is not None)
            found[name] = f"step{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
    return found


def _of_stale(
    steps: Sequence[ReplayedStep], gates: Collection[str] | None
) -> tuple[list[ReplayedStep], dict[tuple[Value, ...], list[Row]]]:
    """Return the steps with stale rollouts, and their rows by gate."""
    stale = [step for step in steps if step.age > 0]
    groups: dict[tuple[Value, ...], list[Row]] = {}
    for step in stale:
        for row in shown(step.rows, gates):
            groups.setdefault(tuple(row[name] for name in KEYS), []).append(row)
    return stale, groups


def _text(part: Value) -> str:
    return f"{part:g}" if isinstance(part, float) else str(part)


_COLUMNS = (
    *("gate", "statistic", "normalization", "tau", "effective sample size", "norm / ungated", "cosine with ungated"),
    *("cosine with fresh", "change"),
)
_SHORT = ("gate", "tau", "ESS", "norm", "ungated", "fresh", "change")
_LEAST_DECIDING = ("norm", "ungated", "ESS", "fresh")
_MEANINGS = {
    "": "Means over stale steps.",
    "ESS": "ESS: effective sample size.",
    "norm": "norm: of the gradient, over that of the ungated one.",
    "ungated": "ungated: cosine with the ungated gradient.",
    "fresh": "fresh: cosine with a fresh gradient.",
    "change": "change: of the cosine with a fresh gradient, from that without a gate, paired by step, ± standard error "
    "over the steps.",
}


def _cells(summary: GateSummary) -> list[str]:
    gate, *options = summary.key
    change = f"{summary.change:+.3f}" + ("" if summary.change_se is None else f" ± {summary.change_se:.3f}")
    metrics = (summary.sample_size, summary.norm_ratio, summary.ungated_cosine, summary.cosine)
    return [
        f"{gate}{' (the run)' if summary.own else ''}",
        *(option or "" for option in options),
        *(f"{metric:.3f}" for metric in metrics),
        change,
    ]


def console_table(summaries: Sequence[GateSummary], width: int) -> Table:
    """Return the table of the gates with the paper's statistic and weights of mean 1, and of the run's own gate.

    Columns that do not fit are left out, those first that decide least; gate, tau and change stay.

    Args:
        summaries: of the gates.
        width: of the console, characters.
    """
    rows = []
    for summary in summaries:
        if summary.is_paper or summary.own:
            gate, _, _, *rest = _cells(summary)
            rows.append(dict(zip(_SHORT, (gate, *rest), strict=True)))
    names, left_out = list(_SHORT), []
    for name in _LEAST_DECIDING:
        if _width(names, rows) > width:
            names.remove(name)
            left_out.append(name)
    caption = " ".join(_MEANINGS[name] for name in ("", *names) if name in _MEANINGS)
    missing = f", and {', '.join(left_out)}" if left_out else ""
    caption += f" All statistics and normalizations{missing}: replay.md."
    table = Table(title="Gated gradients of stale rollouts", caption=caption, caption_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in KEYS else "right", no_wrap=name != "gate", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in names))
    return table


def _width(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> int:
    """Return the characters that a table takes, with lines and the spaces beside them."""
    return 1 + sum(3 + max(map(cell_len, (name, *(row[name] for row in rows)))) for name in names)


def shown(rows: Iterable[Row], gates: Collection[str] | None) -> list[Row]:
    """Return the rows of some gates; of all with None. Those of no gate and of the run's own are always computed."""
    return [row for row in rows if gates is None or row["gate"] in gates]


def write_rows(path: Path, rows: Sequence[Row], columns: Iterable[str]) -> None:
    """Write rows as CSV; undefined values are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def markdown(summaries: Sequence[GateSummary]) -> str:
    """Return all summaries as a table, the largest change first."""
    return _table(_COLUMNS, map(_cells, sorted(summaries, key=lambda summary: -summary.change)))


def step_table(steps: Sequence[ReplayedStep]) -> str:
    """Return the steps as Markdown: age, losses, the ungated gradient, and the ceiling."""
    names = ("step", "age", "loss, recorded", "loss, replayed", "gradient norm", "ungated cosine with fresh", "ceiling")
    rows = []
    for step in steps:
        cosine, error = (step.rows[0][f"fresh_cosine{end}"] for end in ("", "_se"))
        shown = f"{cosine:.3f} ± {error:.3f}" if isinstance(cosine, float) and isinstance(error, float) else ""
        losses = (repr(step.recorded_loss), repr(step.replayed_loss))
        norm, ceiling = f"{step.replayed_norm:.4g}", f"{step.ceilings['fresh']:.3f}"
        rows.append((str(step.number), f"{step.age:g}", *losses, norm, shown, ceiling))
    return _table(names, rows)


def objective_table(steps: Sequence[ReplayedStep], gates: Collection[str] | None = None) -> str:
    """Return the means over the steps of each objective under each gate of the paper's form, as Markdown."""
    names = ("loss", "gradient_norm", "effective_sample_size", "run_cosine", "fresh_cosine")
    groups: dict[tuple[Value, ...], list[Row]] = {}
    for row in (row for step in steps for part in (step.rows, *step.others.values()) for row in shown(part, gates)):
        if has_papers_form(row):
            groups.setdefault((row["objective"], row["gate"], row["tau"]), []).append(row)
    rows: list[Sequence[str]] = []
    for key, found in groups.items():
        means = []
        for name in names:
            values = [value for row in found if isinstance(value := row[name], float)]
            means.append(f"{np.mean(values):.4g}" if values else "")
        labels = ("" if part is None else f"{part:g}" if isinstance(part, float) else str(part) for part in key)
        rows.append((*labels, *means))
    titles = ("loss", "gradient norm", "effective sample size", "cosine with the run's objective", "cosine with fresh")
    return _table(("objective", "gate", "tau", *titles), rows)


def part_table(rows: Sequence[Row]) -> str:
    """Return the means over the stale steps of each gate in each part of the responses, as Markdown."""
    names = (
        *("position_share", "drift_size", "weight_mean", "weight_share"),
        *("gradient_norm", "fresh_cosine", "fresh_projection"),
    )
    groups: dict[tuple[Value, ...], list[Row]] = {}
    for row in rows:
        if isinstance(age := row["age"], float) and age > 0:
            groups.setdefault((row["objective"], row["own"], *(row[name] for name in KEYS)), []).append(row)
    lines: list[Sequence[str]] = []
    for (objective, own, gate, statistic, normalization, tau), found in groups.items():
        form = ["the run"] if own else []
        if not has_papers_form(found[0]):
            given = ("statistic", statistic), ("normalization", normalization)
            form += [f"{name} {value}" for name, value in given if value is not None]
        label = f"{gate} ({', '.join(form)})" if form else str(gate)
        labels = str(objective), label, f"{tau:g}" if isinstance(tau, float) else str(tau or "")
        for part, means in part_means(found, names).items():
            lines.append((*labels, part, *(f"{means[name]:.3g}" if name in means else "" for name in names)))
    titles = (
        *("share of positions", "mean size of drift", "mean weight", "share of weight"),
        *("gradient norm", "cosine with fresh", "along fresh"),
    )
    return _table(("objective", "gate", "tau", "part", *titles), lines) if lines else "No recorded step is stale."


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown, in which a bar in a cell does not end it."""
    lines = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *lines))
