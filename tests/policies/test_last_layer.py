"""The last layer's feed-forward part skips what is not read: same states and gradients, and only where that holds."""

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    HrmTextConfig,
    Llama4TextConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from opdlab.policies import LanguageModel
from opdlab.policies.last_layer import prepare
from opdlab.policies.loading import checkpoint_gradients
from opdlab.policies.passes import Pass
from tests.policies.test_decoding import random_model
from tests.policies.tiny_models import COMMON, CONFIGS, rollouts, save_random

EXPERTS = {
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3 moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
# Their part has another name.
OTHERS = {"opt": OPTConfig, "llama4": Llama4TextConfig}
TOKENS = (torch.arange(24) % 37 + 1).view(3, 8)


def reading(*positions: int) -> Pass:
    return Pass(TOKENS, torch.tensor(positions, dtype=torch.long))


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    assert prepare(model) is not None
    return model


def states_and_gradients(model: PreTrainedModel, one: Pass, skips: bool) -> list[Tensor | None]:
    model.zero_grad()
    states = one.states(model.base_model, skips)
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()  # type: ignore[no-untyped-call]
    return [states.detach(), *(parameter.grad for parameter in model.parameters())]


# Bloom's part takes the residual too, so it is computed everywhere.
KINDS = CONFIGS | EXPERTS | {"bloom": lambda: BloomConfig(**COMMON)}


@pytest.mark.parametrize("name", KINDS)
def test_states_and_gradients_are_those_of_the_whole_layer(name: str) -> None:
    model = random_model(KINDS[name]())
    model = model if name in EXPERTS else model.double()  # transformers has no experts in double precision
    one = reading(3, 4, 7, 12, 23)
    ours, whole = (states_and_gradients(prepared(model), one, skips) for skips in (True, False))
    # Gemma's norms compute in float32 in any case.
    for mine, theirs in zip(ours, whole, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:  # the head
            continue
        torch.testing.assert_close(mine, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=0)


@pytest.mark.parametrize(("positions", "computed"), [((3, 4, 12), 3), (tuple(range(23)), 24), ((), 24)])
def test_only_what_is_read_is_computed_where_that_is_worthwhile(positions: tuple[int, ...], computed: int) -> None:
    model, seen = prepared(random_model(CONFIGS["llama"]())), []
    part: Any = model.base_model.layers[-1].mlp
    part.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:-1].numel()))
    reading(*positions).states(model.base_model, skips=True)
    assert seen == [computed]


def test_every_parameter_takes_a_gradient_where_nothing_is_read() -> None:
    config = EXPERTS["mixtral"]()
    config._experts_implementation = "eager"  # without a token, no expert is called
    model = prepared(random_model(config))
    _, *gradients = states_and_gradients(model, reading(), skips=True)
    missing = [name for (name, _), each in zip(model.named_parameters(), gradients, strict=True) if each is None]
    assert missing == ["lm_head.weight"]


class LaterLayer(nn.Module):
    """Takes the place of the last norm, and mixes positions as another layer would, by so little that it looks like
    rounding."""

    def forward(self, states: Tensor) -> Tensor:
        return states + 1e-5 * states.cumsum(1)


class Mixing(nn.Module):
    """A feed-forward part that reads the position before, as RWKV's does."""

    def forward(self, states: Tensor) -> Tensor:
        return states + states.roll(1, dims=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_refused_where_states_would_differ(dtype: torch.dtype) -> None:
    followed, mixing = random_model(CONFIGS["llama"]()), random_model(CONFIGS["llama"]())
    followed.base_model.norm = LaterLayer()
    mixing.base_model.layers[-1].mlp = Mixing()
    others = [random_model(config(**COMMON)) for config in OTHERS.values()]
    for model in (followed, mixing, *others):
        layers = [module for module in model.modules() if "mlp" in dict(module.named_children())]
        assert prepare(model.to(dtype)) is None
        assert not any("forward" in vars(layer.mlp) for layer in layers)


def test_layers_that_run_in_a_loop_are_found_out() -> None:
    config = HrmTextConfig(**COMMON)  # its last layer is not the one that is computed last
    assert prepare(random_model(config)) is None


def test_a_layer_that_is_computed_again_is_computed_everywhere(tmp_path: Path) -> None:
    model = LanguageModel(str(save_random(tmp_path, CONFIGS["llama"]())))
    batch, gradients = rollouts(), []
    for _ in range(2):
        model.zero_grad()
        model.score(batch).statistics().logprobs.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in model.parameters()])
        checkpoint_gradients(model.model, "model")  # after a score
    for before, after in zip(*gradients, strict=True):
        # Layers that are computed again take torch's attention, which rounds differently.
        torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)


def test_a_copy_skips_with_weights_of_its_own(tmp_path: Path) -> None:
    model = LanguageModel(str(save_random(tmp_path, CONFIGS["llama"]())))
    batch = rollouts()
    with torch.no_grad():
        before = model.score(batch).hidden
        copy = pickle.loads(pickle.dumps(model.snapshot()))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copy.score(batch).hidden, before)


def test_a_pass_that_fails_and_one_of_another_thread_change_nothing() -> None:
    model = prepared(random_model(CONFIGS["llama"]()))
    part: Any = model.base_model.layers[-1].mlp
    of_other: list[Tensor] = []

    def fails(*_: Any) -> None:
        other = threading.Thread(target=lambda: of_other.append(part(torch.ones(1, 9, 32))))
        handle.remove()
        other.start()
        other.join()
        raise KeyboardInterrupt

    handle = part.down_proj.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        reading(3).states(model.base_model, skips=True)
    everywhere = part(torch.ones(1, 9, 32))
    assert everywhere.ne(0).any(-1).all()
    assert len(of_other) == 1
    torch.testing.assert_close(of_other[0], everywhere)
    apart, whole = (reading(3).states(model.base_model, skips) for skips in (True, False))
    torch.testing.assert_close(apart, whole)
