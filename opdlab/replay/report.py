"""The results of a replay on disk: CSV, Markdown and pictures."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from opdlab.files import replacing
from opdlab.replay.charts import cosines_by_age, sample_sizes, save
from opdlab.replay.comparison import ReplayedStep
from opdlab.replay.gate_summary import (
    GateSummary,
    markdown,
    objective_table,
    part_table,
    shown,
    step_table,
    write_rows,
)
from opdlab.replay.parts import FIRST
from opdlab.replay.record import RecordedStep
from opdlab.replay.variants import UNGATED

FILES = ("replay.csv", "parts.csv", "replay.md", "cosine-*.*", "sample-size.*")
"""Names and patterns of the files of :func:`write_results`."""


def reproduction(steps: Sequence[ReplayedStep], records: Sequence[RecordedStep]) -> str:
    """Return a line that compares the losses replayed under the run's own gate with the recorded ones.

    Args:
        steps: the replayed steps.
        records: the records of the same steps.
    """
    equal = sum(step.recorded_loss == step.replayed_loss for step in steps)
    line = "under the run's own gate the recorded losses come out to the bit"
    if equal == len(steps):
        return f"{line}, at all of them"
    off = max(abs(step.replayed_loss - step.recorded_loss) / max(abs(step.recorded_loss), 1e-12) for step in steps)
    facts = records[0].facts
    return (
        f"{line} at {equal} of {len(steps)} steps; the largest relative difference is {off:.1e}. The run had "
        f"{facts.num_threads} threads on {facts.device}, precision {facts.precision}, torch {facts.torch_version}; "
        f"this replay has {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def write_results(
    out: Path,
    steps: Sequence[ReplayedStep],
    summaries: Sequence[GateSummary],
    about: Sequence[str],
    tau: float,
    gates: Collection[str] | None = None,
) -> None:
    """Write ``replay.csv``, ``replay.md`` and pictures, and ``parts.csv`` if the steps have parts.

    Args:
        out: an existing folder.
        steps: the replayed steps.
        summaries: of the gates over the steps.
        about: lines about the replay.
        tau: of the gates in the picture by age, per nat.
        gates: names of those in the tables; None for all.
    """
    rows = [row for step in steps for part in (step.rows, *step.others.values()) for row in shown(part, gates)]
    write_rows(out / "replay.csv", rows, steps[0].rows[0])
    # Parts have the ungated gradient and the run's own gate beside those that were asked for.
    parts = [
        row for step in steps for row in step.parts if gates is None or row["own"] or row["gate"] in {UNGATED, *gates}
    ]
    for earlier in (out / "parts.csv", *out.glob("cosine-other.*")):  # of a replay with further options
        earlier.unlink(missing_ok=True)
    if parts:
        write_rows(out / "parts.csv", parts, parts[0])
    num_stale = sum(step.age > 0 for step in steps)
    nothing = "No gate has a gradient at each of them." if num_stale else "No recorded step is stale."
    text = [
        "# Replay",
        "\n".join(f"- {line}" for line in about),
        "Gradients are those before clipping. Cosines with a fresh gradient are means over the draws; the ceiling is "
        "the mean cosine between two fresh gradients of the same student.",
        "## Steps",
        step_table(steps),
        "## Gates",
        f"Means over the {num_stale} steps whose rollouts are stale. Change: cosine "
        "with fresh less that of the ungated gradient, paired by step, ± its standard error over the steps. So many "
        f"gates ({len(summaries)}) are compared that the best of them looks better than it is: confirm it on steps of "
        "another run.",
        markdown(summaries) if summaries else nothing,
    ]
    if any(step.others for step in steps):
        text += [
            "## Objectives",
            "Means over all recorded steps, for gates of the paper's form. Each objective is compared with fresh "
            "gradients of its own. Losses of different objectives have different units and zeros.",
            objective_table(steps, gates),
        ]
    if parts:
        text += [
            "## Parts",
            "Means over the steps whose rollouts are stale, for the run's own gate and those of the paper's form. A "
            "part's gradient is that of its positions alone; along fresh: its component along the mean fresh gradient. "
            "The quarters of a response add up to the whole gradient, and so do the kinds of tokens; its first "
            f"{FIRST} tokens are also in those.",
            part_table(parts),
        ]
    with replacing(out / "replay.md") as file:
        file.write(("\n\n".join(text) + "\n").encode())
    charted = [  # the ungated gradient is drawn beside the others
        replace(
            step,
            rows=[step.rows[0], *shown(step.rows[1:], gates)],
            sample_sizes={name: sizes for name, sizes in step.sample_sizes.items() if gates is None or name in gates},
        )
        for step in steps
    ]
    for reference in steps[0].ceilings:
        save(cosines_by_age(charted, tau, reference), out, f"cosine-{reference}")
    save(sample_sizes(charted), out, "sample-size")
