"""The neutral configuration and the pieces for machines and model families: each parses, and runs with tiny models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.building import build
from opdlab.cli.parsing import fit_parser, parse_fit
from opdlab.cli.shipped import shipped_configs

PIECES = [name for name in shipped_configs() if re.match("trainer/|models/|loggers/|gates/|objectives/", name)]
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
IM_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
IM_PROMPT = f"<|im_start|>user\n2 + 2?\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"
# The turns of each family, with the template's special cases that its piece is about.
FAMILIES: dict[str, tuple[type[PretrainedConfig], list[str], str, str, list[str], str]] = {
    "qwen3": (
        Qwen3Config,
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "<|endoftext|>",
        IM_TEMPLATE,
        ["<|im_end|>", "<|endoftext|>"],
        f"{IM_PROMPT}<think>\n\n</think>\n\n",
    ),
    "smollm2": (
        LlamaConfig,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        IM_TEMPLATE,
        ["<|im_end|>", "<|endoftext|>"],
        IM_PROMPT,
    ),
    "llama3": (
        LlamaConfig,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "<|end_of_text|>",
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "<|begin_of_text|>system: Today Date: {{ date_string }}<|eot_id|>"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot_id|>{% endfor %}assistant: ",
        ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
        f"<|begin_of_text|>system: Today Date: 26 Jul 2024<|eot_id|>user: 2 + 2?\n{BOXED}<|eot_id|>assistant: ",
    ),
    "gemma3": (
        Gemma3TextConfig,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "<bos>{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{{ '<start_of_turn>model\n' }}",
        ["<end_of_turn>", "<eos>"],
        f"<bos><start_of_turn>user\n2 + 2?\n{BOXED}<end_of_turn>\n<start_of_turn>model\n",
    ),
}


def write_model(folder: Path, config: type[PretrainedConfig], special: list[str], eos: str, template: str) -> None:
    """Write a tiny model of a family, whose tokenizer has single bytes and the family's special tokens."""
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template).save_pretrained(folder)
    torch.manual_seed(0)
    made = config(
        vocab_size=len(alphabet), eos_token_id=alphabet.index(eos), bos_token_id=None, pad_token_id=0, **SIZES
    )
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)


def arguments(folder: Path, *pieces: str) -> list[str]:
    """Return the arguments of a run on ``folder``'s model and problems, on CPU and with small sizes."""
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({"problem": f"{n} + {n}?", "answer": str(2 * n)}) + "\n" for n in (2, 3, 4, 5))
    )
    stacked = [part for name in ("base", *pieces) for part in ("-c", name)]
    paths = f"--model.student.path {folder} --model.teacher.path {folder} --data.train.path {folder}/problems.jsonl"
    return [*stacked, *paths.split(), "--data.reuse.prompts_per_pool=4", "--data.reuse.batch_size=2"]


@pytest.mark.parametrize("name", PIECES)
def test_every_piece_parses_with_the_base(name: str, tmp_path: Path) -> None:
    config = parse_fit(arguments(tmp_path, name))
    kind, _, own = name.partition("/")
    if kind == "trainer":
        expected = {"cpu": ("cpu", "auto"), "gpu": ("gpu", "auto"), "ddp": ("gpu", "ddp")}
        expected |= {"fsdp2": ("gpu", "model_parallel"), "debug": ("auto", "auto")}
        assert (config.trainer.accelerator, config.trainer.strategy) == expected[own]
    assert config.trainer.max_steps == (2 if own == "debug" else -1)


def test_the_base_has_nothing_of_the_toy() -> None:
    text = shipped_configs()["base"].read_text()
    assert "toy" not in text
    assert "extends:" not in text.replace("`extends: base`", "")


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("model.student.path", "model.student lacks path: give model.student.path"),
        ("model.teacher.path", "model.teacher lacks path: give model.teacher.path"),
        ("data.train.path", "data.train lacks path: give data.train.path"),
        ("", "trainer.max_steps is -1, so the run would never end: give the number of optimizer steps"),
    ],
)
def test_the_base_asks_for_what_it_leaves_open(
    left_out: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path)
    if left_out:
        place = given.index(f"--{left_out}")
        del given[place : place + 2]
    assert main(["fit", *given]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_piece_sets_stop_tokens_and_prompts(family: str, tmp_path: Path) -> None:
    *model, stops, prompt = FAMILIES[family]
    write_model(tmp_path, *model)  # type: ignore[arg-type]
    built = build(fit_parser(), parse_fit(arguments(tmp_path, f"models/{family}")))
    student, tokenizer = built.model.student, built.model.student.tokenizer
    assert tokenizer.convert_ids_to_tokens(student.stop_ids) == sorted(stops, key=tokenizer.convert_tokens_to_ids)
    assert built.model.teacher.stop_tokens == student.stop_tokens
    built.data.prepare(tokenizer, training=True)
    assert tokenizer.decode(built.data.train_prompts.prompts[0].tokens) == prompt


def test_the_base_runs_with_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    *model, stops, _ = FAMILIES["qwen3"]
    write_model(tmp_path / "model", *model)  # type: ignore[arg-type]
    given = arguments(tmp_path / "model", "models/qwen3", "trainer/debug", "trainer/cpu")
    assert main(["fit", *given, "--export.enabled", "true"]) == 0
    output = capsys.readouterr().out
    (run,) = (tmp_path / "runs/debug").iterdir()
    assert f"run folder: runs/debug/{run.name}" in output
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    exported = json.loads((run / "student/generation_config.json").read_text())
    tokens = PreTrainedTokenizerFast.from_pretrained(run / "student").convert_ids_to_tokens(exported["eos_token_id"])
    assert tokens == stops
