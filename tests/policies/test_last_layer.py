"""The last layer's feed-forward part skips what is not read: same states and gradients, and only where that holds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, Llama4TextConfig, MixtralConfig, OPTConfig, PreTrainedModel, Qwen3MoeConfig

from opdlab.policies.last_layer import last_feed_forward
from opdlab.policies.loading import checkpoint_gradients
from opdlab.policies.passes import Pass
from tests.policies.test_decoding import random_model
from tests.policies.tiny_models import COMMON, CONFIGS

EXPERTS = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3 moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
# Their part takes the residual too, has another name, or returns its router's logits.
OTHERS = {"bloom": BloomConfig, "opt": OPTConfig, "llama4": Llama4TextConfig}
TOKENS = (torch.arange(24) % 37 + 1).view(3, 8)


def reading(*positions: int) -> Pass:
    return Pass(TOKENS, torch.tensor(positions))


def part_of(model: PreTrainedModel) -> nn.Module:
    part = last_feed_forward(model)
    assert part is not None
    return part


def states_and_gradients(model: PreTrainedModel, one: Pass, part: nn.Module | None) -> list[Tensor]:
    model.zero_grad()
    states = one.states(model.base_model, part)
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()  # type: ignore[no-untyped-call]
    return [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", [*CONFIGS, *EXPERTS])
def test_states_and_gradients_are_those_of_the_whole_layer(name: str) -> None:
    model = random_model((CONFIGS | EXPERTS)[name]())
    model = model if name in EXPERTS else model.double()  # transformers has no experts in double precision
    part, one = part_of(model), reading(3, 4, 7, 12, 23)
    ours, whole = states_and_gradients(model, one, part), states_and_gradients(model, one, None)
    assert len(ours) == len(whole)
    # Gemma's norms compute in float32 in any case.
    for mine, theirs in zip(ours, whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize(("positions", "computed"), [((3, 4, 12), 3), (tuple(range(23)), 24)])
def test_only_what_is_read_is_computed_where_that_is_worthwhile(positions: tuple[int, ...], computed: int) -> None:
    model, seen = random_model(CONFIGS["llama"]()), []
    part: Any = part_of(model)
    part.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    reading(*positions).states(model.base_model, part)
    assert seen == [computed]


class LaterLayer(nn.Module):
    """Takes the place of the last norm, and mixes positions as another layer would."""

    def forward(self, states: Tensor) -> Tensor:
        return states.cumsum(1)


class Mixing(nn.Module):
    """A feed-forward part that reads the position before, as RWKV's does."""

    def forward(self, states: Tensor) -> Tensor:
        return states + states.roll(1, dims=1)


def test_it_is_refused_where_states_would_differ() -> None:
    followed, mixing = random_model(CONFIGS["llama"]()), random_model(CONFIGS["llama"]())
    followed.base_model.norm = LaterLayer()
    mixing.base_model.layers[-1].mlp = Mixing()
    for model in (followed, mixing, *(random_model(config(**COMMON)) for config in OTHERS.values())):
        assert last_feed_forward(model) is None


def test_it_is_refused_where_the_layer_is_computed_again() -> None:
    model = random_model(CONFIGS["llama"]())
    checkpoint_gradients(model, "model")
    assert last_feed_forward(model) is None


def test_a_pass_that_fails_leaves_the_part_as_it_was() -> None:
    model = random_model(CONFIGS["llama"]())
    part: Any = part_of(model)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = part.down_proj.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        reading(3).states(model.base_model, part)
    handle.remove()
    assert "forward" not in vars(part)
    torch.testing.assert_close(reading(3).states(model.base_model, part), reading(3).states(model.base_model))
