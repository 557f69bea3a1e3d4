"""Every architecture is scored like its own forward pass, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from opdlab.errors import UsageError
from opdlab.policies import LanguageModel
from opdlab.types import Rollouts
from tests.policies.tiny_models import COMMON, CONFIGS, RESPONSE_LENGTHS, rollouts, save_random


@torch.no_grad()
def own_logits(model: Any, batch: Rollouts, row: int) -> Tensor:
    """The model's own logits for one response, [length, V], from an unpadded forward."""
    prompt, response = batch.prompt_tokens[row][batch.prompt_mask[row]], batch.tokens[row][batch.mask[row]]
    logits: Tensor = model(input_ids=torch.cat([prompt, response])[None]).logits[0].float()
    return logits[len(prompt) - 1 : -1] / batch.temperature


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_the_models_own_forward(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path, CONFIGS[kind]())
    model = LanguageModel(str(folder))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = rollouts()
    scored = model.score(batch)
    statistics = scored.statistics()
    logprobs, entropy = scored.padded(statistics.logprobs), scored.padded(statistics.entropy)
    spread = 0.0
    for row, length in enumerate(RESPONSE_LENGTHS):
        log_p = own_logits(reference, batch, row).log_softmax(-1)
        wanted = log_p.gather(1, batch.tokens[row, :length, None]).squeeze(1)
        torch.testing.assert_close(logprobs[row, :length], wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy[row, :length], -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4)
        spread = max(spread, float(log_p.std()))
    assert spread > 0.05  # with a flat distribution all models have similar scores
    assert not logprobs[~batch.mask].any()
    assert torch.equal(scored.mask, batch.mask)


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_a_padded_batch(kind: str, tmp_path: Path) -> None:
    """The usual way: prompts padded on the left, an attention mask, and positions counted from the first token."""
    folder = save_random(tmp_path, CONFIGS[kind]())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = rollouts()
    mask = torch.cat([batch.prompt_mask, batch.mask], dim=1).long()
    tokens = torch.cat([batch.prompt_tokens, batch.tokens], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = reference(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    width = batch.prompt_tokens.shape[1]
    log_p = (logits[:, width - 1 : -1].float() / batch.temperature).log_softmax(-1)
    wanted = log_p.gather(2, batch.tokens[..., None]).squeeze(2)
    scored = LanguageModel(str(folder)).score(batch)
    ours = scored.padded(scored.statistics().logprobs.detach())
    torch.testing.assert_close(ours[batch.mask], wanted[batch.mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3 sliding", "mistral", "gemma2", "gemma3"])
def test_windows_are_short_enough_to_show(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path, CONFIGS[kind]())
    config = AutoConfig.from_pretrained(folder)
    config.sliding_window = 64
    wide = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    batch = rollouts()
    scored = LanguageModel(str(folder)).score(batch)
    ours = scored.padded(scored.statistics().logprobs.detach())[0]
    log_p = own_logits(wide, batch, 0).log_softmax(-1)
    others = log_p.gather(1, batch.tokens[0, :, None]).squeeze(1)
    assert float((ours - others).abs().max()) > 0.01


def test_head_of_each_architecture(tmp_path: Path) -> None:
    def head(kind: str) -> tuple[float, float | None]:
        result = LanguageModel(str(save_random(tmp_path / kind, CONFIGS[kind]()))).head()
        return result.scale, result.softcap

    assert head("gemma2") == (1.0, 5.0)
    assert head("cohere") == (0.0625, None)
    assert head("granite") == (0.125, None)
    assert head("gemma3") == (1.0, 5.0)


TRANSFORMATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda z: z * 1.1,
    "shifted by token": lambda z: z + torch.arange(38) / 100,
    "capped": lambda z: 3 * torch.tanh(z / 3),
    "token masked out": lambda z: z.index_fill(-1, torch.tensor([37]), -torch.inf),
    "token masked by the least float": lambda z: z.index_fill(-1, torch.tensor([37]), torch.finfo(z.dtype).min),
    "not a number": lambda z: z * torch.nan,
}


def tamper(monkeypatch: pytest.MonkeyPatch, transformation: Callable[[Tensor], Tensor]) -> None:
    forward = Qwen3ForCausalLM.forward

    def transformed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = transformation(output.logits)
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", transformed)


@pytest.mark.parametrize("kind", TRANSFORMATIONS)
def test_unknown_head_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random(tmp_path, CONFIGS["qwen3"]())
    tamper(monkeypatch, TRANSFORMATIONS[kind])
    with pytest.raises(UsageError, match="changes its logits in a way that opdlab does not know"):
        LanguageModel(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["capped at 30", "clamped at 100"])
def test_identity_on_small_logits_is_refused(
    kind: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3Config(**{**COMMON, "initializer_range": 0.01}, head_dim=8)
    folder = save_random(tmp_path, config)
    model = LanguageModel(str(folder))
    assert float(model.model(input_ids=torch.arange(8)[None]).logits.detach().abs().max()) < 0.5
    changes = {"capped at 30": lambda z: 30 * torch.tanh(z / 30), "clamped at 100": lambda z: z.clamp(-100, 100)}
    tamper(monkeypatch, changes[kind])
    with pytest.raises(UsageError, match="changes its logits"):
        LanguageModel(str(folder), dtype=dtype)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_known_heads_pass_in_narrow_types(kind: str, dtype: Any, tmp_path: Path) -> None:
    LanguageModel(str(save_random(tmp_path, CONFIGS[kind]())), dtype=dtype)


def test_a_model_that_goes_around_its_output_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random(tmp_path, CONFIGS["qwen3"]())

    def forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    with pytest.raises(UsageError, match="changes its logits"):
        LanguageModel(str(folder))
