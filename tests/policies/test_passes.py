"""Loss and gradient equal those of one padded batch for every way of batching; rows that leak are not packed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, JambaConfig, Lfm2Config
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opdlab.gating import build_gate
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK, loss_shares, reduce_losses
from opdlab.policies import AdapterConfig, LanguageModel, Scored
from opdlab.policies.packing import attention_may_pack, keeps_packed_rows_apart
from opdlab.policies.passes import PackedRows
from opdlab.training import gate_inputs
from opdlab.types import Rollouts, Targets
from tests.policies.tiny_models import COMMON, CONFIGS, save_random

# Largest error in float64; Gemma's norms compute in float32 in any case.
EXACT = {"qwen3": 1e-10, "llama untied": 1e-10, "gemma3": 1e-6}
BUDGETS = [1, 17, 40, 90, 10_000]
HYBRIDS: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: Lfm2Config(**COMMON, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "jamba": lambda: JambaConfig(
        **COMMON,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
}
Call = tuple[tuple[int, ...], bool]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    configs = {**CONFIGS, **HYBRIDS}
    names = [*EXACT, "gpt2", *HYBRIDS]
    return {name: str(save_random(tmp_path_factory.mktemp("model"), configs[name]())) for name in names}


def random_rollouts(seed: int, rows: int = 7) -> Rollouts:
    """Of random lengths, empty responses and holes among them; of padding only the masks tell."""
    generator = torch.Generator().manual_seed(seed)

    def masked(longest: int, left: bool, least: int) -> Tensor:
        lengths = torch.randint(least, longest + 1, (rows, 1), generator=generator)
        columns = torch.arange(longest)
        return (columns.flip(0) if left else columns) < lengths

    prompt_mask, mask = masked(12, True, 1), masked(25, False, 0)
    mask &= torch.rand(mask.shape, generator=generator) > 0.1
    tokens = [torch.randint(0, 38, m.shape, generator=generator) for m in (prompt_mask, mask)]
    zeros = torch.zeros(rows, dtype=torch.long)
    logprobs = -4 * torch.rand(mask.shape, generator=generator) * mask
    return Rollouts(tokens[0], prompt_mask, tokens[1], mask, logprobs, *5 * (zeros,), temperature=0.8)


def random_targets(rollouts: Rollouts, k: int = 5) -> Targets:
    generator = torch.Generator().manual_seed(1)
    shape = (*rollouts.tokens.shape, k)
    ids = torch.rand(*rollouts.tokens.shape, 38, generator=generator).argsort(-1)[..., :k].int()
    logprobs = -3 * torch.rand(rollouts.tokens.shape, generator=generator) * rollouts.mask
    return Targets(logprobs, ids, torch.randn(shape, generator=generator), torch.ones(rollouts.tokens.shape))


def padded_batch(model: LanguageModel, batch: Rollouts) -> Scored:
    """The usual way: one batch padded on the left, an attention mask, and positions from the first token on."""
    attention = torch.cat([batch.prompt_mask, batch.mask], 1)
    # Holes are attended to.
    fed = attention | (attention.flip(1).cumsum(1).flip(1) > 0) & (attention.cumsum(1) > 0)
    hidden = model.model.base_model(
        input_ids=torch.cat([batch.prompt_tokens, batch.tokens], 1),
        attention_mask=fed.long(),
        position_ids=(fed.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state[:, batch.prompt_tokens.shape[1] - 1 : -1]
    return Scored.of(
        hidden[batch.mask],
        model.head(batch.temperature),
        batch.mask,
        batch.tokens[batch.mask],
    )


def loss_and_gradients(
    model: LanguageModel, scored: Scored, batch: Rollouts, objective: Objective, gate_name: str
) -> list[Tensor]:
    targets = random_targets(batch)
    gate = build_gate(gate_name)
    gate.setup(model.tokenizer)
    positions = objective.position_losses(scored, batch, targets)
    weights = gate(gate_inputs(batch, targets, positions)).weights
    counted = {"num_tokens": float(batch.mask.sum()), "num_rollouts": float(len(batch))}
    loss = reduce_losses(positions.losses, weights, loss_shares(batch.mask, reduction="token_mean", **counted))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def weighted_gradients(model: LanguageModel, scored: Scored) -> list[Tensor]:
    """Hidden states, and gradients of them weighted at random, in the weights' own type."""
    weights = torch.randn(scored.hidden.shape, generator=torch.Generator().manual_seed(2), dtype=scored.hidden.dtype)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" not in n]
    return [scored.hidden.detach(), *torch.autograd.grad((scored.hidden * weights).sum(), trained)]


