"""Samples depend on their streams alone: not on the batch, on other prompts, on their order or on the loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from opdlab.errors import UsageError
from opdlab.policies import BehaviorPolicy, LanguageModel, SamplingConfig, TransformersSampler, sample_rollouts
from opdlab.policies.demonstrations import Given
from opdlab.seeds import derive_streams
from opdlab.toy import ChainProblems
from opdlab.types import Rollouts
from tests.toy_run import STUDENT

CONFIG = SamplingConfig(num_samples=3, max_new_tokens=24)
Responses = dict[tuple[int, int], list[int]]


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(STUDENT)


@pytest.fixture(scope="module")
def exact() -> LanguageModel:
    """The student in double precision, in which rounding decides about no token."""
    return LanguageModel(STUDENT).double()


@pytest.fixture(scope="module")
def prompts(student: LanguageModel) -> list[list[int]]:
    texts = [problem.text for problem in ChainProblems(10, split="held_out").problems()]
    return [student.tokenizer(text)["input_ids"] for text in texts]


def sampled(
    model: LanguageModel, prompts: list[list[int]], numbers: list[int], config: SamplingConfig, **options: Any
) -> Rollouts:
    sampler = TransformersSampler()
    sampler.refresh(model, 0)
    streams = derive_streams("test", 0, keys=numbers, num_samples=config.num_samples)
    chosen, config = [prompts[number] for number in numbers], replace(config, **options)
    return sample_rollouts(sampler, model, chosen, streams, config, prompt_ids=numbers)


def responses(*parts: Rollouts) -> Responses:
    """Return the tokens of each response, by its prompt and its number."""
    found: Responses = {}
    for part in parts:
        for prompt, tokens, mask in zip(part.prompt_ids.tolist(), part.tokens, part.mask, strict=True):
            number = sum(key[0] == prompt for key in found)
            found[prompt, number] = tokens[mask].tolist()
    return found


def variants(model: LanguageModel, prompts: list[list[int]], config: SamplingConfig) -> dict[str, Responses]:
    """Sample the same responses in other batches, another order, and several calls."""
    numbers = list(range(len(prompts)))
    mixed = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "1 row": responses(sampled(model, prompts, numbers, config, batch_size=1)),
        "7 rows": responses(sampled(model, prompts, numbers, config, batch_size=7)),
        "64 rows": responses(sampled(model, prompts, numbers, config, batch_size=64)),
        "order": responses(sampled(model, prompts, mixed, config)),
        "calls": responses(*(sampled(model, prompts, mixed[i : i + 4], config) for i in range(0, len(mixed), 4))),
    }


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "top_p": 0.8}])
def test_batches_order_and_calls_do_not_change_the_samples(
    exact: LanguageModel, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    first, *others = variants(exact, prompts, replace(CONFIG, **options)).values()
    assert len({tuple(tokens) for tokens in first.values()}) > 15
    for other in others:
        assert other == first


def test_single_precision_changes_a_sample_at_most(student: LanguageModel, prompts: list[list[int]]) -> None:
    # A logit is rounded in another way in another batch: a few in 10^6 tokens cross the border to their neighbour.
    first, *others = variants(student, prompts, CONFIG).values()
    for other in others:
        assert sum(other[key] != tokens for key, tokens in first.items()) <= 1


def test_both_loops_give_the_same_samples(
    exact: LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, temperature=1.2, top_p=0.9, num_samples=2)
    ours = responses(sampled(exact, prompts, list(range(10)), config))
    monkeypatch.setattr("opdlab.policies.transformers_sampler.uses_own_loop", lambda model: False)
    assert responses(sampled(exact, prompts, list(range(10)), config, batch_size=9)) == ours


def test_the_number_of_samples_does_not_change_the_first_ones(exact: LanguageModel, prompts: list[list[int]]) -> None:
    three = responses(sampled(exact, prompts, [3, 4], CONFIG))
    two = responses(sampled(exact, prompts, [3, 4], replace(CONFIG, num_samples=2)))
    assert {key: tokens for key, tokens in three.items() if key[1] < 2} == two


def test_a_prompt_that_occurs_again_gets_other_samples(exact: LanguageModel, prompts: list[list[int]]) -> None:
    behavior = BehaviorPolicy(exact, replace(CONFIG, num_samples=1))
    unscored = torch.arange(4)
    rollouts = behavior.sample([prompts[3]] * 4, [3] * 4, seed=0, unscored=unscored)
    assert len({tuple(tokens) for tokens in rollouts.tokens.tolist()}) == 4
    four = behavior.sample([prompts[3]], [3], seed=0, num_samples=4, unscored=unscored)
    assert torch.equal(four.tokens, rollouts.tokens)
    other = behavior.sample([prompts[3]] * 4, [3] * 4, seed=1, unscored=unscored)
    assert not torch.equal(other.tokens, rollouts.tokens)


def test_a_demonstration_takes_the_place_of_a_sample(exact: LanguageModel, prompts: list[list[int]]) -> None:
    behavior = BehaviorPolicy(exact, CONFIG)
    options: dict[str, Any] = {"seed": 0, "unscored": torch.arange(9)}
    plain = responses(behavior.sample(prompts[:3], [0, 1, 2], **options))
    given = [Given([5, 6], [True, True], count) for count in (0, 1, 3)]
    beside = responses(behavior.sample(prompts[:3], [0, 1, 2], given=given, **options))
    for (prompt, number), tokens in beside.items():
        assert tokens == ([5, 6, 1] if number < given[prompt].count else plain[prompt, number])


def test_a_model_that_draws_its_tokens_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(STUDENT)

    def generate(tokens: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([tokens, torch.full((len(tokens), 3), 7)], 1)

    monkeypatch.setattr(model.model, "generate", generate)
    monkeypatch.setattr("opdlab.policies.transformers_sampler.uses_own_loop", lambda model: False)
    with pytest.raises(UsageError, match="Qwen3ForCausalLM generates in a way of its own, which does not take the tok"):
        sampled(model, [[5, 6]], [0], CONFIG)
