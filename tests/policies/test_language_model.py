"""Language models: loading, saving, batches, and clear errors for unusable input."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, OPTConfig, Qwen3Config

from opdlab.errors import UsageError
from opdlab.policies import LanguageModel
from opdlab.toy import chain_tokenizer
from opdlab.types import Rollouts
from tests.policies.tiny_models import COMMON, CONFIGS, IDS, rollouts, save_random


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: see ``copied``."""
    return save_random(tmp_path_factory.mktemp("qwen3"), CONFIGS["qwen3"]())


@pytest.fixture
def copied(qwen3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen3, tmp_path / "model"))


def refusal(path: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        LanguageModel(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("longest", "shapes"), [(1, [(3, 9)]), (1300, [(1, 1308), (2, 8)])])
def test_scores_in_groups_of_similar_length(qwen3: Path, longest: int, shapes: list[tuple[int, int]]) -> None:
    model, batch = LanguageModel(str(qwen3)), rollouts()
    batch.mask[0, 4:] = False  # so that the longest is not the first
    batch.mask[1] = False  # no token of it is scored
    batch.mask[3, 2] = False  # a hole: attended to, but not scored
    tokens = torch.randint(3, 38, (4, max(longest, 7)), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    tokens[:, :7], mask[:, :7] = batch.tokens, batch.mask
    mask[2, :longest] = True
    batch = replace(batch, tokens=tokens, mask=mask, behavior_logprobs=torch.zeros(tokens.shape))
    passes: list[tuple[int, ...]] = []
    model.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: passes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )

    def gradients() -> tuple[Tensor, Any]:
        scored = model.score(batch)
        logprobs = scored.padded(scored.statistics().logprobs)
        weights = torch.arange(logprobs.shape[1]) % 7
        return logprobs, torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))

    model.group_lengths = False
    whole, expected = gradients()
    model.group_lengths = True
    passes.clear()
    ours, found = gradients()
    # Prompts of 5, 2, 9, 1 and responses of 4, 0, `longest`, 6 tokens; the last one is not an input.
    assert passes == shapes
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-5)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * longest)


def test_nothing_to_score(qwen3: Path) -> None:
    model, batch = LanguageModel(str(qwen3)), rollouts()
    batch.mask[:] = False
    assert model.score(batch).hidden.shape == (0, model.head().weight.shape[1])
    nobody = batch.rows(torch.zeros(0, dtype=torch.long))  # the student scores all its rows itself
    assert list(model.score_in_chunks(nobody, 4)) == []


def test_positions_are_picked_as_a_mask_picks_them_and_put_back(qwen3: Path) -> None:
    batch = rollouts()
    batch.mask[0, 1] = False  # a hole
    scored, mask = LanguageModel(str(qwen3)).score(batch), batch.mask.bool()
    values = torch.randn(*mask.shape, 3)
    assert torch.equal(scored.picked(values), values[mask])
    assert torch.equal(scored.padded(values[mask]), values * mask[..., None])
    with pytest.raises(IndexError, match=r"values of shape \[.*\] for positions \[.*\]"):
        scored.picked(values[:, 1:])


