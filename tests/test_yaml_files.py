"""Reading YAML: each mistake is one line with file and line number."""

import contextlib
import random
from pathlib import Path

import pytest

from opdlab.errors import UsageError
from opdlab.yaml_files import load_yaml, read_yaml

EXPANDS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 10)}]\n" for before, key in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "line 4: the key 'c' stands in lines 3 and 4: keep one of the two"),
        ("a: 1\n'a': 2\n", "line 2: the key 'a' stands in lines 1 and 2: keep one of the two"),
        ("a: [1, 2\n", "line 2, is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a:\n\tb: 1\n", "line 2, is not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: *c\n", "line 2, is not YAML: found undefined alias 'c'"),
        ("a: 1\n--- 2\n", "line 2, is not YAML: but found another document"),
        ("a: !!python/object:os.system x\n", "line 1, is not YAML: could not determine a constructor"),
        ("a:\n- !!bool x\n", "line 2: its value cannot be read"),
        ("a: " + "1" * 5000, "line 1: its value cannot be read"),
        ("[" * 5000, "line 1: it nests values more than 50 levels deep"),
        ("a: " * 60, "line 1, is not YAML: mapping values are not allowed here"),
        ('a: 1\nb: "\\ud800"\n', "line 2: it has half a surrogate pair, \\ud800: leave it out"),
        ('a: "\\e[31mred"\n', "line 1: it has the control character \\x1b: leave it out"),
        ("a: 1\nb: \x07\n", "line 2: it has the control character \\x07: leave it out"),
    ],
)
def test_a_mistake_has_file_and_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml, {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [EXPANDS, "a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_aliases_that_expand_without_end(text: str) -> None:
    with pytest.raises(UsageError, match=r"^my.yaml has aliases \(\*name\) that expand to too many values"):
        load_yaml(text, "my.yaml")


def test_merge_keys_repeat_nothing() -> None:
    text = "base: &base {x: 1, y: 2}\nmore: &more {<<: *base, y: 3}\nlast: {<<: [*more, *base], <<: *base, x: 4}\n"
    assert load_yaml(text, "my.yaml")["last"] == {"x": 4, "y": 2}
    assert load_yaml(text, "my.yaml")["more"] == {"x": 1, "y": 3}


def test_plain_values_stay_what_they_are() -> None:
    assert load_yaml("a: 2020-01-01\nb: 1.5\nc: null\nd: .nan\n? e\n: [x]\n", "my.yaml").keys() == set("abcde")
    assert load_yaml("a: 2020-01-01", "my.yaml") == {"a": "2020-01-01"}
    assert load_yaml("", "my.yaml") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: \xff\xfe\n", "line 2, is not text in UTF-8: give a YAML file in that encoding"),
        ("a: 1\n".encode("utf-16"), "line 1, is not text in UTF-8: give a YAML file in that encoding"),
        ("a: 1\n".encode("utf-16-le"), "line 1: it has the control character \\x00: leave it out"),
        (None, "cannot be read (No such file or directory): give a YAML file"),
    ],
)
def test_a_file_that_is_not_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "my.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_yaml(file)
    assert str(caught.value).removeprefix(str(file)).lstrip(", ") == message


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("a: 1\n", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "my.yaml") == {"a": 1}


@pytest.mark.parametrize("seed", range(50))
def test_random_bytes_are_refused_or_read(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    few = bytes(generator.choice(b"{}[]:,-?&*!|>'\"%@`#\n\t ab1\x80\xff") for _ in range(60))
    for content in (generator.randbytes(200), few):
        (tmp_path / "my.yaml").write_bytes(content)
        with contextlib.suppress(UsageError):
            read_yaml(tmp_path / "my.yaml")
            continue
        with pytest.raises(UsageError) as caught:
            read_yaml(tmp_path / "my.yaml")
        assert str(caught.value).startswith(str(tmp_path))
        assert len(str(caught.value).splitlines()) == 1
