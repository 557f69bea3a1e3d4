"""Reading JSON Lines: each mistake is one line with file and line number."""

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
        (ROW + b"[1]\n", "line 2, is not JSON Lines: not an object"),
        (ROW + b'{"problem": ' + b"1" * 5000 + b"}\n", "line 2, is not JSON Lines: Exceeds the limit"),
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
