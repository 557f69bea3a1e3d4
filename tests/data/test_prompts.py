"""Problem files, templates and prompt sets."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import (
    Benchmark,
    ChatTemplate,
    CleaningConfig,
    JsonlProblems,
    Problem,
    ProblemSource,
    RawTemplate,
    prompt_set,
)
from opdlab.data.cleaning import clean
from opdlab.errors import UsageError
from opdlab.records import digest
from opdlab.toy import chain_tokenizer
from opdlab.types import prompts_at
from opdlab.verifiers import BoxedVerifier

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = [{"id": f"row-{i}", "problem": f"{i} a+{i}", "answer": str(2 * i)} for i in range(6)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return chain_tokenizer()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path, *map(json.dumps, ROWS))


def write(folder: Path, *lines: str) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[Problem]:
    return list(JsonlProblems(str(path), **options).problems())


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Listed(ProblemSource):
    """Problems from a list."""

    name = "the list"

    def __init__(self, texts: Sequence[str], answer: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.texts, self.answer = texts, answer

    def problems(self) -> list[Problem]:
        return [Problem(str(i), text, self.answer) for i, text in enumerate(self.texts)]


def test_rows(file: Path) -> None:
    expected = [Problem(row["id"], row["problem"], row["answer"]) for row in ROWS]
    assert read(file) == expected
    assert JsonlProblems(str(file)).name == str(file)


def test_other_fields(tmp_path: Path) -> None:
    path = write(tmp_path, '{"question": "1 a+1", "final": 2, "key": 0}', '{"question": "2 a+2", "key": null}')
    options = {"problem_field": "question", "id_field": "key"}
    first, second = read(path, answer_field=None, **options)
    assert first == Problem("0", "1 a+1", None)
    assert (second.text, second.answer) == ("2 a+2", None)
    assert read(path, answer_field="final", limit=1, **options)[0].answer == "2"


def test_a_verifier_needs_gold_answers(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="answer_field is null, but verifier needs gold answers: .* verifier to null"):
        JsonlProblems(str(file), answer_field=None, verifier=BoxedVerifier())
    with pytest.raises(UsageError, match=r"row 1 of the list \(id '0'\) has no gold answer, which the source's verif"):
        prompt_set(Listed(["1 a+1"], verifier=BoxedVerifier()), tokenizer, 99)
    assert len(prompt_set(Listed(["1 a+1"]), tokenizer, 99)) == 1


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"problem": "", "answer": "1"}, {}, "is an empty prompt: leave it out, or give a template"),
        ({"problem": "5 a+1 ", "answer": ""}, {}, "has no gold answer, which the source's verifier needs: give"),
        (
            {"problem": "5 a+1", "answer": "1", "hint": ""},
            {"teacher_text": "{hint}"},
            "is an empty prompt for the teacher: leave it out, or give a template",
        ),
    ],
)
def test_a_row_that_makes_no_prompt_is_named_by_its_line(
    tmp_path: Path, row: dict[str, str], options: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    good = json.dumps({"problem": "5 a+1", "answer": "1", "hint": "1"})
    path = write(tmp_path, good, "", good, json.dumps(row))
    sources: list[ProblemSource] = [JsonlProblems(str(path), offset=1, verifier=BoxedVerifier(), **options)]
    if not options:
        template, verifier = RawTemplate(), BoxedVerifier()
        sources.append(Benchmark("gsm8k", path=str(path), offset=1, template=template, verifier=verifier))
    for source in sources:
        with pytest.raises(UsageError, match=rf"^line 4 of {path} \(id '\w+'\) {said}"):
            prompt_set(source, tokenizer, 99, max_teacher_prompt_tokens=99)


def test_rows_without_an_id_are_named_by_their_text(tmp_path: Path) -> None:
    lines = [json.dumps({"problem": text, "answer": "1"}) for text in ("a", "b", "a")]
    first, second, third = (problem.id for problem in read(write(tmp_path, *lines)))
    assert first == third != second


@pytest.mark.parametrize(
    ("offset", "limit"), [(0, None), (0, 2), (2, None), (2, 3), (5, 4), (6, None), (9, 2), (0, 100)]
)
def test_limit_and_offset(file: Path, offset: int, limit: int | None) -> None:
    wanted = ROWS[offset:][:limit]
    assert [problem.id for problem in read(file, offset=offset, limit=limit)] == [row["id"] for row in wanted]


@pytest.mark.parametrize(("key", "value"), [("limit", 0), ("limit", -1), ("offset", -1)])
def test_bad_limit_and_offset(file: Path, key: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{key} is {value}"):
        JsonlProblems(str(file), **{key: value})


@pytest.mark.parametrize("text", ["2020-01-01", "12:30", "007", "1e5", "true", "NaN", "∀ε\u2028>0", "\\frac{1}{2}"])
def test_answers_come_back_as_written(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, json.dumps({"problem": text, "answer": text}), json.dumps({"problem": "p", "answer": "q"}))
    assert read(path)[0].answer == read(path)[0].text == text


def test_numbers_come_back_as_written(tmp_path: Path) -> None:
    numbers = ["72", "7.5", "123456789012345678901234567890"]
    path = write(tmp_path, *(f'{{"problem": "p", "answer": {number}}}' for number in numbers))
    assert [problem.answer for problem in read(path)] == numbers


def test_missing_field_names_what_there_is(file: Path) -> None:
    message = refusal(file, problem_field="problm")
    assert "'problm'; did you mean 'problem'?" in message
    assert "id, problem, answer" in message
    message = refusal(file, answer_field="gold_solution")
    assert "'gold_solution'; its fields" in message


@pytest.mark.parametrize("line", ['{"answer": "1"}', '{"problem": null, "answer": "1"}', '{"problem": "a"}'])
def test_a_later_row_without_a_value_is_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, json.dumps(ROWS[0]), "", line)
    assert "line 3" in refusal(path)
    assert len(read(path, limit=1)) == 1


@pytest.mark.parametrize("line", ['{"problem": "a", "answer"', "plain text", '["a", "b"]', '"a"', "{} {}"])
def test_broken_line_is_named(tmp_path: Path, line: str) -> None:
    message = refusal(write(tmp_path, json.dumps(ROWS[0]), json.dumps(ROWS[1]), line, json.dumps(ROWS[2])))
    assert "line 3, is not JSON Lines" in message


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    assert "line 1, is not text in UTF-8" in refusal(path)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing.jsonl")
    assert "does not exist" in refusal(tmp_path)


def test_a_file_in_a_folder_that_may_not_be_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stat = Path.stat

    def denied(path: Path, **options: Any) -> Any:  # for root, who runs some test machines, no folder is closed
        if path.is_relative_to("/closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    for option in ("--data.train=JsonlProblems --data.train.path", "--model.student.path"):
        assert main(["fit", "-c", "quickstart", *option.split(), "/closed/x.jsonl"]) == EXIT_USAGE
        assert "/closed/x.jsonl', which cannot be looked at (Permission denied)" in capsys.readouterr().err
        assert main(["fit", "-c", "quickstart", *option.split(), f"/{'x' * 300}.jsonl"]) == EXIT_USAGE
        assert ".jsonl', which cannot be looked at (File name too long)" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [(), ("",), ("", "  ", "")])
def test_file_without_rows(tmp_path: Path, lines: tuple[str, ...], tokenizer: PreTrainedTokenizerFast) -> None:
    source = JsonlProblems(str(write(tmp_path, *lines)))
    assert list(source.problems()) == []
    with pytest.raises(UsageError, match=r"problems\.jsonl holds no problems"):
        prompt_set(source, tokenizer, 100)


def test_offset_beyond_the_end_is_an_empty_source(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="holds no problems"):
        prompt_set(JsonlProblems(str(file), offset=6), tokenizer, 100)


@pytest.mark.parametrize(("prefix", "suffix"), [("", ""), ("7 ", ""), ("", "\n"), ("3 ", " b-1\n")])
def test_raw_template(prefix: str, suffix: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["86 a+7", "5 a*2"]
    tokens = RawTemplate(prefix, suffix).tokenize(texts, tokenizer)
    assert [tokenizer.decode(row) for row in tokens] == [f"{prefix}{text}{suffix}" for text in texts]


# Uses the toy vocabulary: ":" opens a turn, "=" marks the system's, "\n" asks for the answer.
CHAT = (
    "{% for m in messages %}{{ '=' if m.role == 'system' else ':' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}{% if enable_thinking is false %}{{ '*' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ":86 a+7\n"),
        ({"suffix": "+1"}, ":86 a+7+1\n"),
        ({"system": "d"}, "=d:86 a+7\n"),
        ({"system": "d", "suffix": "+1"}, "=d:86 a+7+1\n"),
        ({"enable_thinking": False}, ":86 a+7\n*"),
        ({"enable_thinking": True}, ":86 a+7\n"),
    ],
)
def test_chat_template(options: dict[str, Any], expected: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    tokens = ChatTemplate(**options).tokenize(["86 a+7", "5"], tokenizer)
    assert tokenizer.decode(tokens[0]) == expected
    assert tokenizer.decode(tokens[1]) == expected.replace("86 a+7", "5")


def test_chat_template_needs_one_on_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="has no chat template: use RawTemplate"):
        ChatTemplate().tokenize(["1"], tokenizer)


def test_prompt_set(tokenizer: PreTrainedTokenizerFast) -> None:
    verifier = BoxedVerifier()
    source = Listed(["1", "12345", "12", "123456", ""], template=RawTemplate(suffix=":"), verifier=verifier, answer="7")
    prompts = prompt_set(source, tokenizer, max_prompt_tokens=3)
    assert [prompt.problem.text for prompt in prompts.prompts] == ["1", "12", ""]
    assert [prompt.index for prompt in prompts.prompts] == [0, 1, 2]
    assert [tokenizer.decode(prompt.tokens) for prompt in prompts.prompts] == ["1:", "12:", ":"]
    assert (len(prompts), prompts.num_too_long) == (3, 2)
    assert prompts.verifier is verifier


def test_many_prompts_are_those_of_one_call(tokenizer: PreTrainedTokenizerFast) -> None:
    source = Listed(["1", "12345", "12", "123", "1", "12345", "7"] * 400)  # more than are tokenized at a time
    many = prompt_set(source, tokenizer, max_prompt_tokens=3)
    at_once = RawTemplate().tokenize(source.texts, tokenizer)
    assert [list(prompt.tokens) for prompt in many.prompts] == [row for row in at_once if len(row) <= 3]
    assert (len(many), many.num_too_long) == (2_000, 800)
    some = prompt_set(source, tokenizer, 3, problems=iter(source.problems()[2:4]))
    assert [prompt.problem.text for prompt in some.prompts] == ["12", "123"]


def test_prompts_made_on_demand_are_those_that_are_held(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{n % 700} a+{n % 3}" + " b-1" * (n % 2) for n in range(2500)]
    path = write(tmp_path, *(json.dumps({"problem": text, "answer": "1"}) for text in texts))
    source = JsonlProblems(str(path), teacher_text="{problem} c*{answer}")
    kept, _ = clean(source.store(), CleaningConfig(), {})
    lazy = prompt_set(source, tokenizer, 9, kept, 12)
    held = prompt_set(source, tokenizer, 9, list(kept), 12)
    assert 1024 < len(held) < len(kept) == 2100
    assert min(held.num_too_long, held.num_teacher_too_long) > 0
    assert list(lazy.prompts) == list(held.prompts)
    assert [lazy.prompts[i] for i in (5, -1, 0)] == [held.prompts[i] for i in (5, -1, 0)]
    for prompts in (lazy.prompts, held.prompts):  # many at a time, as a buffer takes them
        assert prompts_at(prompts, [5, 1024, 0, 5]) == [held.prompts[i] for i in (5, 1024, 0, 5)]
    assert (lazy.num_too_long, lazy.num_teacher_too_long) == (held.num_too_long, held.num_teacher_too_long)
    rows = [(prompt.problem.id, prompt.tokens, prompt.problem.answer) for prompt in held.prompts]
    assert lazy.facts.digest == held.facts.digest == digest(rows)
    assert lazy.facts.teacher_digest == digest([prompt.teacher_tokens for prompt in held.prompts])


def test_a_prompt_of_exactly_the_allowed_length_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_set(Listed(["123"]), tokenizer, 3).num_too_long == 0
    assert prompt_set(Listed(["123", "1"]), tokenizer, 2).num_too_long == 1


def test_all_prompts_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=r"max_prompt_tokens is 3, but every prompt of the list .* 4 tokens"):
        prompt_set(Listed(["1234", "12345"]), tokenizer, 3)


def test_empty_prompts_are_refused_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="empty"):
        prompt_set(Listed(["", ""]), tokenizer, 3)
    with pytest.raises(UsageError, match="empty"):
        prompt_set(Listed(["1", ""]), tokenizer, 3)


def test_empty_source(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="the list holds no problems"):
        prompt_set(Listed([]), tokenizer, 3)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("gsm8k_train", 7473), ("gsm8k_test", 1319), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40)],
)
def test_real_files(name: str, num_rows: int) -> None:
    path = REAL_DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this checkout")
    problems = read(path)
    assert len(problems) == num_rows
    assert len({problem.id for problem in problems}) == num_rows
    assert all(problem.text and problem.answer for problem in problems)
    assert problems[0].text == json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])["problem"]


def with_special(single: str, **special: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with a template of the special tokens that it adds to a text."""
    tokenizer = chain_tokenizer()
    tokenizer.add_special_tokens(special)
    names = [name for name in single.split() if name != "$A"]
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def test_a_stop_token_that_the_tokenizer_appends_is_left_out() -> None:
    plain = chain_tokenizer()
    texts = ["86 a+7", "1 a+1", ""]
    wanted = plain(texts)["input_ids"]
    assert RawTemplate().tokenize(texts, with_special("$A <eos>")) == wanted
    start = with_special("<bos> $A <eos>", bos_token="<bos>")
    assert RawTemplate().tokenize(texts, start) == [[38, *tokens] for tokens in wanted]
    # The user's own is kept.
    assert RawTemplate(suffix="<eos>").tokenize(["86 a+7"], plain) == [[*wanted[0], 1]]


def test_a_prompt_has_one_bos() -> None:
    tokenizer = with_special("<bos> $A", bos_token="<bos>")
    wanted = (38, *chain_tokenizer()("86 a+7")["input_ids"])
    for template in (RawTemplate(), RawTemplate(prefix="<bos>")):
        (prompt,) = prompt_set(Listed(["86 a+7"], template=template), tokenizer, 100).prompts
        assert prompt.tokens == wanted
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (prompt,) = prompt_set(Listed(["<bos>86 a+7"], template=ChatTemplate()), tokenizer, 100).prompts
    assert prompt.tokens == wanted
