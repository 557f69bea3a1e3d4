"""The decoding loop: results of transformers' own loops, samples from the model's distribution, no wasted work."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GPT2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Phi3Config,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from opdlab.policies import LanguageModel, decoding, decoding_cache
from opdlab.policies.decoding import Decoding, why_not_selectable
from opdlab.seeds import derive_streams
from opdlab.toy.chain import chain_problems
from tests.policies.tiny_models import COMMON, CONFIGS, IDS

STOPS = [1, 5, 6, 7]
# More prompts than rows, of many lengths.
PROMPTS = [[(7 * i + j) % 30 + 8 for j in range(1 + 5 * i % 7)] for i in range(9)]


def random_model(config: Any) -> PreTrainedModel:
    config.tie_word_embeddings = False  # tied, random models repeat their last token for ever
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def small_model(vocab_size: int) -> PreTrainedModel:
    return random_model(LlamaConfig(**{**COMMON, "vocab_size": vocab_size, "initializer_range": 0.15}))


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": tokens, "attention_mask": mask}


def decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    num_samples: int = 1,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> Tensor:
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": STOPS, "pad_token_id": 0, **settings}
    config = GenerationConfig(**settings)
    model.generation_config = config
    streams = derive_streams("decode", 0, keys=range(len(prompts)), num_samples=num_samples)
    loop = Decoding(streams, batch_size, advance)
    output: Tensor = model.generate(**padded(prompts), generation_config=config, custom_generate=loop)
    return output


def until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stops), tokens)


def greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, stops: list[int]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=0)
    model.generation_config = config
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=config)
    return until_stop(output[0, len(prompt) :].tolist(), stops)


@pytest.mark.parametrize(("batch_size", "room"), [(3, 2), (64, 32)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_likeliest_tokens_are_those_of_plain_generate(
    name: str, batch_size: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every architecture, every kind of layer; rows leave and enter; the cache has too little room, or enough.
    monkeypatch.setattr(decoding_cache, "MIN_ROOM", room)
    model = random_model(CONFIGS[name]())
    output = decode(model, PROMPTS, 2, batch_size, temperature=1e-6, max_new_tokens=12)
    assert output.shape == (18, 12)
    lengths = set()
    for row, tokens in enumerate(output.tolist()):
        expected = greedy(model, PROMPTS[row // 2], 12, STOPS)
        assert tokens == expected + [0] * (12 - len(expected))
        lengths.add(len(expected))
    assert len(lengths) > 1


def test_the_likeliest_tokens_of_the_toy() -> None:
    model = LanguageModel("package://opdlab.toy/models/student")
    prompts = [
        model.tokenizer.encode(chain.prompt)[: 40 + 2 * i]
        for i, chain in enumerate(itertools.islice(chain_problems("train", 0), 6))
    ]
    output = decode(model.model.eval(), prompts, 2, 4, temperature=1e-6, max_new_tokens=60, eos_token_id=[1, 35])
    for row, tokens in enumerate(output.tolist()):
        expected = greedy(model.model, prompts[row // 2], 60, [1, 35])
        assert tokens == expected + [0] * (60 - len(expected))


@torch.no_grad()
def sequence_probabilities(
    model: PreTrainedModel, prompt: list[int], stops: list[int], length: int, temperature: float, top_p: float
) -> dict[tuple[int, ...], float]:
    """Of every response of at most ``length`` tokens: one forward pass per prefix, without cache or padding."""
    finished: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for position in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for prefix, probability in open_.items():
            logits = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double()
            following = (logits / temperature).softmax(-1)
            ranked = following.sort(descending=True)
            size = int((ranked.values.cumsum(0) < top_p).sum()) + 1
            nucleus = torch.zeros_like(following).index_copy(0, ranked.indices[:size], ranked.values[:size])
            for token, share in enumerate((nucleus / nucleus.sum()).tolist()):
                if share:
                    ends = token in stops or position == length - 1
                    (finished if ends else longer)[*prefix, token] = probability * share
        open_ = longer
    return finished


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
def test_responses_follow_the_models_distribution(temperature: float, top_p: float) -> None:
    model, prompts, stops, samples = small_model(7), [[3, 4], [5], [3, 2, 6, 4]], [1, 2], 1500
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "eos_token_id": stops, "max_new_tokens": 4}
    output = decode(model, prompts, samples, batch_size=256, **options)
    statistic = freedom = 0.0
    for index, prompt in enumerate(prompts):
        expected = sequence_probabilities(model, prompt, stops, 4, temperature, top_p)
        assert sum(expected.values()) == pytest.approx(1)
        counts = dict.fromkeys(expected, 0)
        for row in output[index * samples : (index + 1) * samples].tolist():
            counts[tuple(until_stop(row, stops))] += 1  # a KeyError means an impossible response
        rare = [key for key, share in expected.items() if share * samples < 5]
        for keys in [*([key] for key in expected if key not in rare), rare]:
            mean = samples * sum(expected[key] for key in keys)
            if mean >= 5:
                statistic += (sum(counts[key] for key in keys) - mean) ** 2 / mean
                freedom += 1
        freedom -= 1
    assert freedom > 30
    # Normal for so many degrees of freedom: within three and a half standard deviations.
    assert abs(statistic - freedom) < 3.5 * (2 * freedom) ** 0.5


class _Passes:
    """Records what the model is fed."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.widths: list[int] = []
        forward = model.forward

        def recording(input_ids: Tensor, **options: Any) -> Any:
            [cache] = [value for value in options.values() if isinstance(value, Cache)]
            self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
            self.widths.append(cache.get_seq_length() + input_ids.shape[1])
            return forward(input_ids=input_ids, **options)

        recording.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(model, "forward", recording)


