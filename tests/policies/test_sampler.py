"""Sampling: determined by the seed, and from the model's distribution."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, MambaConfig, Qwen3ForCausalLM

from opdlab.errors import UsageError
from opdlab.policies import LanguageModel, SamplingConfig, TransformersSampler
from opdlab.progress import SilentProgress
from opdlab.toy import chain_tokenizer
from opdlab.toy.make_models import toy_config
from opdlab.types import Rollouts, StopReason
from tests.policies.tiny_models import IDS, sampled, save_random

PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 12, 3]]
CONFIG = SamplingConfig(num_samples=4, max_new_tokens=12)


def random_model(folder: Path, spread: float, vocab_size: int = 38) -> LanguageModel:
    tokenizer = chain_tokenizer()
    config = toy_config(tokenizer, hidden_size=32)
    config.initializer_range, config.vocab_size = spread, vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LanguageModel(str(folder)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    # Tokens of unequal probability, all of them possible.
    return random_model(tmp_path_factory.mktemp("model"), spread=0.15)


@pytest.fixture
def own(tmp_path: Path) -> LanguageModel:
    """A model equal to ``model``, for a test that changes it."""
    return random_model(tmp_path, spread=0.15)


@pytest.fixture(autouse=True, params=["own loop", "loop of transformers"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Any, *inputs: Any, **kwargs: Any) -> Any:  # generate looks for this name
        return GenerationMixin.prepare_inputs_for_generation(self, *inputs, **kwargs)

    if request.param != "own loop":  # which leaves models that prepare their own inputs to transformers
        monkeypatch.setattr(Qwen3ForCausalLM, "prepare_inputs_for_generation", prepare)


def sample(model: LanguageModel, seed: int = 0, prompts: list[list[int]] = PROMPTS, **options: Any) -> Rollouts:
    return sampled(model, replace(CONFIG, **options), prompts, seed)


def equal(one: Rollouts, other: Rollouts) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("prompt_tokens", "prompt_mask", "tokens", "mask", "stop_reasons")
    )


@torch.no_grad()
def next_token_probabilities(model: LanguageModel, prompt: list[int], temperature: float = 1.0) -> Tensor:
    logits: Tensor = model.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return (logits.double() / temperature).softmax(-1)


def frequencies(samples: Rollouts) -> Tensor:
    return torch.bincount(samples.tokens[:, 0], minlength=38).double() / len(samples.tokens)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its degrees of freedom: near 1 where the counts follow the probabilities.

    Outcomes that are expected fewer than five times count as one, since a single rare one would decide.
    """
    assert not counts[probabilities <= 0].any()
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat([each[~rare], each[rare].sum()[None]]) for each in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected).square() / expected).sum() / (len(expected) - 1))


def test_samples_may_take_part_in_training(model: LanguageModel) -> None:
    sampler = TransformersSampler()
    sampler.refresh(model, 0)
    samples = sampler.sample(PROMPTS, torch.arange(len(PROMPTS))[:, None], CONFIG, SilentProgress())
    scale = torch.ones(1, requires_grad=True)
    # Saves the tokens, which tensors of inference mode refuse.
    (scale * samples.tokens).sum().backward()  # type: ignore[no-untyped-call]


def test_same_seed_same_samples_whatever_was_drawn_before(model: LanguageModel) -> None:
    torch.manual_seed(0)
    first = sample(model)
    torch.manual_seed(99)
    torch.rand(1000)
    assert equal(sample(model), first)
    assert not torch.equal(sample(model, seed=1).tokens[:, :3], first.tokens[:, :3])


def test_global_generators_are_left_alone(model: LanguageModel) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    sample(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]


def test_samples_of_one_prompt_and_of_batches_differ(model: LanguageModel) -> None:
    # Equal prompts, each in a batch of its own.
    samples = sample(model, prompts=[[5]] * 8, num_samples=1, batch_size=1, max_new_tokens=8)
    assert len({tuple(row) for row in samples.tokens.tolist()}) > 4


