"""The decoding loop's attention: torch's kernel in float64, transformers where it does not apply, and no trace left."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import FalconConfig, PreTrainedModel

from opdlab.policies import decoding_attention
from opdlab.policies.decoding_attention import NAME, one_token_attention
from tests.policies.test_decoding import decode, random_model, small_model
from tests.policies.tiny_models import COMMON, CONFIGS

ROWS, WIDTH, SIZE = 5, 11, 6
PROMPTS = [[8, 9, 10], [11], [12, 13]]  # some rows have padding


def states(heads: int, of_keys: int, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = (ROWS, heads, queries, SIZE), (ROWS, of_keys, WIDTH, SIZE), (ROWS, of_keys, WIDTH, SIZE)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def some_padding() -> Tensor:
    used = torch.arange(WIDTH) >= torch.tensor([0, 3, 10, 1, 0])[:, None]
    return used[:, None, None]  # [A, 1, 1, W]


@pytest.mark.parametrize(("heads", "of_keys"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_gives_what_torchs_kernel_gives_in_float64(
    heads: int, of_keys: int, kind: str, scaling: float | None
) -> None:
    query, key, value = states(heads, of_keys)
    used = None if kind == "none" else some_padding()
    mask = used
    if used is not None and kind == "float":
        mask = torch.zeros(used.shape).masked_fill(~used, torch.finfo(torch.float32).min)
    ours, _ = one_token_attention(nn.Module(), query, key, value, mask, scaling=scaling)
    keys, values = (each.double().repeat_interleave(heads // of_keys, 1) for each in (key, value))
    theirs = functional.scaled_dot_product_attention(query.double(), keys, values, attn_mask=used, scale=scaling)
    torch.testing.assert_close(ours, theirs.transpose(1, 2).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "dtype", "options"),
    [
        (3, torch.float32, {}),
        (1, torch.bfloat16, {}),
        (1, torch.float32, {"position_bias": torch.ones(1, 4, 1, WIDTH)}),
        (1, torch.float32, {"dropout": 1.0}),
    ],
    ids=["several queries", "bfloat16", "a bias of positions", "dropout"],
)
def test_the_rest_is_transformers(
    queries: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(decoding_attention, "sdpa_attention_forward", lambda *_, **given: called.append(given))
    query, key, value = (each.to(dtype) for each in states(4, 4, queries))
    one_token_attention(nn.Module(), query, key, value, None, scaling=0.5, **options)
    assert called == [{"scaling": 0.5, **options}]


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with an attention that the loop leaves alone."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_draws_the_tokens_of_transformers_own_attention(name: str) -> None:
    model = random_model(CONFIGS[name]())
    ours = decode(model, PROMPTS, num_samples=2, max_new_tokens=9)
    theirs = decode(plain(model), PROMPTS, num_samples=2, max_new_tokens=9)
    assert torch.equal(ours, theirs)


def test_it_is_used_while_the_loop_decodes_and_only_then() -> None:
    model = small_model(64)
    seen: list[str] = []

    def noted(count: int) -> None:
        seen.append(model.config._attn_implementation)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode(model, PROMPTS, max_new_tokens=9, advance=noted)
    assert seen == [NAME] * 3
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("own", ["eager", "bfloat16", "autocast", "falcon"])
def test_other_kernels_dtypes_and_models_keep_their_attention(own: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []
    model = random_model(FalconConfig(**COMMON)) if own == "falcon" else small_model(64)
    model = plain(model) if own == "eager" else model
    model = model.to(torch.bfloat16) if own == "bfloat16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=own == "autocast"):
        decode(model, PROMPTS, max_new_tokens=3, advance=lambda count: seen.append(model.config._attn_implementation))
    assert set(seen) == {"eager" if own == "eager" else "sdpa"}
    assert "attention implementation" not in caplog.text
