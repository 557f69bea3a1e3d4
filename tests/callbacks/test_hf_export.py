"""The exported folder: its files besides the weights, and that other programs read it as intended."""

import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from opdlab.callbacks import EvaluationTable, HFExport
from opdlab.callbacks.hf_export import generation_config
from opdlab.cli import main
from opdlab.errors import UsageError
from opdlab.model_card import TrainingRecord, escaped, is_hub_id, model_card
from opdlab.policies import LanguageModel, SamplingConfig
from opdlab.policies.draws import draw, uniforms
from opdlab.seeds import derive_streams
from tests.policies.tiny_models import sampled
from tests.toy_run import STUDENT, Run


def test_generate_samples_as_opdlab_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(STUDENT)
    model.stop_ids = [1, 12]  # the tokenizer's, and one of a generation config
    model.model.generation_config.repetition_penalty = 5.0  # opdlab leaves it out, so the export must too
    sampling = SamplingConfig(num_samples=4, temperature=1.7, top_p=0.6, max_new_tokens=20)
    prompt = model.tokenizer("86 a+7 b*9\n")["input_ids"]
    ours = sampled(model, sampling, [prompt], seed=3)
    model.save(tmp_path)
    generation_config(model, sampling).save_pretrained(tmp_path)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    streams = derive_streams("rollouts", 3, keys=[0], num_samples=4).flatten()
    positions = itertools.count()

    def drawn(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        return draw(probabilities, uniforms(streams, torch.tensor(next(positions))))[:, None]

    # The exported model's own loop draws from the global generator; here it takes the numbers that opdlab took.
    monkeypatch.setattr(torch, "multinomial", drawn)
    output = loaded.generate(torch.tensor([prompt] * 4), attention_mask=torch.ones(4, len(prompt), dtype=torch.long))
    theirs = output[:, len(prompt) :]
    width = min(theirs.shape[1], ours.tokens.shape[1])
    mask = ours.mask[:, :width]
    assert torch.equal(theirs[:, :width][mask], ours.tokens[:, :width][mask])
    assert ours.mask.sum() == mask.sum()
    assert bool((ours.tokens == 12).any())  # the second stop token occurred, so the comparison covers it
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 12]
    assert "repetition_penalty" not in saved


def test_a_run_leaves_a_card_with_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags = {
        "trainer.max_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.gate": "span",
        "model.gate.tau": 2.5,
        "model.sampling.max_new_tokens": 8,
        "model.eval_sampling.max_new_tokens": 8,
        "data.benchmarks.toy.init_args.num_problems": 2,
        "data.reuse.prompts_per_pool": 16,
    }
    small = {"data": {"benchmarks": {"toy": {"class_path": "opdlab.toy.ChainProblems"}}}}
    small["data"]["benchmarks"]["toy"]["init_args"] = {"num_problems": 2, "split": "held_out"}  # type: ignore[assignment]
    Path("small.yaml").write_text(yaml.dump(small))
    del flags["data.benchmarks.toy.init_args.num_problems"]
    options = [f"--{key}={value}" for key, value in flags.items()]
    assert main(["fit", "-c", "quickstart", "-c", "small.yaml", *options]) == 0

    folder = tmp_path / "runs/quickstart/version_0/student"
    card = ModelCard.load(folder / "README.md")
    assert "library_name: transformers\n" in card.content
    assert "base_model" not in card.content  # a folder of this package is not a hub id
    text = card.text
    assert "\\_se" not in text  # metrics have their errors beside them
    assert re.search(r"\| gate \| SpanGate.*tau=2\.5.*\|", text)
    assert re.search(r"\| objective \| TeacherTopK\\\(k=32\\\) \|", text)
    assert "| optimizer steps | 1 |" in text
    assert re.search(r"\| metric \| before \| after \| teacher \|", text)
    assert re.search(r"\| toy/pass\\@8 (\| \d\.\d{3} ± \d\.\d{3} ){3}\|", text)
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 8
    run_config = (folder.parent / "config.yaml").read_text()
    assert (folder / "opdlab.yaml").read_text() == run_config
    assert "opdlab fit -c opdlab.yaml" in text


