"""Prints the table of ``docs/gates/index.md``: what each gate makes of the example's eight rollouts."""

from example import NAMES, ROW, TAU, Example, load
from torch import Tensor

from opdlab.diagnostics import step_metrics, step_record

METRICS = ("gate/min", "gate/max", "gate/std", "gate/effective_sample_size")


def table(example: Example) -> list[str]:
    """One line of Markdown for each gate."""
    return [_line(example, name) for name in NAMES]


def _line(example: Example, name: str) -> str:
    hard, mild = (_metrics(example, name, tau) for tau in (TAU, 1.0))
    segments = int(example.gates(name).segment_ids[ROW].max()) + 1
    cells = [f"{hard[metric].item():.2f} ({mild[metric].item():.2f})" for metric in METRICS]
    return f"| `{name}` | {segments} | {' | '.join(cells)} |"


def _metrics(example: Example, name: str, tau: float) -> dict[str, Tensor]:
    return step_metrics(step_record(example.inputs, example.gates(name, tau=tau)))


if __name__ == "__main__":
    print(*table(load()), sep="\n")
