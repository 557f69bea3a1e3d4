"""Output of the data module for its sources: the report on training prompts, and errors on the command line."""

import copy
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import (
    Benchmark,
    CleaningConfig,
    CleaningReport,
    JsonlProblems,
    Problem,
    ProblemSource,
    PromptDataModule,
)
from opdlab.errors import UsageError
from opdlab.toy import chain_tokenizer
from opdlab.types.problems import Message


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(f'{{"problem": "{text}", "answer": "1"}}\n' for text in texts))
    return str(path)


def make(tmp_path: Path, *texts: str, **options: Any) -> PromptDataModule:
    train = JsonlProblems(write(tmp_path / "train.jsonl", *texts))
    benchmark = JsonlProblems(write(tmp_path / "held_out.jsonl", "86 a+7", "5 a*2", "12345678901234567890"))
    return PromptDataModule(train, {"held_out": benchmark}, max_prompt_tokens=10, **options)


def prepare(data: PromptDataModule, training: bool = True) -> None:
    data.prepare(chain_tokenizer(), training)


def test_chats_are_compared_with_benchmarks_by_all_turns_of_the_user(tmp_path: Path) -> None:
    turns = [Message("user", "1 a+2"), Message("assistant", "3"), Message("user", "a+3")]

    class Chats(ProblemSource):
        name = "chats"

        def __init__(self, *problems: Problem) -> None:
            super().__init__()
            self._problems = list(problems)

        def problems(self) -> list[Problem]:
            return self._problems

    same, other = (Problem(id_, "a+3", "6", messages=tuple(kept)) for id_, kept in (("0", turns), ("1", turns[2:])))
    data = PromptDataModule(Chats(same, other), {"held_out": Chats(same)}, max_prompt_tokens=50)
    tokenizer = copy.deepcopy(chain_tokenizer())
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}\n{% endfor %}"
    data.prepare(tokenizer, training=True)
    assert data.train_prompts is not None
    assert [prompt.problem.id for prompt in data.train_prompts.prompts] == ["1"]


def test_the_account_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make(tmp_path, "86 a+7", "1 a+1", "1  a+1", "1 a+1 b+2 c+3", "2 a+2")
    with caplog.at_level(logging.INFO):
        prepare(data, training=False)
        assert data.train_prompts is None
        prepare(data)
        prepare(data)
    assert data.train_prompts is not None
    assert [prompt.problem.text for prompt in data.train_prompts.prompts] == ["1 a+1", "2 a+2"]
    assert [prompt.index for prompt in data.train_prompts.prompts] == [0, 1]
    account = CleaningReport(5, duplicate=1, exact={"held_out": 1}, by_ngrams={"held_out": 0}, too_long=1)
    assert data.cleaning_report == account
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("train")]
    assert lines == [
        f"train: problems from {tmp_path}/train.jsonl: 5 read, 0 conflicting, 1 duplicate, 1 contaminated "
        "(exact + by n-grams: held_out 1 + 0), 1 too long, 2 kept"
    ]
    assert any("2 prompts from" in record.getMessage() for record in caplog.records)


def test_cleaning_can_be_switched_off(tmp_path: Path) -> None:
    data = make(tmp_path, "86 a+7", "1 a+1", "1 a+1", clean=CleaningConfig(deduplicate=False, decontaminate=False))
    prepare(data)
    assert data.train_prompts is not None
    assert len(data.train_prompts) == 3


def test_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.clean leaves nothing of .*2 contaminated.*data.clean.decontaminate"):
        prepare(make(tmp_path, "86 a+7", "5  a*2"))
    with pytest.raises(UsageError, match="train.jsonl holds no problems"):
        prepare(make(tmp_path))
    with pytest.raises(UsageError, match="max_prompt_tokens is 10, but every prompt"):
        prepare(make(tmp_path, "1 a+1 b+2 c+3"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "aime42"}, "unknown benchmark 'aime42'; did you mean 'aime25'?"),
        ({"name": "aime24", "paht": "x"}, "unknown key 'paht' of opdlab.data.Benchmark; did you mean 'path'?"),
        (
            {"name": "aime24", "path": "nowhere.jsonl"},
            "mine.path is nowhere.jsonl, but this file does not exist",
        ),
        (
            {
                "name": "aime24",
                "verifier": {"class_path": "opdlab.verifiers.MathVerifier", "init_args": {"num_workers": 0}},
            },
            "num_workers is 0",
        ),
        (
            {"name": "aime24", "path": "rows.jsonl", "template": {"class_path": "opdlab.data.ChatTemplate"}},
            "has no chat template: use RawTemplate",
        ),
    ],
)
def test_bad_benchmarks_on_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", "86 a+7")
    source = {"class_path": "opdlab.data.Benchmark", "init_args": options}
    (tmp_path / "mine.yaml").write_text(yaml.dump({"data": {"benchmarks": {"mine": source}}}))
    assert main(["fit", "-c", "quickstart", "-c", "mine.yaml"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.rstrip().splitlines()[-1].startswith("opdlab: error: ")
    assert words in error


def test_the_shipped_pieces_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pieces = ["-c", "quickstart", "-c", "data/dapo_math_17k", "-c", "benchmarks/paper"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *pieces, "--data.benchmarks.amc23.path", "amc23.jsonl", "--print_config"])
    assert stopped.value.code == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert list(data["benchmarks"]) == ["aime24", "aime25", "math500", "amc23"]  # the quickstart's toy is replaced
    for name, source in data["benchmarks"].items():
        path = "amc23.jsonl" if name == "amc23" else None
        assert source["class_path"] == "opdlab.data.Benchmark"
        assert (source["init_args"]["name"], source["init_args"]["path"]) == (name, path)
        assert Benchmark(**source["init_args"])
    assert data["train"]["class_path"] == "opdlab.data.DapoMath17k"
    assert CleaningConfig(**data["clean"]) == CleaningConfig()  # the file has the defaults
    assert data["max_prompt_tokens"] == 2048


def test_fewer_problems_than_processes(tmp_path: Path) -> None:
    data = make(tmp_path, "1 a+1")
    prepare(data, training=False)
    data.trainer = pl.Trainer(accelerator="cpu", devices=3, strategy="ddp", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UsageError, match=r"data.benchmarks.held_out has 2 problems for 3 processes: give fewer"):
        data.val_dataloader()
    data.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    assert len(data.val_dataloader()) == 1