def test_the_card_shows_untrusted_text_literally() -> None:
    hostile = "x](http://evil) <img src=x onerror=1>\n---\nlicense: mit\n| `a` | **b**"
    record = TrainingRecord(hostile, hostile, hostile, {"gate": hostile}, {"before": {hostile: hostile}})
    card = model_card(hostile, record)
    header = yaml.safe_load(card.content.split("---")[1])
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", card.text)  # without backslash escapes
    assert not re.search(r"[<>]|\]\(|\*\*|^---", plain, re.MULTILINE)
    gate = next(line for line in card.text.splitlines() if line.startswith("| gate"))
    assert len(re.findall(r"(?<!\\)\|", gate)) == 3


def test_long_text_is_cut_and_ids_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(escaped("a" * 10_000)) < 400
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/model")
    (tmp_path / "org/model").mkdir(parents=True)
    assert not is_hub_id("org/model")
    assert not is_hub_id("../model")
    record = TrainingRecord("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B", "data", {})
    assert "base_model: Qwen/Qwen3-1.7B-Base\n" in model_card("x", record).content


def test_push_uploads_the_folder_then_the_cards_figures(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    # The network is not ours to test: keep what would be uploaded.
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda self, name=name, **options: calls.append((name, options))
        )
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors", "notes.txt"):  # of an earlier model, and of the user
        (tmp_path / "out" / name).write_text("{}")
    run = make_run(callbacks=(HFExport(str(tmp_path / "out"), push_to_hub="me/student"), EvaluationTable()))
    trainer = run.fit(1)
    assert [name for name, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[0][1] == {"repo_id": "me/student", "private": True, "exist_ok": True}
    assert calls[1][1]["folder_path"] == tmp_path / "out"
    written = calls[1][1]["allow_patterns"]
    assert set(written) == {path.name for path in (tmp_path / "out").iterdir()} - {"notes.txt"}
    assert {"config.json", "README.md"} < set(written)
    assert "## Results" not in (tmp_path / "out/README.md").read_text()
    trainer.limit_val_batches = 1.0
    trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert calls[-1][1]["allow_patterns"] == ["README.md"]
    assert "toy/pass\\@1" in (tmp_path / "out/README.md").read_text()


def test_a_folder_that_is_no_place_for_a_model_is_refused_before_training(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    for name in ("README.md", "config.json"):  # they would be replaced
        (tmp_path / "project" / name).write_text("of another")
    for folder, words in (
        ("project", r"which has files \(README.md, config.json\) but no model: give a new folder"),
        ("project/README.md/x", "cannot be written to"),
    ):
        run = make_run(callbacks=(HFExport(str(tmp_path / folder)),))
        with pytest.raises(UsageError, match=words):
            run.fit(1)
        assert not run.recorder.steps
    assert (tmp_path / "project/README.md").read_text() == "of another"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"push_to_hub": "me/student", "enabled": False}, "push_to_hub is 'me/student', but export.enabled is false"),
        ({"folder": "out", "enabled": False}, "export.folder is 'out', but export.enabled is false"),
        ({"merge": True}, "export.merge is true, but has no effect: the student has no adapter"),
    ],
)
def test_what_has_no_effect_is_said(make_run: Callable[..., Run], options: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said):
        make_run(callbacks=(HFExport(**options),)).fit(1)


def test_a_push_that_fails_is_one_warning_and_the_folder_is_safe(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    run = make_run(callbacks=(HFExport(str(tmp_path / "out"), push_to_hub="me/student"),))
    with pytest.warns(UserWarning, match=r"'me/student' failed, but .*out is complete.*\(no token\)$"):
        run.fit(1)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out/README.md").is_file()


@pytest.mark.parametrize("name", ["a/b/c", "spaces in it", "-x/y"])
def test_a_bad_hub_id_is_refused_before_training(name: str) -> None:
    with pytest.raises(UsageError, match="push_to_hub is"):
        HFExport(push_to_hub=name)
