"""Attention on a CPU: torch's kernel in float64, and transformers where it does not apply."""

from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DeepseekV32Config, FalconConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from opdlab.policies import LanguageModel, cpu_attention
from opdlab.policies.cpu_attention import OWN, own_attention
from tests.policies.test_decoding import decode, random_model, small_model
from tests.policies.test_passes import random_rollouts
from tests.policies.tiny_models import COMMON, CONFIGS

ROWS, WIDTH, SIZE = 5, 11, 6
PROMPTS = [[8, 9, 10], [11], [12, 13]]  # some rows have padding


def attend(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
    with own_attention():
        return cpu_attention.cpu_attention(*inputs, **options)


class Layer(nn.Module):
    """A layer of a decoder, as far as transformers' attention looks at it."""

    def __init__(self, shared: int = 1, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = shared, is_causal


def states(heads: int, of_keys: int, queries: int = 1, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    shapes = (ROWS, heads, queries, SIZE), (ROWS, of_keys, width, SIZE), (ROWS, of_keys, width, SIZE)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def some_padding() -> Tensor:
    used = torch.arange(WIDTH) >= torch.tensor([0, 3, 10, 1, 0])[:, None]
    return used[:, None, None]  # [A, 1, 1, W]


def in_float64(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool
) -> Tensor:
    """Return torch's attention, [A, Q, H, E]."""
    shared = query.shape[1] // key.shape[1]
    keys, values = (each.double().repeat_interleave(shared, 1) for each in (key, value))
    options: dict[str, Any] = {"attn_mask": mask, "scale": scaling, "is_causal": causal}
    return functional.scaled_dot_product_attention(query.double(), keys, values, **options).transpose(1, 2)


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
    ours, _ = attend(Layer(), query, key, value, mask, scaling=scaling)
    theirs = in_float64(query, key, value, used, scaling, causal=False)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-5)


# Less than a block of 32 queries, one, one and a part, two and a part; the last is the longest row.
@pytest.mark.parametrize("width", [2, 31, 32, 33, 65, 72])
@pytest.mark.parametrize(("heads", "of_keys", "scaling"), [(4, 2, None), (6, 2, 0.3), (5, 1, None)])
def test_causal_rows_give_values_and_gradients_of_torchs_kernel_in_float64(
    width: int, heads: int, of_keys: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "_theirs", None)
    query, key, value = states(heads, of_keys, width, width)
    # As models give them: transposed, in memory that is ordered by tokens. A value has another size.
    query, key = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key))
    q, k, v = (each.requires_grad_() for each in (query, key, value[..., :4]))
    wide_q, wide_k, wide_v = (each.detach().double().requires_grad_() for each in (q, k, v))
    ours, _ = attend(Layer(heads // of_keys), q, k, v, None, scaling=scaling)
    theirs = in_float64(wide_q, wide_k, wide_v, None, scaling, causal=True)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(ours, (q, k, v), upstream)
    expected = torch.autograd.grad(theirs, (wide_q, wide_k, wide_v), upstream.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-4)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the options of each call that is left to transformers."""
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(cpu_attention, "_theirs", lambda *_, **given: called.append(given))
    return called


@pytest.mark.parametrize("queries", [1, WIDTH])
@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ("float64", {}),
        ("autocast", {}),
        ("a bias of positions", {"position_bias": torch.ones(1, 4, 1, WIDTH)}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_what_it_does_not_know_is_left_to_transformers(
    queries: int, changed: str, options: dict[str, Any], left: list[dict[str, Any]]
) -> None:
    query, key, value = (each.to(torch.double if changed == "float64" else None) for each in states(4, 2, queries))
    with torch.autocast("cpu", torch.bfloat16, enabled=changed == "autocast"):
        attend(Layer(2), query, key, value, None, scaling=0.5, **options)
    assert left == [{"scaling": 0.5, **options}]


@pytest.mark.parametrize(
    ("queries", "width", "options"),
    [
        (WIDTH, WIDTH, {"is_causal": False}),
        (WIDTH, WIDTH, {"mask": torch.ones(ROWS, 1, WIDTH, WIDTH, dtype=torch.bool).tril()}),
        (WIDTH - 2, WIDTH, {}),
        (12 * SIZE + 1, 12 * SIZE + 1, {}),
    ],
    ids=["not causal", "with a mask", "with earlier columns", "longer than 12 tokens per entry of a head"],
)
def test_other_rows_than_short_causal_ones_are_left_to_transformers(
    queries: int, width: int, options: dict[str, Any], left: list[dict[str, Any]]
) -> None:
    mask = options.pop("mask", None)
    attend(Layer(2), *states(4, 2, queries, width), mask, **options)
    assert left == [options]


def test_a_layer_that_is_not_causal_is_left_to_transformers(left: list[dict[str, Any]]) -> None:
    attend(Layer(2, is_causal=False), *states(4, 2, WIDTH), None)
    attend(Layer(2, is_causal=False), *states(4, 2, WIDTH), None, is_causal=True)
    assert left == [{}]


def test_heads_that_share_no_keys_are_left_to_transformers(left: list[dict[str, Any]]) -> None:
    attend(Layer(), *states(4, 4, WIDTH), None)
    assert left == [{}]


class Probabilities(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch is not typed here
    """Counts how many results of a softmax exist at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self._found = 0, WeakSet[Tensor]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self._found.add(made)
            self.most = max(self.most, len(self._found))
        return made


@pytest.mark.parametrize(("learns", "most"), [(True, 3), (False, 2)])
def test_rows_that_are_scored_without_gradient_keep_no_probabilities(learns: bool, most: int) -> None:
    query, key, value = states(4, 2, 72, 72)  # three blocks
    with Probabilities() as probabilities:
        attend(Layer(2), query.requires_grad_(learns), key, value, None)
    assert probabilities.most == most


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


def layers_used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that says of each layer that runs whether this attention may be taken."""
    seen: list[str] = []
    real = AttentionInterface()["sdpa"]

    def noted(*inputs: Any, **options: Any) -> Any:
        seen.append("own" if OWN.get() else "sdpa")
        return real(*inputs, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", noted)
    return seen


def test_it_is_taken_where_opdlab_decodes_and_scores_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = LanguageModel("package://opdlab.toy/models/student"), layers_used(monkeypatch)
    model.score(random_rollouts(4))  # compares passes of the model
    seen.clear()
    before = model.model.config.to_dict()
    decode(model.model, PROMPTS, max_new_tokens=3)
    model.score(random_rollouts(4))
    assert set(seen) == {"own"}
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        decode(model.model, PROMPTS, max_new_tokens=9, advance=interrupt)
    seen.clear()
    model.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, pad_token_id=0)
    assert set(seen) == {"sdpa"}
    assert model.model.config.to_dict() == before
    assert model.model.config._attn_implementation == "sdpa"  # a name that models look at


def interrupt(count: int) -> None:
    raise KeyboardInterrupt


def test_elsewhere_it_is_transformers(left: list[dict[str, Any]]) -> None:
    cpu_attention.cpu_attention(Layer(), *states(4, 4), None, scaling=0.5)
    assert left == [{"scaling": 0.5}]


@pytest.mark.parametrize("changed", ["nothing", "device", "dtype", "autocast", "queries", "function", "padding"])
def test_only_the_mask_of_one_query_on_a_cpu_is_its_own(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(cpu_attention, "_their_mask", lambda **given: called.append(given))
    padding = torch.ones(2, 5, dtype=torch.bool, device="meta" if changed == "device" else "cpu")
    options: dict[str, Any] = {"q_length": 2 if changed == "queries" else 1, "kv_length": 5, "kv_offset": 0}
    options["attention_mask"] = None if changed == "padding" else padding
    options["dtype"] = torch.bfloat16 if changed == "dtype" else torch.float32
    options["mask_function"] = bidirectional_mask_function if changed == "function" else causal_mask_function
    with own_attention(), torch.autocast("cpu", torch.bfloat16, enabled=changed == "autocast"):
        made = cpu_attention.cpu_mask(**options)
    assert called == ([] if changed == "nothing" else [options])
    assert (made is None) == (changed != "nothing")


def test_a_users_own_generation_has_transformers_masks() -> None:
    """A static cache has columns for later tokens, which the mask of the decoding loop does not know."""
    model, rows = small_model(64), torch.tensor([[0, 0, 8, 9], [5, 6, 7, 8]])
    options: dict[str, Any] = {"attention_mask": (rows > 0).long(), "max_new_tokens": 6, "pad_token_id": 0}
    static = model.generate(rows, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(rows, **options))


@pytest.mark.parametrize("own", ["eager", "bfloat16", "falcon"])
def test_other_kernels_dtypes_and_models_keep_their_attention(own: str, left: list[dict[str, Any]]) -> None:
    model = random_model(FalconConfig(**COMMON)) if own == "falcon" else small_model(64)
    model = plain(model) if own == "eager" else model
    model = model.to(torch.bfloat16) if own == "bfloat16" else model
    if own == "bfloat16":
        with pytest.raises(TypeError):  # what it is left to returns nothing here
            decode(model, PROMPTS, max_new_tokens=3)
        assert left
    else:
        decode(model, PROMPTS, max_new_tokens=3)
        assert not left


def test_a_sparse_model_scores_what_its_own_code_lets_it_see() -> None:
    """Its code applies the mask of its indexer for the names that it knows alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 4,
    }
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 12}
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    tokens = {"vocab_size": 38, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = random_model(DeepseekV32Config(**sizes, **heads, **ranks, **experts, **tokens, initializer_range=0.3))
    rows = torch.randint(3, 38, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids=rows, use_cache=False).logits
        with own_attention():
            ours = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("bound", [None, 100])
def test_a_training_pass_gives_the_gradients_of_eager_attention(checkpoints: bool, bound: int | None) -> None:
    """In the whole model, also where the backward pass computes layers or passes again."""
    folder, rollouts = "package://opdlab.toy/models/student", random_rollouts(6)
    found = []
    for kernel in (None, "eager"):
        model = LanguageModel(folder, attn_implementation=kernel, gradient_checkpointing=checkpoints).train()
        model.max_tokens = bound
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = model.score(rollouts).statistics().logprobs.sum()
        found.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=2e-3, rtol=1e-4, msg=name)