def test_a_prompt_is_read_once_for_all_its_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    passes = _Passes(model, monkeypatch)
    decode(model, PROMPTS, num_samples=6, batch_size=64, max_new_tokens=5, eos_token_id=1)
    assert passes.shapes[0] == (9, 7)
    assert all(width == 1 for _, width in passes.shapes[1:])
    passes.shapes.clear()
    # Two whole prompts fit into 13 rows: one free row is not worth reading a third one twice.
    decode(model, PROMPTS, num_samples=6, batch_size=13, max_new_tokens=5, eos_token_id=38)
    assert [rows for rows, _ in passes.shapes if rows not in (6, 12)] == [2, 2, 2, 2, 1]
    passes.shapes.clear()
    # Five free rows are.
    decode(model, PROMPTS, num_samples=6, batch_size=11, max_new_tokens=5, eos_token_id=38)
    assert [rows for rows, _ in passes.shapes if rows not in (10, 11)] == [2, 3, 3, 3, 2]


def test_rows_that_are_done_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    passes = _Passes(model, monkeypatch)
    output = decode(model, PROMPTS, num_samples=40, batch_size=360, max_new_tokens=40)
    tokens = sum(len(until_stop(row, STOPS)) for row in output.tolist())
    fed = sum(rows for rows, width in passes.shapes if width == 1)
    assert tokens - 360 <= fed < 1.2 * tokens  # the first tokens come from the prompts, the last are never inputs
    assert passes.shapes[-1][0] < 20


def test_waiting_rows_take_the_places_of_those_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    passes = _Passes(model, monkeypatch)
    output = decode(model, PROMPTS, num_samples=40, batch_size=40, max_new_tokens=40)
    longest = [max(len(until_stop(row, STOPS)) for row in output[i : i + 40].tolist()) for i in range(0, 360, 40)]
    steps = sum(1 for _, width in passes.shapes if width == 1)
    assert steps < 0.7 * sum(longest)
    assert max(rows for rows, _ in passes.shapes) <= 40
    # Columns that no row uses any more are dropped: otherwise the cache would have one for each step.
    assert max(passes.widths) <= 7 + 40
    assert steps > 7 + 40


def test_the_batch_size_bounds_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(38)
    passes = _Passes(model, monkeypatch)
    for num_samples, batch_size in ((7, 3), (2, 1), (3, 4)):
        passes.shapes.clear()
        assert decode(model, PROMPTS, num_samples, batch_size, max_new_tokens=6).shape == (9 * num_samples, 6)
        assert max(rows for rows, _ in passes.shapes) <= batch_size


def test_rows_that_are_done_neither_go_on_nor_widen_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    # Columns stay long here, beside rows that entered later; with the constants' own values they seldom do.
    # Absolute positions, exactly as many as are needed.
    monkeypatch.setattr(decoding, "LEAVE_SHARE", 0.9)
    monkeypatch.setattr(decoding, "ENTER_SHARE", 0.9)
    config = GPT2Config(**IDS, vocab_size=38, n_embd=32, n_layer=2, n_head=4, n_positions=7 + 20 - 1)
    model = random_model(config)
    passes = _Passes(model, monkeypatch)
    output = decode(model, PROMPTS, num_samples=10, batch_size=10, max_new_tokens=20, eos_token_id=[1, 5])
    assert {1, 20} <= {len(until_stop(row, [1, 5])) for row in output.tolist()}
    assert max(passes.widths) == 7 + 20


def test_looks_are_rarer_where_they_make_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sampling continues for a few tokens after a stop; none of them is returned. Only a GPU is looked at more rarely.
    model = random_model(CONFIGS["llama"]())
    each = decode(model, PROMPTS, 2, 3, temperature=1e-6, max_new_tokens=11)
    monkeypatch.setattr(decoding, "look_every", lambda device: 4)
    assert torch.equal(decode(model, PROMPTS, 2, 3, temperature=1e-6, max_new_tokens=11), each)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_progress_counts_tokens(batch_size: int) -> None:
    ticks: list[int] = []
    output = decode(small_model(38), PROMPTS, 2, batch_size, ticks.append, max_new_tokens=20)
    assert sum(ticks) == output.numel() == 18 * 20
    assert min(ticks) >= 0
    assert len(ticks) >= max(len(until_stop(row, STOPS)) for row in output.tolist())


UNKNOWN: dict[str, Callable[[], Any]] = {
    "mamba": lambda: MambaConfig(**IDS, vocab_size=38, hidden_size=32, num_hidden_layers=1, state_size=4),
    "jamba": lambda: JambaConfig(
        **{**COMMON, "num_hidden_layers": 2}, attn_layer_period=2, attn_layer_offset=1, num_experts=1
    ),
    "llama4 chunked": lambda: Llama4TextConfig(
        **COMMON, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=64
    ),
    "phi3": lambda: Phi3Config(**COMMON),  # prepares its inputs itself
}


@pytest.mark.parametrize("name", CONFIGS)
def test_known_models(name: str) -> None:
    assert why_not_selectable(random_model(CONFIGS[name]())) is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_that_carry_something_else_are_left_to_transformers(name: str) -> None:
    assert why_not_selectable(random_model(UNKNOWN[name]())) is not None


def test_an_encoder_is_left_to_transformers() -> None:
    config = T5Config(vocab_size=38, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    assert why_not_selectable(T5ForConditionalGeneration(config)) is not None


@pytest.mark.parametrize("method", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_models_that_generate_in_a_way_of_their_own_are_left_to_transformers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(38)
    assert why_not_selectable(model) is None
    monkeypatch.setattr(type(model), method, lambda self, *args, **kwargs: None)
    assert why_not_selectable(model) is not None


def test_models_with_a_state_of_their_own_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    assert why_not_selectable(small_model(38)) is not None
