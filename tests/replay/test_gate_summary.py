"""The table of gates on a narrow console."""

import io

import pytest
from rich.console import Console

from opdlab.replay.comparison import ReplayedStep, Row
from opdlab.replay.gate_summary import GateSummary, console_table, markdown, part_table, undefined


def summary(gate: str, own: bool = False) -> GateSummary:
    return GateSummary((gate, "signed_mean", "mean", "20"), own, 8, 0.512, 1.25, 0.987, 0.654, 0.0123, 0.0045)


@pytest.mark.parametrize(
    ("gate", "width", "there", "missing"),
    [
        ("block64", 80, ["ESS", "norm", "ungated", "fresh", "change"], []),
        ("block:block_size=16", 80, ["ESS", "fresh", "change"], ["norm", "ungated"]),
        ("block:block_size=16,rho=0.9", 80, ["fresh", "change"], ["norm", "ungated"]),
        ("block:block_size=16,rho=0.9", 60, ["change"], ["norm", "ungated", "ESS", "fresh"]),
        ("block:block_size=16," * 4, 60, ["change"], ["norm", "ungated", "ESS", "fresh"]),
    ],
)
def test_the_deciding_columns_stay(gate: str, width: int, there: list[str], missing: list[str]) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None)  # a pipe
    console.print(console_table([summary(gate, own=True), summary("none")], width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "+0.012 ± 0.004" in text
    column = "".join(line.split("\u2502")[1].strip() for line in text.splitlines() if line.startswith("\u2502"))
    assert column.replace(" ", "").startswith(f"{gate}(therun)")  # a long name goes on in the next line
    head = next(line for line in text.splitlines() if "gate" in line)
    assert [name for name in there if name not in head] == []
    assert [name for name in missing if name in head] == []
    said = " ".join(text.split())
    assert not missing or f"All statistics and normalizations, and {', '.join(missing)}: replay.md." in said


def test_labels_are_shown_as_they_are() -> None:
    file = io.StringIO()
    Console(file=file, width=80, color_system=None).print(console_table([summary("a|[/]:bug:")], 80))
    assert "a|[/]:bug:" in file.getvalue()
    assert markdown([summary("a|[/]:bug:")]).splitlines()[-1].startswith(r"| a\|[/]:bug: | signed_mean | ")


def test_gates_without_a_gradient_at_a_stale_step_are_named() -> None:
    def step(number: int, age: float, change: float | None) -> ReplayedStep:
        key: Row = {"gate": "token", "statistic": "max", "normalization": "none", "tau": 5.0}
        return ReplayedStep(
            number, age, 0.0, 0.0, 0.0, 0.0, {}, [key | {"step": number, "fresh_change": change}], {}, 0
        )

    assert undefined([step(2, 0.0, None), step(4, 2.0, None), step(6, 2.0, 0.1)]) == {"token max none 5": "step 4"}
    assert undefined([step(4, 2.0, None), step(6, 2.0, None)]) == {"token max none 5": "steps 4, 6"}


def test_parts_are_averaged_over_stale_steps() -> None:
    """On fresh rollouts every gate on drift has weights of 1."""
    known: Row = {
        "objective": "o",
        "gate": "token",
        "statistic": "rms",
        "normalization": "mean",
        "tau": 5.0,
        "own": True,
    }
    names = ("position_share", "drift_size", "weight_mean", "weight_share", "gradient_norm", "fresh_projection")
    rows: list[Row] = [
        known | dict.fromkeys(names, value) | {"age": age, "part": "digit", "fresh_cosine": None}
        for age, value in ((0.0, 9.0), (1.0, 2.0), (3.0, 4.0))
    ]
    line = part_table(rows).splitlines()[-1]
    assert line == "| o | token (the run, statistic rms, normalization mean) | 5 | digit | 3 | 3 | 3 | 3 | 3 |  | 3 |"
    assert part_table(rows[:1]) == "No recorded step is stale."
