"""Replays of several runs, as one table for the documentation."""

import csv
import doctest
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs/scripts/pool_replays.py"
NAMES = (
    "age",
    "gate",
    "statistic",
    "normalization",
    "tau",
    "effective_sample_size",
    "ungated_norm_ratio",
    "fresh_change",
    "fresh_cosine",
)

FRESH = 0.5  # a change at a step with fresh rollouts does not count


def write(run: Path, changes: list[float]) -> Path:
    """A replay with two gates; one of them changes the cosine by so much at each step after a fresh one."""
    (run / "replay").mkdir(parents=True)
    with (run / "replay" / "replay.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*NAMES, "fresh_ceiling"))
        for age, change in enumerate([FRESH, *changes]):
            writer.writerow((age, "none", "", "", "", 1.0, 1.0, 0.0, 0.5, 0.6))
            writer.writerow((age, "block64", "signed_mean", "mean", 5.0, 0.9, 0.7, change, 0.5 + change, 0.6))
    return run


def test_runs_are_what_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many steps of one run weigh no more than few of another: means of 0.02 and 0.06, not that of all steps."""
    runs = [write(tmp_path / "a", [0.01, 0.03, 0.02]), write(tmp_path / "b", [0.06])]
    monkeypatch.setattr("sys.argv", ["pool_replays.py", *map(str, runs)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 runs; cosine with the fresh gradient without a gate 0.500, ceiling 0.600"
    assert lines[-1] == "| block64 | signed_mean | mean | 5 | 0.90 | 0.70 | +0.040 ± 0.020 |"


@pytest.mark.parametrize("name", ["run_means", "spread"])
def test_examples(name: str) -> None:
    names = runpy.run_path(str(SCRIPT))
    (example,) = doctest.DocTestFinder().find(names[name], name, globs=names)
    assert doctest.DocTestRunner().run(example).failed == 0
