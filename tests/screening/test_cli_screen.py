"""``opdlab screen`` through the command line, in this process."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.commands import EXIT_FAILED
from opdlab.screening import LIMITS, render_page, screen
from opdlab.screening.report import limits_text
from opdlab.toy import chain_problems
from tests.policies.tiny_models import CONFIGS, save_random
from tests.screening.pairs import SHORT, make_pair
from tests.test_viewer import byte_level
from tests.toy_run import STUDENT, TEACHER
from tests.viewer_pages import HOSTILE

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "screen.md"
PATHS = ["--student", STUDENT, "--teacher", TEACHER]
SMALL = ["--num_prompts", "3", "--num_samples", "1", "--max_new_tokens", "24"]


class Parts(HTMLParser):
    """Tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write_prompts(path: Path, answers: bool = True) -> Path:
    chains = islice(chain_problems("train", 0), 6)
    lines = [{"problem": each.prompt} | ({"answer": each.answer} if answers else {}) for each in chains]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["screen", *arguments]) == EXIT_USAGE
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def test_two_models_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "chains.jsonl")
    read: list[dict[str, Any]] = []
    for name in ("first", "second"):
        options = ["--prompts", str(prompts), "--verifier", "boxed", "--out", str(tmp_path / name)]
        assert main(["screen", *PATHS, *options, *SMALL]) == 0
        said = capsys.readouterr()
        assert re.search(r"\d+ bad, .*\d+ good, 2 not measured, in \d+ s; .*first|second/screen.html", said.out)
        assert "sampling: student, chains" in said.err  # progress
        read.append(json.loads((tmp_path / name / "screen.json").read_text()))
        del read[-1]["measurements"]["speed"]
    assert read[0] == read[1]
    assert read[0]["settings"]["num_prompts"] == 3
    order = [each["verdict"] for each in read[0]["checks"]]
    assert order[0] == "bad"  # the answers are cut off
    assert order[-1] == "not measured"
    assert read[0]["measurements"]["run"] == {"not_measured": "there is no configuration: give one with -c"}


def test_prompts_without_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "chains.jsonl", answers=False)
    assert main(["screen", *PATHS, "--prompts", str(prompts), "--out", str(tmp_path / "out"), *SMALL]) == 0
    shown = capsys.readouterr().out
    said = " ".join(shown.replace("│", " ").split())
    assert "prompts have no answers" in said
    assert "data.train" not in said
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith(("│", "┃")))


def test_repeated_problems_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "chains.jsonl"
    rows = [{"id": str(number), "problem": text, "answer": "1"} for number, text in enumerate(("1 a+7", "2 a+7") * 2)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["screen", *PATHS, "--prompts", str(prompts), "--out", str(tmp_path), *SMALL]
    with pytest.warns(UserWarning, match="left out, repeating an earlier one: 2 of 4 problems"):
        assert main(command) == 0
    assert json.loads((tmp_path / "screen.json").read_text())["measurements"]["accuracy"]["chains"]["num_problems"] == 2
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    capsys.readouterr()
    with pytest.warns(UserWarning, match="1 of 2 problems"):
        assert "chains.jsonl' has 1 problem to measure on" in refused(command[1:], capsys)


def test_prompts_that_are_too_long_are_counted(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "chains.jsonl", answers=False)
    with prompts.open("a") as file:
        file.write(json.dumps({"problem": "1" * 5000}) + "\n")
    command = ["screen", *PATHS, "--prompts", str(prompts), "--out", str(tmp_path), *SMALL]
    with pytest.warns(UserWarning, match="left out, having more than 4096 tokens: 1 of 7 prompts"):
        assert main(command) == 0


def test_a_benchmark_of_one_problem_has_no_verdict(tmp_path: Path) -> None:
    options = ["--data.train.num_problems", "8", "--data.benchmarks.toy.num_problems", "1", "--out", str(tmp_path)]
    assert main(["screen", "-c", "quickstart", *SMALL, *options]) == 0
    checks = {each["name"]: each for each in json.loads((tmp_path / "screen.json").read_text())["checks"]}
    assert checks["headroom:toy"]["verdict"] == "not measured"
    assert checks["headroom:toy"]["finding"].startswith("not measured: there is one problem only")
    assert checks["headroom:training"]["verdict"] != "not measured"


def test_lack_of_memory_names_the_options_of_a_screening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "chains.jsonl")
    options = ["--out", str(tmp_path), "--num_prompts", "2", "--max_new_tokens", "1000000000000000"]
    for given, models in (
        ([*PATHS, "--prompts", str(prompts)], "set --dtype to bfloat16"),
        (["-c", "quickstart"], "set model.student.dtype or model.teacher.dtype to bfloat16"),
    ):
        assert main(["screen", *given, *options]) == EXIT_FAILED
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("opdlab: error: out of memory on the host while sampling rollouts (")
        assert line.endswith(f": lower --batch_size or --max_new_tokens, {models}, or give smaller models")


def test_a_configuration(tmp_path: Path) -> None:
    options = ["--data.train.num_problems", "64", "--data.benchmarks.toy.num_problems", "4", "--out", str(tmp_path)]
    assert main(["screen", "-c", "quickstart", *SMALL, *options]) == 0
    found = json.loads((tmp_path / "screen.json").read_text())
    checks = {each["name"]: each for each in found["checks"]}
    assert {"headroom:training", "headroom:toy"} <= checks.keys()
    assert checks["memory"]["verdict"] == "good"
    assert checks["time"]["number"] > 0
    assert "TeacherTopK with K 32" in checks["objective"]["finding"]
    assert found["settings"]["temperature"] == 1.0
    assert found["settings"]["teacher"] == f"LocalTeacher {TEACHER}"


