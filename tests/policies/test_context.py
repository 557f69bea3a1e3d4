"""A model's context length is what its positions allow, and a run that would read more says so before it begins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CodeGenConfig, GPTJConfig, OPTConfig, Qwen3Config

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import JsonlProblems, PromptDataModule
from opdlab.errors import UsageError
from opdlab.evaluation import EvaluationConfig
from opdlab.policies import LanguageModel, RoutedTeacher
from opdlab.policies.context import ContextLength, context_length
from opdlab.toy import ChainProblems
from tests.policies.tiny_models import COMMON, CONFIGS, IDS, save_random
from tests.toy_run import TEACHER, Run

ROTATED_TABLE: Any = {**IDS, "vocab_size": 38, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
MORE = {
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "gpt-j": lambda: GPTJConfig(**ROTATED_TABLE, n_positions=128),
    "codegen": lambda: CodeGenConfig(**(ROTATED_TABLE | {"n_head": 4}), n_positions=128),
}


def too_long(student: Path, max_new_tokens: int = 100) -> list[str]:
    options = {
        "model.student.path": student,
        "model.teacher.path": student,
        "model.sampling.max_new_tokens": max_new_tokens,
        "model.eval_sampling.max_new_tokens": 20,
        "trainer.max_steps": 1,
    }
    return ["fit", "-c", "quickstart", *(f"--{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_a_length_is_fixed_where_a_position_beyond_it_cannot_be_read(name: str) -> None:
    network = AutoModelForCausalLM.from_config((CONFIGS | MORE)[name]()).eval()
    found = context_length(network)
    assert found is not None
    assert found.tokens == 128

    def reads(count: int) -> bool:
        try:
            with torch.no_grad():
                network(torch.full((1, count), 5), position_ids=torch.arange(count)[None])
        except (IndexError, RuntimeError):
            return False
        return True

    assert reads(found.tokens)
    assert reads(found.tokens + 1) != found.fixed


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
    ],
)
def test_scaled_rotations_reach_further(scaling: dict[str, Any], tokens: int) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling["rope_type"] == "llama3" else {}
    config = Qwen3Config(**COMMON, head_dim=8, rope_parameters={"rope_theta": 10000.0, **scaling, **more})
    assert context_length(AutoModelForCausalLM.from_config(config)) == ContextLength(tokens, fixed=False)


def test_what_a_table_cannot_read_is_refused_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    student = save_random(tmp_path / "gpt2", CONFIGS["gpt2"]())
    assert main(too_long(student)) == EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "opdlab: error: model.sampling.max_new_tokens is 100 and the longest prompt of data.train has 47 tokens, 147 "
        "together, but model.student has 128 positions and cannot read more: lower model.sampling.max_new_tokens to "
        "81, leave longer prompts out (data.max_prompt_tokens), or take a model with a longer context"
    )
    assert "Validation" not in captured.out


def test_positions_that_a_model_was_not_made_for_are_said_once(tmp_path: Path) -> None:
    student = LanguageModel(str(save_random(tmp_path / "llama", CONFIGS["llama"]())))
    with pytest.warns(UserWarning, match=r"model\.student was made for 128 positions") as warned:
        Run(tmp_path / "run", student=student, max_new_tokens=100).fit(1)
    assert len([each for each in warned if "positions" in str(each.message)]) == 1


def test_a_context_that_just_suffices(tmp_path: Path) -> None:
    student = LanguageModel(str(save_random(tmp_path / "gpt2", CONFIGS["gpt2"]())))
    data: PromptDataModule = Run(tmp_path / "run").data
    data.prepare(student.tokenizer, training=True)
    assert data.train_prompts is not None
    longest = max(len(prompt.tokens) for prompt in data.train_prompts.prompts)
    data.check_context(student.context, "model.student", "n", 128 - longest, training=True)
    for _ in range(2):  # a refusal is no warning, which is given once
        with pytest.raises(UsageError, match=f"n is {129 - longest} and the longest prompt of data.train has"):
            data.check_context(student.context, "model.student", "n", 129 - longest, training=True)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("long_for", ["good", "short"])
def test_each_of_several_teachers_reads_its_own_prompts(tmp_path: Path, loaded: bool, long_for: str) -> None:
    short = str(save_random(tmp_path / "gpt2", CONFIGS["gpt2"]()))
    rows = []
    for row, each in enumerate(ChainProblems(16).problems()):
        kind = "good" if row % 2 else "short"
        text = each.text * 3 if kind == long_for else each.text[:8]
        rows.append({"id": each.id, "problem": text, "answer": each.answer, "kind": kind})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = RoutedTeacher({"good": TEACHER, "short": short}, keep_loaded=loaded)
    data = {"train": JsonlProblems(str(tmp_path / "rows.jsonl"), teacher_field="kind")}
    run = Run(
        tmp_path / "run",
        teacher=teacher,
        data=data,
        max_new_tokens=30,
        evaluation=EvaluationConfig((1,), teacher=False),
    )
    if long_for == "good":
        run.fit(1)
    else:
        with pytest.raises(UsageError, match=r"model\.teacher\.teachers\.short has 128 positions and cannot read more"):
            run.fit(1)