def check_equal(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of the largest value of each tensor."""
    assert len(ours) == len(wanted) > 1
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


def watched(model: LanguageModel) -> list[Call]:
    """Shapes of the passes that the model takes from now on, and whether they are packed."""
    calls: list[Call] = []

    def record(_module: Any, _inputs: Any, options: dict[str, Any]) -> None:
        calls.append((tuple(options["input_ids"].shape), "position_ids" in options))

    with torch.no_grad():
        model.score(random_rollouts(0, rows=2))  # compares packed rows first, which is not recorded
    model.model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


# sdpa masks the tokens of other rows, which flash attention skips; results are the same.
FLASH_LIKE = ("sdpa_in_place_of_flash", "sdpa_in_place_of_another_flash")
for _name in FLASH_LIKE:
    AttentionInterface.register(_name, sdpa_attention_forward)
    AttentionMaskInterface.register(_name, sdpa_mask)


def loaded(folder: str, layout: str, **options: Any) -> LanguageModel:
    """The model of a folder; with layout "packed" its attention kernel counts as one that skips other rows."""
    model = LanguageModel(folder, **options)
    if layout == "packed":
        model.model.config._attn_implementation = FLASH_LIKE[0]  # by its option, transformers would look for a package
    return model


@pytest.fixture(params=["padded", "packed"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- loss and gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_states_and_gradients_are_those_of_a_padded_batch(folders: dict[str, str], kind: str, layout: str) -> None:
    model = loaded(folders[kind], layout).double()
    calls = watched(model)
    for seed in range(4):
        batch = random_rollouts(seed)
        wanted = weighted_gradients(model, padded_batch(model, batch))
        for budget in [*BUDGETS, None]:
            model.max_tokens = budget
            calls.clear()
            check_equal(weighted_gradients(model, model.score(batch)), wanted, EXACT[kind])
            assert calls
            assert all(packed == (layout == "packed") for _, packed in calls)


@pytest.mark.parametrize("objective", [TeacherTopK(k=5), SampledTokenOPD()], ids=["lsm", "sampled"])
@pytest.mark.parametrize("gate", ["none", "token", "block64", "block32", "span", "sequence"])
def test_losses_are_those_of_a_padded_batch(
    folders: dict[str, str], objective: Objective, gate: str, layout: str
) -> None:
    model = loaded(folders["qwen3"], layout)  # tied
    batch = random_rollouts(5)
    wanted = loss_and_gradients(model, padded_batch(model, batch), batch, objective, gate)
    for budget in BUDGETS:
        model.max_tokens = budget
        check_equal(loss_and_gradients(model, model.score(batch), batch, objective, gate), wanted, 1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2), AdapterConfig(r=2, use_dora=True)])
def test_adapters_and_checkpointed_layers(
    folders: dict[str, str], adapter: AdapterConfig | None, gradient_checkpointing: bool, layout: str
) -> None:
    kind = "llama untied"
    options = {"adapter": adapter, "gradient_checkpointing": gradient_checkpointing}
    model = loaded(folders[kind], layout, **options).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # adapters start with zeros, behind which gradients vanish
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.02)
    batch = random_rollouts(6)
    wanted = weighted_gradients(model, padded_batch(model, batch))
    for budget in (1, 40, None):
        model.max_tokens = budget
        check_equal(weighted_gradients(model, model.score(batch)), wanted, EXACT[kind])


def test_mixed_precision_is_that_of_the_forward_pass_when_computed_again(folders: dict[str, str]) -> None:
    model, batch = LanguageModel(folders["qwen3"]), random_rollouts(7)

    def gradients(budget: int | None) -> list[Tensor]:
        model.max_tokens = budget
        with torch.autocast("cpu", torch.bfloat16):
            scored = model.score(batch)
        return weighted_gradients(model, scored)

    whole, parts = gradients(None), gradients(40)
    for one, other in zip(parts, whole, strict=True):
        assert float((one - other).norm()) < 0.03 * float(other.norm())
    in_float32 = weighted_gradients(model, padded_batch(model, batch))
    assert float((parts[0] - in_float32[0]).norm()) > 1e-4 * float(in_float32[0].norm())


# -- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_passes_stay_within_the_budget(folders: dict[str, str], budget: int, layout: str) -> None:
    model, batch = loaded(folders["qwen3"], layout), random_rollouts(8)
    calls = watched(model)
    model.max_tokens = budget
    scored = model.score(batch)
    forward = list(calls)
    assert all(rows == 1 or rows * width <= budget for (rows, width), _ in forward)
    assert all(packed == (layout == "packed") for _, packed in forward)
    torch.autograd.backward(scored.hidden.sum())
    again = calls[len(forward) :]
    # Passes that were not kept run again, the last first.
    assert again == forward[: len(again)][::-1]
    kept = [rows * width for (rows, width), _ in forward[len(again) :]]
    assert sum(kept) <= budget or len(kept) == 1
    assert max(kept) == max(rows * width for (rows, width), _ in forward)
    assert (len(again) > 0) == (budget < 90 or (budget == 90 and len(forward) > 1))


def saved_elements(model: LanguageModel, batch: Rollouts) -> int:
    """What the graph of the forward pass holds, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scored = model.score(batch)
    del scored
    return sum(held.values())


def test_activations_of_one_pass_are_held(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["qwen3"])
    batch = random_rollouts(9, rows=40)
    model.group_lengths = False
    whole = saved_elements(model, batch)  # in one pass, padded to the longest row
    model.group_lengths = True
    tokens = len(batch) * 36
    for budget in (100, 400):
        model.max_tokens = budget
        assert saved_elements(model, batch) < 1.3 * whole * budget / tokens


def test_rows_of_different_lengths_take_several_passes_on_a_cpu(folders: dict[str, str]) -> None:
    """A launch costs little there, so even passes of a few hundred tokens are worth their own padding."""
    model, batch = LanguageModel(folders["qwen3"]), random_rollouts(9, rows=40)
    calls = watched(model)
    with torch.no_grad():
        scored = model.score(batch)
    tokens = sum(PackedRows(batch).lengths)
    padding = sum(rows * width for (rows, width), _ in calls) - tokens
    assert len(calls) > 1
    assert 2 * padding < 40 * max(PackedRows(batch).lengths) - tokens
    torch.testing.assert_close(scored.hidden, padded_batch(model, batch).hidden, rtol=0, atol=1e-5)


def test_nothing_is_checkpointed_without_gradient(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A call would fail. Without gradients nothing is recomputed, so the results do not show it.
    monkeypatch.setattr("opdlab.policies.passes.checkpoint", None)
    model, batch = LanguageModel(folders["qwen3"]), random_rollouts(8)
    model.max_tokens = 40
    snapshot = model.snapshot()
    calls = watched(snapshot)
    ((_, scored),) = snapshot.score_in_chunks(batch, len(batch))
    assert len(calls) > 2
    with torch.no_grad():
        model.max_tokens = None
        rows = next(iter(model.score_in_chunks(batch, len(batch))))
    torch.testing.assert_close(scored.hidden, rows[1].hidden, rtol=0, atol=1e-5)


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_rows_are_packed_with_flex_attention(
    folders: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a compiler; flex_attention has no backward pass on the CPU.
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention)
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda **options: create_block_mask(**{**options, "_compile": False}),
    )
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    model, batch = LanguageModel(folders[kind], attn_implementation="flex_attention"), random_rollouts(10)
    calls = watched(model)
    with torch.no_grad():
        wanted = padded_batch(LanguageModel(folders[kind]), batch).hidden
        for budget in (None, 60):
            model.max_tokens = budget
            torch.testing.assert_close(model.score(batch).hidden, wanted, rtol=1e-4, atol=1e-4)
    assert calls
    assert all(packed for _, packed in calls)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Flash attention's interface on the CPU: records the rows' ends of every call for several rows."""
    ends: list[list[int]] = []

    def dense(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window: int | None) -> Tensor:
        length, groups = q.shape[0], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (window or length))
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)

    def of_batch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return torch.stack([dense(*row, **options) for row in zip(q, k, v, strict=True)])

    def of_rows(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32  # flash attention takes no other type
        ends.append(cu_seqlens_q.tolist())
        sizes = cu_seqlens_q.diff().tolist()
        return torch.cat(
            [dense(*row, **options) for row in zip(*(torch.split(x, sizes) for x in (q, k, v)), strict=True)]
        )

    def options(softmax_scale: float, sliding_window: int | None = None, **others: Any) -> dict[str, Any]:
        if "max_seqlen_q" in others:
            assert isinstance(others["max_seqlen_q"], int)
        return {"softmax_scale": softmax_scale, "window": sliding_window}

    def refuse(position_ids: Tensor | None, batch_size: int) -> bool:
        # Finding the rows from the positions waits for the device in every layer.
        assert position_ids is None or bool((position_ids.diff() == 1).all())
        return False

    module = "transformers.modeling_flash_attention_utils"
    monkeypatch.setattr(
        f"{module}.lazy_import_flash_attention", lambda _: ((of_batch, of_rows, *3 * (None,)), (options, None))
    )
    monkeypatch.setattr(f"{module}._is_packed_sequence", refuse)
    return ends


@pytest.mark.parametrize("kind", EXACT)
def test_rows_are_packed_with_flash_attention(folders: dict[str, str], kind: str, flash: list[list[int]]) -> None:
    model, batch = LanguageModel(folders[kind]).double(), random_rollouts(11)
    wanted = weighted_gradients(model, padded_batch(model, batch))
    model.model.config._attn_implementation = "flash_attention_2"
    for budget in (40, None):
        calls = watched(model)
        flash.clear()
        model.max_tokens = budget
        check_equal(weighted_gradients(model, model.score(batch)), wanted, EXACT[kind])
        assert all(packed and rows == 1 for (rows, _), packed in calls)
        assert all(width <= (budget or width) for (_, width), _ in calls)
    assert len(calls) == 1
    assert len(flash[-1]) == 1 + int(batch.mask.any(1).sum())


@pytest.mark.parametrize("kind", HYBRIDS)
def test_layers_that_carry_on_into_the_next_row_are_found_out(folders: dict[str, str], kind: str) -> None:
    model, batch = loaded(folders[kind], "packed"), random_rollouts(12)
    calls = watched(model)
    model.max_tokens = 60
    with torch.no_grad():
        hidden = model.score(batch).hidden
        assert len(calls) > 1
        assert not any(packed for _, packed in calls)
        torch.testing.assert_close(hidden, right_padded(model, batch), rtol=1e-4, atol=1e-4)


def right_padded(model: LanguageModel, batch: Rollouts) -> Tensor:
    """Row by row, without any padding."""
    states = []
    for row in range(len(batch)):
        last = int((batch.mask[row] * torch.arange(1, batch.mask.shape[1] + 1)).max())
        prompt = batch.prompt_tokens[row][batch.prompt_mask[row]]
        tokens = torch.cat([prompt, batch.tokens[row, :last]])[None]
        hidden = model.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1][batch.mask[row, :last]])
    return torch.cat(states)


def test_positions_that_a_model_does_not_take_are_no_error(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"]).model
    forward = model.base_model.forward
    model.base_model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids, use_cache=use_cache)
    assert not keeps_packed_rows_apart(model)


def test_a_model_that_ignores_where_rows_begin_is_found_out(folders: dict[str, str]) -> None:
    for kind in ("qwen3", "gpt2"):
        model = LanguageModel(folders[kind]).model
        assert keeps_packed_rows_apart(model)
        forward = model.base_model.forward

        def deaf(position_ids: Any = None, forward: Any = forward, **inputs: Any) -> Any:
            return forward(**inputs)

        model.base_model.forward = deaf
        assert not keeps_packed_rows_apart(model)


def test_wrong_positions_are_found_out_though_nothing_leaks(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["gpt2"]).model  # adds an embedding of the position
    forward = model.base_model.forward

    def shifted(position_ids: Any = None, **inputs: Any) -> Any:
        return forward(position_ids=None if position_ids is None else position_ids + 3, **inputs)

    model.base_model.forward = shifted
    assert not keeps_packed_rows_apart(model)


def test_a_leak_no_larger_than_rounding_is_found_out(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["qwen3"]).model.bfloat16()
    forward = model.base_model.forward

    def leaking(position_ids: Any = None, **inputs: Any) -> Any:
        output = forward(position_ids=position_ids, **inputs)
        if position_ids is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, 1:] + 0.01 * hidden[:, :-1]], dim=1)
        return output

    model.base_model.forward = leaking
    assert not keeps_packed_rows_apart(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_rows_are_recognised_in_narrow_types(folders: dict[str, str], dtype: torch.dtype) -> None:
    for kind in EXACT:
        assert keeps_packed_rows_apart(LanguageModel(folders[kind]).model.to(dtype))
    attention, hybrid = (LanguageModel(folders[kind]).model for kind in ("qwen3", "lfm2"))
    with torch.autocast("cpu", torch.bfloat16):
        assert keeps_packed_rows_apart(attention)
        assert not keeps_packed_rows_apart(hybrid)
    assert not keeps_packed_rows_apart(hybrid.to(dtype))


def test_only_kernels_that_skip_other_rows_are_asked_to_pack(folders: dict[str, str]) -> None:
    model = LanguageModel(folders["qwen3"]).model
    allowed = {}
    for name in (
        "eager",
        "sdpa",
        "flex_attention",
        "flash_attention_2",
        "flash_attention_3",
        "kernels-community/flash-attn2",
    ):
        model.config._attn_implementation = name
        allowed[name] = attention_may_pack(model)
    assert [name for name, packs in allowed.items() if not packs] == ["eager", "sdpa"]


def test_rows_are_compared_once_for_each_kernel(folders: dict[str, str]) -> None:
    model, batch = loaded(folders["qwen3"], "packed"), random_rollouts(13)
    calls: list[Any] = []
    model.model.base_model.register_forward_pre_hook(lambda *inputs: calls.append(inputs))
    passes = []
    for kernel in (FLASH_LIKE[0], FLASH_LIKE[0], FLASH_LIKE[1], FLASH_LIKE[1]):
        model.model.config._attn_implementation = kernel
        calls.clear()
        model.score(batch)
        passes.append(len(calls))
    assert passes == [9, 1, 9, 1]  # five passes compare packed rows, three the last layer's part