def test_wrong_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, empty, broken = write_prompts(tmp_path / "chains.jsonl"), tmp_path / "empty.jsonl", tmp_path / "b.jsonl"
    empty.write_text("\n")
    broken.write_text('{"problem": "86 a+7", "answer": "1"}\n{"problem": "86 a+7"}\n')
    config = CONFIGS["llama"]()
    config.vocab_size, config.eos_token_id, config.pad_token_id = 300, 0, 0
    other = str(save_random(tmp_path / "other", config, byte_level()))
    capsys.readouterr()
    single, blank, long = (tmp_path / f"{name}.jsonl" for name in ("single", "blank", "long"))
    single.write_text('{"problem": "86 a+7", "answer": "1"}\n')
    blank.write_text('{"problem": "86 a+7", "answer": "1"}\n{"problem": "8 a+7", "answer": "", "id": "b"}\n')
    long.write_text("".join(json.dumps({"problem": f"{digit}" * 5000}) + "\n" for digit in "12"))
    given, out = ["--prompts", str(prompts)], ["--out", str(tmp_path / "out")]
    for arguments, words in (
        ([], "give -c with a configuration such as quickstart, or --student, --teacher and --prompts"),
        ([*PATHS], "--prompts missing: give student, teacher and prompts"),
        ([*PATHS, *given, "-c", "quickstart"], "--student and -c are given: give one of them"),
        ([*PATHS, *given, "--model.gate", "none"], "--model.gate overrides a configuration, and there is none"),
        ([*PATHS, *given, "--num_promts", "3"], "did you mean '--num_prompts'"),
        ([*PATHS, *given, "--num_prompts", "1"], "num_prompts is 1, but must be at least 2"),
        ([*PATHS, *given, "--seed", "-1"], "seed is -1, but must lie between 0 and 4294967295"),
        ([*PATHS, *given, "--seed", str(2**32)], "seed is 4294967296, but must lie between 0 and 4294967295"),
        ([*PATHS, *given, "--num_samples", "0"], "num_samples is 0, but must be at least 1"),
        ([*PATHS, *given, "--temperature", "0"], "temperature is 0.0, but must be above 0"),
        ([*PATHS, *given, "--verifier", "guess"], "--verifier: invalid choice: 'guess'"),
        ([*PATHS, "--prompts", str(tmp_path / "no.jsonl")], "no.jsonl does not exist"),
        ([*PATHS, "--prompts", str(empty)], "empty.jsonl' has no rows"),
        ([*PATHS, "--prompts", str(broken)], "line 2, has no field 'answer'"),
        ([*PATHS, "--prompts", str(single)], "single.jsonl' has 1 problem to measure on, but a screening needs at"),
        ([*PATHS, "--prompts", str(blank)], "blank.jsonl': the 'answer' of problem 'b' is empty: give each problem"),
        ([*PATHS, "--prompts", str(long)], "long.jsonl': every prompt has more than 4096 tokens: give shorter ones"),
        (["-c", "quickstart", "--data.train.num_problems", "1"], "data.train (toy chains (train)) has 1 problem to"),
        ([*PATHS, *given, "--problem_field", "question"], "has no field 'question'"),
        ([*PATHS, *given, "--student", str(tmp_path / "nothing")], "nothing"),
        ([*PATHS, *given, "--teacher", other], "different vocabularies"),
        ([*PATHS, *given, "--chat"], "--chat is given, but the tokenizer of --student"),
        ([*PATHS, *given, "--answer_field", "anser"], "has no field 'anser'; did you mean 'answer'?"),
        (["-c", "no_such_file.yaml"], "no_such_file.yaml"),
        (["-c", "quickstart", "--model.teacher", "opdlab.evaluation.NoTeacher"], "model.teacher is NoTeacher"),
    ):
        assert words in refused([*arguments, *out], capsys), arguments
    assert "cannot be written to" in refused([*PATHS, *given, "--out", str(prompts)], capsys)


def test_the_page_stands_alone_and_escapes_text() -> None:
    result = screen(make_pair(), SHORT)
    checks = [replace(each, finding=text, mend=text) for each, text in zip(result.checks, HOSTILE, strict=False)]
    page = render_page(replace(result, checks=checks), {"student": "".join(HOSTILE)})
    parts = Parts()
    parts.feed(page)
    policy = next(fields["content"] for tag, fields in parts.tags if tag == "meta" and "content" in fields)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert [tag for tag, _ in parts.tags if tag in ("script", "style", "img", "link", "a")] == ["style", "script"]
    assert not [name for _, fields in parts.tags for name in fields if name.startswith(("on", "src", "href", "style"))]
    assert "window.hacked = 1" in parts.text
    assert len([tag for tag, _ in parts.tags if tag == "svg"]) == 5
    assert "light-dark(" in page


def test_the_documentation_has_the_limits() -> None:
    text = PAGE.read_text()
    for name, limits in LIMITS.items():
        line = f"| {limits.title} | `{name}` | {limits.unit} | {limits_text(limits)} | {limits.source} |"
        assert line in text, line
