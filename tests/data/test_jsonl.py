"""Reading JSON Lines: each mistake is one line with file and line number."""

import os
import random
from pathlib import Path

import pytest

from opdlab.data import JsonlProblems
from opdlab.errors import UsageError

ROW = b'{"problem": "1 + 1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + b"\xff\xfe\n", "line 2, is not text in UTF-8: write the file in that encoding"),
        ((ROW * 2).decode().encode("utf-16"), "line 1, is not text in UTF-8: write the file in that encoding"),
        (ROW + b"\n" + b"[" * 100_000 + b"\n", "line 3, nests values too deeply: write it flatter"),
        (
            ROW + b'{"problem": "\\ud800", "answer": "2"}\n',
            "line 2: the field 'problem' has a lone surrogate, \\ud800: remove it",
        ),
        (ROW + b'{"problem": "\\UD800"}\n', "line 2, is not JSON Lines: Invalid \\escape"),
        (ROW + b"{\n", "line 2, is not JSON Lines: Expecting property name"),
        (ROW + b"[1]\n", "line 2, is not JSON Lines: it holds a list, but each line must hold an object"),
        (
            ROW + b'{"problem": ' + b"1" * 5000 + b"}\n",
            "line 2, has a number of more than 4300 digits: write the number as text",
        ),
        (
            ROW + b'{"problem": "1", "answer": "1", "answer": "2"}\n',
            'line 2, has the key "answer" more than once: keep one of them',
        ),
        (
            ROW + b'{"problem": [{"role": "user", "role": "user"}]}\n',
            'line 2, has the key "role" more than once: keep one of them',
        ),
    ],
)
def test_a_mistake_has_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(JsonlProblems(str(file)).problems())
    assert str(caught.value).startswith(f"{file}, {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_pair_of_surrogates_and_a_byte_order_mark_are_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"problem": "\\ud83d\\ude00", "answer": "2"}\n')
    assert [problem.text for problem in JsonlProblems(str(file)).problems()] == ["\N{GRINNING FACE}"]


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_refused(tmp_path: Path, seed: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(random.Random(seed).randbytes(200))
    with pytest.raises(UsageError, match=r"rows\.jsonl, line \d+, "):
        list(JsonlProblems(str(file)).problems())


def test_a_line_is_read_again_by_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + b"".join(b'{"problem": "%d \xc3\xa9", "answer": "2"}\r\n\n' % n for n in range(9))
    )
    source = JsonlProblems(str(file), offset=0, limit=8)
    store = source.store()
    found = dict(store.scan())
    assert list(found.values()) == list(source.problems())
    assert len(found) == 8
    keys = list(reversed(found))
    assert store.read(keys) == [found[key] for key in keys]


@pytest.mark.parametrize("content", [ROW * 4, ROW * 2 + ROW.replace(b"2", b"3")])
def test_a_file_that_changes_in_a_run_is_noticed(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROW * 3)
    store = JsonlProblems(str(file)).store()
    keys = [key for key, _ in store.scan()]
    assert len(store.read(keys)) == 3
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    with pytest.raises(UsageError, match=r"rows\.jsonl has changed since the run has read it"):
        store.read(keys[:1])


def test_a_file_that_takes_the_place_of_the_runs_does_not_matter(tmp_path: Path) -> None:
    file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    file.write_bytes(b'{"problem": "%s", "answer": "2"}\n' % (b"a" * 50_000) + ROW)
    other.write_bytes(b"[]")
    store = JsonlProblems(str(file)).store()
    found = dict(store.scan())
    other.replace(file)
    assert store.read(list(found)) == list(found.values())
    file.unlink()
    assert store.read(list(found)[1:]) == list(found.values())[1:]
