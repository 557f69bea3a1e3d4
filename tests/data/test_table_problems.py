"""Data sets read with ``datasets``, from files and folders, without any access to a hub."""

import csv
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opdlab.data import Problem, TableProblems
from opdlab.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"{n} + 1 = ?", "gold": str(n + 1)} for n in range(5)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def read(path: Path, **options: Any) -> list[Problem]:
    return list(TableProblems(str(path), **options).problems())


def test_rows_become_problems(folder: Path) -> None:
    source = TableProblems(str(folder), problem_field="question", answer_field="gold", offset=1, limit=2)
    assert [(p.text, p.answer) for p in source.problems()] == [("1 + 1 = ?", "2"), ("2 + 1 = ?", "3")]
    assert source.name.endswith("data (train)")


# Values that a reader that guesses types would turn into 7, null, 1.5, a date, True, a float, an empty value.
AWKWARD = ["007", "NA", "1.50", "2020-01-01", "true", "1e5", "nan", "None", "", " x ", 'a, "b"', "line\nline", "∀ε>0"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("value", AWKWARD)
def test_csv_values_stay_text(tmp_path: Path, suffix: str, as_folder: bool, value: str) -> None:
    file = tmp_path / "rows" / f"train{suffix}"
    file.parent.mkdir()
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([("id", "problem", "answer"), (value, value, value), ("1", "p", "2"), ("2", "q", "3.5")])
    first = read(file.parent if as_folder else file)[0]
    assert first == Problem(value, value, value)


def test_parquet(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"problem": ["a", "b"], "answer": [1, 2]}).to_parquet(tmp_path / "rows.parquet")
    assert [(p.text, p.answer) for p in read(tmp_path / "rows.parquet", limit=1)] == [("a", "1")]
    assert len({p.id for p in read(tmp_path / "rows.parquet", split="anything")}) == 2


def test_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"id": 3, "problem": "a", "answer": "007"}]))
    assert read(tmp_path / "rows.json") == [Problem("3", "a", "007")]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    # A row beyond the first ten thousand, which are read together, is broken.
    (tmp_path / "rows.csv").write_text("problem,answer\n" + "a,1\n" * 10_000 + "a,1,2,3\n" * 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves a file open if it is not read to its end
        assert len(read(tmp_path / "rows.csv", limit=9_000)) == 9_000
        gc.collect()
    with pytest.raises(UsageError, match="cannot be loaded: check that it is .* saw 4"):
        read(tmp_path / "rows.csv")


def test_a_hub_data_set_is_streamed_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[dict[str, Any]] = []
    taken: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10**9):
            taken.append(number)
            yield {"problem": str(number), "answer": "1"}

    def load_dataset(**arguments: Any) -> Iterator[dict[str, str]]:
        calls.append(arguments)
        return rows()

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **_: type("Builder", (), {"config": object()}))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = TableProblems("someone/huge", "main", "test", "v1", streaming=True, offset=2, limit=3)
    assert [problem.text for problem in source.problems()] == ["2", "3", "4"]
    assert taken == [0, 1, 2, 3, 4]
    list(TableProblems("someone/small", limit=1).problems())
    expected = {"path": "someone/huge", "name": "main", "split": "test", "revision": "v1", "streaming": True}
    assert calls[0] == expected
    assert calls[1]["streaming"] is False


def test_rows_of_a_downloaded_data_set_are_read_again_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [
        {"problem": [{"role": "user", "content": f"{n}?"}], "answer": n, "extra": {"id": f"r{n}"}} for n in range(9)
    ]
    table = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **_: type("Builder", (), {"config": object()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: table)
    source = TableProblems("someone/small", id_field="extra.id", offset=2, limit=5)
    store = source.store()
    found = dict(store.scan())
    assert list(found) == [2, 3, 4, 5, 6]
    assert list(found.values()) == list(source.problems())
    assert store.read([6, 2]) == [found[6], found[2]]
    assert found[6].id == "r6"


def test_a_local_table_is_read_again_from_a_copy(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("problem,answer\na,007\nb,8\n")
    source = TableProblems(str(tmp_path / "rows.csv"))
    store = source.store()
    found = dict(store.scan())
    (tmp_path / "rows.csv").unlink()
    assert store.read(list(reversed(found))) == [Problem(p.id, p.text, p.answer) for p in reversed(found.values())]
    assert [p.answer for p in found.values()] == ["007", "8"]


def test_a_missing_field_names_those_that_exist(folder: Path) -> None:
    with pytest.raises(UsageError, match="row 1, has no field 'problem'; its fields: question, gold"):
        read(folder)


def test_a_missing_split_or_data_set_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded.*with the split 'nowhere'"):
        read(folder, split="nowhere")
    with pytest.raises(UsageError, match="cannot be loaded.*or download it and give the local file or folder as path"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b'{"problem": "a", "ans'),
        ("rows.csv", b'problem,answer\n1,2\n1,2,3\n"'),
        ("rows.csv", "problem,answer\né,1\n".encode("latin-1")),
        ("rows.csv", b""),
        ("rows.parquet", b""),
        ("rows.parquet", b"PAR1 no table PAR1"),
        ("rows.docx", b"text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}' cannot be loaded: check that it is a JSON, CSV or Parquet file"):
        read(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("rows.csv", "problem,answer\n"), ("rows.json", ""), ("a.jsonl", "\n")])
def test_files_without_rows_hold_no_problems(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name) == []


def test_a_hub_out_of_reach_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)\ndetails")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UsageError, match=r"give the local file or folder as path \(Couldn't reach .*Error\)\)$"):
        list(TableProblems("openai/gsm8k").problems())


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("problem,answer\nWhat is 1+1?,2,\n", "train.csv, line 2, has 3 fields, but the header has 2: put quotes"),
        ("problem,answer\n\nx\ny,2\n", "train.csv, line 3, has 1 fields, but the header has 2"),
        ('problem,answer\n"a\nb",1,2\n', "train.csv, line 2, has 3 fields"),
    ],
)
def test_a_first_row_unlike_the_header(tmp_path: Path, text: str, words: str, as_folder: bool) -> None:
    file = tmp_path / "rows" / "train.csv"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(file.parent if as_folder else file)
    assert words in str(caught.value)
    assert "cannot be loaded" not in str(caught.value)


@pytest.mark.parametrize("text", ["\ufeffproblem,answer\na,1\n", "problem,answer\n  \na,1\n", "problem,answer\r\na,1"])
def test_harmless_oddities_of_csv(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8", newline="")
    assert [(p.text, p.answer) for p in read(tmp_path / "rows.csv")] == [("a", "1")]


@pytest.mark.parametrize("name", ["train[1].csv", "x[1]/a*.csv", "UP.CSV", "UP.Tsv", "UP.JSONL", "UP.JSON"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rows" / name
    file.parent.mkdir(parents=True)
    sep = "\t" if name.endswith("Tsv") else ","
    (file.parent / "train1.csv").write_text("problem,answer\nwrong,1\n")
    json_text = json.dumps({"problem": "a", "answer": "007"}) + "\n"
    file.write_text(json_text if "JSON" in name else f"problem{sep}answer\na{sep}007\n")
    assert [(p.text, p.answer) for p in read(file)] == [("a", "007")]
