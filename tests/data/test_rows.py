"""Fields of rows: text and numbers, dotted names, chats; and files that are no text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import (
    ChatTemplate,
    CleaningConfig,
    JsonlProblems,
    Problem,
    ProblemSource,
    PromptDataModule,
    RawTemplate,
    TableProblems,
    prompt_set,
)
from opdlab.data.cleaning import clean
from opdlab.data.rows import RowProblems
from opdlab.errors import UsageError
from opdlab.policies import LanguageModel
from opdlab.toy import chain_tokenizer
from opdlab.types import Message
from tests.cli.test_fit import SMALL
from tests.data.test_prompts import CHAT
from tests.toy_run import STUDENT

USER = {"role": "user", "content": "86 a+7"}
# A row as verl's preprocessing writes it.
VERL: dict[str, Any] = {
    "data_source": "math_dapo",
    "prompt": [USER],
    "ability": "MATH",
    "reward_model": {"ground_truth": "93", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
VERL_FIELDS: dict[str, Any] = {
    "problem_field": "prompt",
    "answer_field": "reward_model.ground_truth",
    "id_field": "extra_info.index",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = chain_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def source(folder: Path, *rows: Any, **options: Any) -> JsonlProblems:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlProblems(str(path), **options)


def refusal(problems: ProblemSource) -> str:
    with pytest.raises(UsageError) as caught:
        list(problems.problems())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["72"], "is a list, but must be text or a finite number"),
        ({}, "is a dict, but must be text or a finite number"),
        ({"ground_truth": "72", "style": {"name": "rule"}}, "give one of its fields: a.ground_truth, a.style.name"),
        (True, "is a bool, but must be text or a finite number"),
        (float("nan"), "is nan, but must be text or a finite number"),
        (float("-inf"), "is -inf, but must be"),
    ],
)
def test_a_field_is_text_or_a_number(tmp_path: Path, value: Any, said: str) -> None:
    message = refusal(source(tmp_path, {"problem": "p", "a": "1"}, {"problem": "p", "a": value}, answer_field="a"))
    assert message.startswith(f"{tmp_path}/rows.jsonl, line 2: the field 'a' ")
    assert said in message
    assert "the field 'id' " in refusal(source(tmp_path, {"problem": "p", "answer": "1", "id": value}))
    if not isinstance(value, list):
        assert "the field 'problem' " in refusal(source(tmp_path, {"problem": value, "answer": "1"}))


def test_numbers_are_text(tmp_path: Path) -> None:
    rows = [{"problem": 10**400, "answer": value} for value in (7, -7.5, 10**400)]
    problems = list(source(tmp_path, *rows).problems())
    assert [problem.answer for problem in problems] == ["7", "-7.5", str(10**400)]


def test_dotted_names(tmp_path: Path) -> None:
    row = {"problem": "p", "a.b": "whole", "a": {"b": "inner", "c": {"d": 4, "e": None}}}
    for field, answer in {"a.b": "whole", "a.c.d": "4"}.items():
        assert [problem.answer for problem in source(tmp_path, row, answer_field=field).problems()] == [answer]
    assert "the field 'a.c.e' is null" in refusal(source(tmp_path, row, answer_field="a.c.e"))
    missing = refusal(source(tmp_path, row, answer_field="a.c.x"))
    assert missing.endswith(
        "line 1, has no field 'a.c.x'; did you mean 'a.c.e'? its fields: problem, a.b, a.c.d, a.c.e; give one of them"
    )
    assert "has no field 'problem.x'" in refusal(source(tmp_path, row, answer_field="problem.x"))


def test_a_message_names_the_first_fields_only(tmp_path: Path) -> None:
    row = {f"f{number}": number for number in range(25)}
    assert refusal(source(tmp_path, row)).endswith(
        "its fields: " + ", ".join(f"f{n}" for n in range(20)) + ", …; give one of them"
    )


def test_a_row_that_is_nested_deeply_is_one_line(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(700):  # JSON still reads it
        deep = {"a": deep}
    said = "rows.jsonl, line 2: a field is nested too deeply"
    assert refusal(source(tmp_path, {"p": "1"}, {"q": deep}, problem_field="p", answer_field=None)).endswith(said)


def test_rows_of_verl_train_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    problem = Problem("9a9b6eb4", "86 a+7", "93", (Message("user", "86 a+7"),))
    datasets.Dataset.from_list([VERL]).to_parquet(tmp_path / "train.parquet")
    table = TableProblems(str(tmp_path / "train.parquet"), **VERL_FIELDS)
    for problems in (source(tmp_path, VERL, **VERL_FIELDS), table):
        assert list(problems.problems()) == [problem]
        (prompt,) = prompt_set(problems, tokenizer, 100).prompts
        assert tokenizer.decode(prompt.tokens) == ":86 a+7\n"


def test_a_run_trains_and_evaluates_on_rows_of_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = LanguageModel(STUDENT)
    student.tokenizer.chat_template = CHAT
    student.save(tmp_path / "student")
    rows = [{**VERL, "prompt": [{**USER, "content": f"{n} a+7"}], "extra_info": {"index": str(n)}} for n in range(12)]
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    verifier = {"verifier": {"class_path": "opdlab.verifiers.BoxedVerifier"}}
    options: dict[str, Any] = {"path": "rows.parquet", **VERL_FIELDS, **verifier}
    train, held_out = (
        {"class_path": "opdlab.data.TableProblems", "init_args": {**options, **part}}
        for part in ({"limit": 8}, {"offset": 8})
    )
    data = {"train": train, "benchmarks": {"verl": held_out}}
    Path("rows.yaml").write_text(yaml.safe_dump(yaml.safe_load(SMALL) | {"data": yaml.safe_load(SMALL)["data"] | data}))
    command = ["fit", "-c", "quickstart", "-c", "rows.yaml", "--model.student.path", "student"]
    assert main([*command, "--trainer.default_root_dir", "runs", "--model.evaluation.samples", "samples"]) == 0
    lines = [
        json.loads(line) for file in Path("samples").rglob("verl-0.jsonl") for line in file.read_text().splitlines()
    ]
    assert {(line["id"], line["problem"], line["gold"]) for line in lines} == {
        (str(n), f"{n} a+7", "93") for n in range(8, 12)
    }


def test_a_chat_keeps_its_turns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    system, answer = {"role": "system", "content": "d"}, {"role": "assistant", "content": "5", "tool_calls": None}
    again = {"role": "user", "content": "1 b*2"}
    rows = [
        {"messages": turns} for turns in ([USER], [USER, answer], [system, USER, answer, again], [USER, answer, again])
    ]
    options = {"problem_field": "messages", "answer_field": None}

    def decoded(**template: Any) -> list[str]:
        prompts = prompt_set(source(tmp_path, *rows, **options, **template), tokenizer, 100).prompts
        return [tokenizer.decode(prompt.tokens) for prompt in prompts]

    assert decoded() == [":86 a+7\n", ":86 a+7\n", "=d:86 a+7:5:1 b*2\n", ":86 a+7:5:1 b*2\n"]
    # The template's system message is for rows without one; the suffix goes to the last turn.
    assert decoded(template=ChatTemplate(system="k", suffix="+3")) == [
        *("=k:86 a+7+3\n", "=k:86 a+7+3\n", "=d:86 a+7:5:1 b*2+3\n", "=k:86 a+7:5:1 b*2+3\n"),
    ]
    # Rows are told apart by all of their turns.
    problems = list(source(tmp_path, *rows, **options).problems())
    assert [problem.text for problem in problems] == ["86 a+7", "86 a+7", "1 b*2", "1 b*2"]
    assert len({problem.id for problem in problems}) == 3
    kept, report = clean(problems, CleaningConfig(), {})
    assert (list(kept), report.duplicate) == ([problems[0], *problems[2:]], 1)
    with pytest.raises(UsageError, match="template is RawTemplate, which takes plain text, but the problems are lists"):
        decoded(template=RawTemplate())


def test_texts_and_chats_in_one_file_keep_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"problem": "1"}, {"problem": [USER]}, {"problem": "2"}]
    prompts = prompt_set(source(tmp_path, *rows, answer_field=None), tokenizer, 100).prompts
    assert [tokenizer.decode(prompt.tokens) for prompt in prompts] == ["1", ":86 a+7\n", "2"]


class TupleRows(RowProblems):
    """A source of one's own, whose lists are tuples."""

    name = "mine"

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield 1, {"problem": (USER,)}


