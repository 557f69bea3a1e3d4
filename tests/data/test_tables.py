"""Data sets read with ``datasets``, from folders: nothing here reaches a hub."""

import json
from pathlib import Path

import pytest

from opdlab.data import TableProblems
from opdlab.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"{n} + 1 = ?", "gold": str(n + 1)} for n in range(5)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_rows_become_problems(folder: Path) -> None:
    source = TableProblems(str(folder), problem_field="question", answer_field="gold", offset=1, limit=2)
    assert [(p.text, p.answer) for p in list(source.problems())] == [("1 + 1 = ?", "2"), ("2 + 1 = ?", "3")]
    assert source.name.endswith("data (train)")


def test_a_missing_field_names_those_that_exist(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no field 'problem'; its fields: question, gold"):
        list(TableProblems(str(folder)).problems())


def test_a_missing_split_or_data_set_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        list(TableProblems(str(folder), split="nowhere").problems())
    with pytest.raises(UsageError, match="cannot be loaded"):
        list(TableProblems(str(tmp_path / "nowhere")).problems())