def test_shapes_and_padding(model: LanguageModel) -> None:
    samples = sample(model)
    assert samples.prompt_tokens.shape == samples.prompt_mask.shape == (12, 5)
    for row, prompt in enumerate([prompt for prompt in PROMPTS for _ in range(4)]):
        assert samples.prompt_tokens[row][samples.prompt_mask[row]].tolist() == prompt
        assert samples.prompt_mask[row].tolist() == [False] * (5 - len(prompt)) + [True] * len(prompt)
    assert samples.tokens.shape == samples.mask.shape
    assert samples.tokens.shape[1] == int(samples.mask.sum(1).max()) <= 12


def test_mask_ends_with_the_stop_token(model: LanguageModel) -> None:
    samples = sample(model, prompts=[[5, 9]] * 40, max_new_tokens=20, batch_size=50)
    reasons = set()
    for tokens, mask, reason in zip(samples.tokens, samples.mask, samples.stop_reasons, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert 1 not in tokens[: length - 1]
        stopped = int(tokens[length - 1]) == 1
        assert stopped or length == 20
        assert StopReason(int(reason)) == (StopReason.EOS if stopped else StopReason.LENGTH)
        reasons.add(StopReason(int(reason)))
    assert reasons == {StopReason.EOS, StopReason.LENGTH}


def test_a_stop_token_in_the_last_place_is_a_stop(own: LanguageModel) -> None:
    own.stop_ids = list(range(38))
    samples = sample(own, max_new_tokens=1)
    assert samples.stop_reasons.tolist() == [StopReason.EOS] * 12
    assert samples.mask.all()


def test_every_stop_token_stops(own: LanguageModel) -> None:
    own.stop_ids = [1, *range(10, 24)]
    samples = sample(own, num_samples=16, max_new_tokens=20)
    last = samples.tokens[torch.arange(48), samples.mask.sum(1) - 1]
    stops = torch.isin(samples.tokens, torch.tensor(own.stop_ids)) & samples.mask
    assert torch.equal(stops.sum(1) == 1, samples.stop_reasons == StopReason.EOS)
    assert len(set(last.tolist())) > 3


def test_no_more_tokens_than_allowed(model: LanguageModel) -> None:
    samples = sample(model, max_new_tokens=3)
    assert samples.tokens.shape[1] <= 3
    assert sample(model, max_new_tokens=1).tokens.shape == (12, 1)


def test_samples_are_continued_from_the_prompt_without_its_padding(model: LanguageModel) -> None:
    # Nearly greedy: each response must then be the likeliest continuation of the unpadded prompt.
    samples = sample(model, temperature=1e-4, max_new_tokens=4, num_samples=1)
    for prompt, tokens, mask in zip(PROMPTS, samples.tokens, samples.mask, strict=True):
        so_far = list(prompt)
        for token in tokens[mask].tolist():
            assert token == int(next_token_probabilities(model, so_far).argmax())
            so_far.append(token)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_models_probabilities(model: LanguageModel, temperature: float) -> None:
    prompt = [5, 9, 3]
    samples = sample(
        model, prompts=[prompt], num_samples=4000, max_new_tokens=1, batch_size=4000, temperature=temperature
    )
    counts = frequencies(samples) * 4000
    probabilities = next_token_probabilities(model, prompt, temperature)
    # 37 degrees of freedom: a standard deviation of 0.23.
    assert chi_square(counts, probabilities) < 2
    assert chi_square(counts, torch.full((38,), 1 / 38, dtype=torch.float64)) > 4


def test_second_tokens_follow_the_models_probabilities(model: LanguageModel) -> None:
    samples = sample(model, prompts=[[5, 9, 3]], num_samples=4000, max_new_tokens=2, batch_size=4000)
    first = int(samples.tokens[:, 0].bincount(minlength=38).index_fill(0, torch.tensor([1]), 0).argmax())
    seconds = samples.tokens[samples.tokens[:, 0] == first, 1]
    counts = seconds.bincount(minlength=38).double()
    assert counts.sum() > 200
    assert chi_square(counts, next_token_probabilities(model, [5, 9, 3, first])) < 2.5


@pytest.mark.parametrize("top_p", [0.9, 0.5, 0.05])
def test_top_p(model: LanguageModel, top_p: float) -> None:
    prompt = [5, 9, 3]
    samples = sample(model, prompts=[prompt], num_samples=2000, max_new_tokens=1, batch_size=2000, top_p=top_p)
    probabilities = next_token_probabilities(model, prompt)
    ranked = probabilities.sort(descending=True)
    size = int((ranked.values.cumsum(0) < top_p).sum()) + 1  # the smallest set that holds top_p
    nucleus = torch.zeros_like(probabilities).index_copy(0, ranked.indices[:size], ranked.values[:size])
    counts = frequencies(samples) * 2000
    assert not counts[nucleus == 0].any()
    if size > 1:
        assert chi_square(counts, nucleus / nucleus.sum()) < 2


def test_the_models_own_generation_defaults_are_ignored_and_kept(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sample(model)
    own = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, min_new_tokens=12, temperature=0.1, eos_token_id=7
    )
    monkeypatch.setattr(model.model, "generation_config", own)
    before = own.to_dict()
    assert equal(sample(model), plain)
    assert model.model.generation_config is own
    assert own.to_dict() == before


def test_no_token_is_too_unlikely(tmp_path: Path) -> None:
    # From 80 about equally likely tokens; by default transformers samples from the 50 likeliest.
    flat = random_model(tmp_path, spread=0.01, vocab_size=80)
    flat.vocab_size = 80  # as if each row had a token
    samples = sample(flat, prompts=[[5]], num_samples=2000, max_new_tokens=1, batch_size=2000)
    assert len(set(samples.tokens.flatten().tolist())) == 80


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(model: LanguageModel, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train(training)
    own = model.model.generation_config
    sample(model)
    assert model.model.training is training

    def fail(*args: Any, **kwargs: Any) -> None:
        assert not model.model.training
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "generate", fail)
        with pytest.raises(KeyboardInterrupt):
            sample(model)
    assert model.model.training is training
    assert model.model.generation_config is own
    model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_no_more_rows_at_a_time_than_allowed(model: LanguageModel, batch_size: int) -> None:
    rows: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    sample(model, batch_size=batch_size)
    hook.remove()
    assert max(rows) == batch_size


class _Bar:
    """A progress bar that only counts."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def task(self, name: str, total: int) -> "_Bar":
        self.total += total
        return self

    def __enter__(self) -> Any:
        return self.advance

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, num_units: int) -> None:
        self.done += num_units


@pytest.mark.parametrize("batch_size", [5, 64])
def test_progress_reaches_its_total(own: LanguageModel, batch_size: int) -> None:
    own.stop_ids = [1, *range(10, 38)]  # so that no response has full length
    assert sample(own, batch_size=batch_size).tokens.shape[1] < 12
    bar = _Bar()
    sampled(own, replace(CONFIG, batch_size=batch_size), PROMPTS, 0, bar)
    assert bar.done == bar.total > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_samples", 0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("max_new_tokens", 0),
        ("batch_size", 0),
    ],
)
def test_bad_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{key} is {value}, but must be"):
        SamplingConfig(**{key: value})  # type: ignore[arg-type]


def test_sampled_from_a_folder_whose_defaults_would_change_the_samples(model: LanguageModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 1, "repetition_penalty": 5.0, "eos_token_id": 1, "pad_token_id": 0}'
    )
    assert equal(sample(LanguageModel(str(tmp_path)).eval()), sample(model))


def test_a_model_whose_rows_cannot_leave_is_sampled_too(tmp_path: Path) -> None:
    # A state instead of keys and values: sampled with the loop of transformers, whatever the fixture says.
    config = MambaConfig(**IDS, vocab_size=38, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    mamba = LanguageModel(str(save_random(tmp_path, config))).eval()
    samples = sample(mamba, prompts=[[5, 9, 3]], temperature=1e-5, max_new_tokens=6, batch_size=3)
    so_far = [5, 9, 3]
    for token in samples.tokens[0][samples.mask[0]].tolist():
        assert token == int(next_token_probabilities(mamba, so_far).argmax())
        so_far.append(token)
    assert len(so_far) > 4
    assert torch.equal(samples.tokens, samples.tokens[:1].expand(4, -1))