def test_scores_in_chunks_and_gradient(qwen3: Path) -> None:
    model, batch = LanguageModel(str(qwen3)), rollouts()
    whole = model.score(batch)
    expected = whole.padded(whole.statistics().logprobs)
    for rows, scored in model.score_in_chunks(batch, 3):
        assert not scored.hidden.requires_grad
        torch.testing.assert_close(
            scored.padded(scored.statistics().logprobs), expected[rows].detach(), rtol=0, atol=1e-5
        )
    (weight,) = (p for name, p in model.named_parameters() if name.endswith("embed_tokens.weight"))
    (ours,) = torch.autograd.grad(expected.sum(), weight)
    total = torch.zeros(())
    for row in range(4):
        prompt, response = batch.prompt_tokens[row][batch.prompt_mask[row]], batch.tokens[row][batch.mask[row]]
        logits = model.model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        total = total + (logits / 0.7).log_softmax(-1).gather(1, response[:, None]).sum()
    (wanted,) = torch.autograd.grad(total, weight)
    # Tied: the gradient through the embedding and the one through our head add up in one tensor.
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_padding_changes_nothing(qwen3: Path) -> None:
    model, batch = LanguageModel(str(qwen3)), rollouts()

    def logprobs(batch: Rollouts) -> Tensor:
        scored = model.score(batch)
        return scored.padded(scored.statistics().logprobs).detach()

    noise = torch.randint(3, 38, (4, 9), generator=torch.Generator().manual_seed(1))
    other = Rollouts(
        prompt_tokens=torch.where(batch.prompt_mask, batch.prompt_tokens, noise),
        prompt_mask=batch.prompt_mask,
        tokens=torch.where(batch.mask, batch.tokens, noise[:, :7]),
        mask=batch.mask,
        behavior_logprobs=batch.behavior_logprobs,
        stop_reasons=batch.stop_reasons,
        rollout_ids=batch.rollout_ids,
        prompt_ids=batch.prompt_ids,
        sampled_at_step=batch.sampled_at_step,
        snapshot_step=batch.snapshot_step,
        temperature=batch.temperature,
    )
    torch.testing.assert_close(logprobs(other), logprobs(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(qwen3: Path, dtype: Any) -> None:
    model, batch = LanguageModel(str(qwen3), dtype=dtype), rollouts()
    assert model.model.dtype == getattr(torch, dtype)
    statistics = model.score(batch).statistics()
    assert statistics.logprobs.dtype == torch.float32
    exact = LanguageModel(str(qwen3)).score(batch).statistics()
    assert float((statistics.logprobs - exact.logprobs).detach().abs().mean()) < 0.1


def test_save_and_load(qwen3: Path, tmp_path: Path) -> None:
    model = LanguageModel(str(qwen3))
    model.save(tmp_path / "again")
    again = LanguageModel(str(tmp_path / "again"))
    assert again.stop_ids == model.stop_ids
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_models(name: str) -> None:
    model = LanguageModel(f"package://opdlab.toy/models/{name}")
    assert model.tokenizer.get_vocab() == chain_tokenizer().get_vocab()
    assert model.stop_ids == [1]


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal("./no/such/folder")


def test_missing_package_or_folder_in_it() -> None:
    assert "no package 'opdlab_nowhere'" in refusal("package://opdlab_nowhere/models")
    assert "holds no folder 'models/nobody'" in refusal("package://opdlab.toy/models/nobody")


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: _truncate(folder / "config.json", 0.5), "check that the folder is complete"),
        (lambda folder: (folder / "model.safetensors").unlink(), "check that the folder is complete"),
        (lambda folder: _truncate(folder / "model.safetensors", 0.6), "check that the folder is complete"),
        (lambda folder: _truncate(folder / "model.safetensors", 0.01), "check that the folder is complete"),
        (lambda folder: _truncate(folder / "model.safetensors", 0), "check that the folder is complete"),
        (lambda folder: _truncate(folder / "tokenizer.json", 0.5), "check that the folder is complete"),
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer's files are missing"),
    ],
)
def test_half_written_folder(copied: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(copied)
    assert words in refusal(copied)


def test_missing_weights_are_not_made_up(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copied)
    assert "is incomplete" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_no_stop_token(tmp_path: Path) -> None:
    tokenizer = chain_tokenizer()
    tokenizer.eos_token = None
    folder = save_random(tmp_path, Qwen3Config(**{**COMMON, "eos_token_id": None}, head_dim=8), tokenizer)
    assert "no eos_token" in refusal(folder)


@pytest.mark.parametrize(
    ("configured", "expected"), [(1, [1]), (7, [1, 7]), ([7, 5], [1, 5, 7]), ([1, 9], [1, 9]), (None, [1])]
)
def test_stop_ids_are_the_union(copied: Path, configured: Any, expected: list[int]) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert LanguageModel(str(copied)).stop_ids == expected


@pytest.mark.parametrize("eos", ["<eos>", None])
def test_padding_without_a_pad_token(tmp_path: Path, eos: str | None) -> None:
    tokenizer = chain_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, eos
    # The stop token is in the tokenizer or only in the model's configuration.
    model = LanguageModel(
        str(save_random(tmp_path, Qwen3Config(**{**COMMON, "pad_token_id": None}, head_dim=8), tokenizer))
    )
    assert model.stop_ids == [1]
    assert model.tokenizer.pad_token_id == 1
    assert model.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(
            **IDS,
            vocab_size=38,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
        ),
        Qwen3Config(**COMMON, head_dim=8, attention_dropout=0.5),
        OPTConfig(
            **IDS,
            vocab_size=38,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.5,
        ),
    ],
    ids=lambda config: str(config.model_type),
)
def test_dropout_is_switched_off(config: Any, tmp_path: Path) -> None:
    model = LanguageModel(str(save_random(tmp_path, config))).train()
    batch = rollouts()
    first, second = (model.score(batch).statistics().logprobs.detach() for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(model.eval().score(batch).statistics().logprobs.detach(), first, rtol=0, atol=1e-5)
