"""The table at the end of a run, on a narrow console."""

import pytest

from opdlab.callbacks import EvaluationTable


def filled(teachers: list[str]) -> EvaluationTable:
    """Return the table of a run with two benchmarks and some teachers."""

    def figures(mean: float) -> dict[str, float]:
        one = {"pass@1": mean, "pass@1_se": 0.0123, "pass@8": mean, "pass@8_se": 0.01, "length": 15234.5}
        one |= {"length_se": 133.25, "reverse_kl": 0.125}
        return {f"{name}/{key}": value for name in ("math500", "a_long_benchmark") for key, value in one.items()}

    made = EvaluationTable()
    made.before, made.after = figures(0.25), figures(0.5)
    made.teachers = {name: figures(0.75) for name in teachers}
    return made


@pytest.mark.parametrize("width", [80, 60, 200])
@pytest.mark.parametrize(
    "teachers",
    [["teacher"], ["teacher-math", "teacher-code"], ["teacher-math_expert", "teacher-code_expert", "teacher-general"]],
)
def test_no_cell_is_cut(
    width: int, teachers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    made = filled(teachers)
    made.print()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    heads = [[cell.strip() for cell in line.split("\u2503")[1:-1]] for line in lines if line.startswith("\u2503")]
    assert [name for head in heads for name in head[1:]] == ["before", "after", *teachers]
    assert {head[0] for head in heads} == {"metric"}
    assert len(heads) == 1 or width < 200
    found: dict[str, dict[str, str]] = {name: {} for head in heads for name in head[1:]}
    names: list[str] = []
    for line in lines:
        if line.startswith("\u2503"):
            names = heads.pop(0)[1:]
        elif line.startswith("\u2502"):
            key, *cells = (cell.strip() for cell in line.split("\u2502")[1:-1])
            for name, cell in zip(names, cells, strict=True):
                found[name][key] = cell
    assert found == made.cells()
    assert found["after"]["a_long_benchmark/length"] == "15234.5 \u00b1 133.2"


def test_a_run_that_has_not_trained_has_one_column_for_the_student() -> None:
    (table,) = filled([]).tables(80, trained=False)
    assert [column.header for column in table.columns] == ["metric", "student"]


def test_a_resumed_run_has_the_last_evaluation_until_the_next() -> None:
    stopped, resumed = filled(["teacher"]), EvaluationTable()
    stopped.after_step = 20
    resumed.load_state_dict(stopped.state_dict())
    assert (resumed.cells(), resumed.after_step, resumed.is_new) == (stopped.cells(), 20, False)