def test_a_chat_may_be_a_tuple() -> None:
    (problem,) = TupleRows(answer_field=None).problems()
    assert problem.messages == (Message("user", "86 a+7"),)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "the field 'problem' ends with no message, but its last message must be the user's"),
        (["86 a+7"], "the field 'problem.0' is a str, but must have role and content"),
        ([USER, {"role": "user"}], "the field 'problem.1' is no message: its content is missing, but must be text"),
        ([{"role": 1, "content": "x"}], "its role is a int, but must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "its content is a list, but must be text"),
        ([{**USER, "tool_calls": [1]}], "has tool_calls, but a message has role and content only"),
        ([USER, {"role": "tool", "content": "x"}], "ends with a message of the role 'tool'"),
    ],
)
def test_lists_that_are_no_chat(tmp_path: Path, messages: Any, said: str) -> None:
    assert said in refusal(source(tmp_path, {"problem": messages, "answer": "1"}))


def test_a_template_that_raises_is_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{{ raise_exception('System role not supported\n') if messages[0].role == 'system' }}" + CHAT
    )
    rows = [{"messages": turns} for turns in ([USER], [{"role": "system", "content": "d"}, USER])]
    options = {"problem_field": "messages", "answer_field": None}
    with pytest.raises(UsageError) as caught:
        prompt_set(source(tmp_path, *rows, **options), tokenizer, 100)
    assert str(caught.value).startswith(
        "the student's chat template refuses the problem '86 a+7', messages of system, user: System role not supported;"
    )
    assert len(prompt_set(source(tmp_path, rows[0], **options), tokenizer, 100)) == 1
    tokenizer.chat_template = "{{ messages[0].content.nothing() }}"
    with pytest.raises(UsageError, match="refuses the problem '86 a\\+7', messages of user: 'str object' has no"):
        prompt_set(source(tmp_path, rows[0], **options), tokenizer, 100)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="lists of messages, but the student's tokenizer has no chat template"):
        prompt_set(source(tmp_path, *rows, **options), tokenizer, 100)


def test_repeated_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": id_, "problem": f"{number} a+1", "answer": "1"} for number, id_ in enumerate(["x", "y", "x", "x"])]
    kept, report = clean(source(tmp_path, *rows).problems(), CleaningConfig(), {})
    assert ([problem.text for problem in kept], report.same_id, report.kept) == (["0 a+1", "1 a+1"], 2, 2)
    assert "2 with the id of another, 2 kept" in str(report)
    kept, report = clean(source(tmp_path, *rows).problems(), CleaningConfig(deduplicate=False), {})
    assert (len(kept), report.same_id) == (4, 0)
    with pytest.warns(UserWarning, match=r"train: 2 problems from .*rows.jsonl have the id of an earlier one"):
        PromptDataModule(source(tmp_path, *rows)).prepare(chain_tokenizer(), training=True)
    described = {"class_path": "opdlab.data.JsonlProblems", "init_args": {"path": "rows.jsonl"}}
    Path("rows.yaml").write_text(json.dumps({"data": {"benchmarks": {"mine": described}}}))
    assert main(["validate", "-c", "quickstart", "-c", "rows.yaml"]) == EXIT_USAGE
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opdlab: error:")]
    assert "data.benchmarks.mine has the id 'x' more than once (rows.jsonl)" in line
