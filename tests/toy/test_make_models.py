"""How the toy models are made: the worlds fit the models, and models are judged as a benchmark judges them."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from opdlab.policies.loading import resolve
from opdlab.toy.make_models import WORLDS, collate, evaluate, examples, toy_config, train


@pytest.mark.parametrize("name", WORLDS)
def test_answers_fit_the_models_and_the_bound_on_new_tokens(name: str) -> None:
    world = WORLDS[name]
    tokenizer, config = world.tokenizer(), toy_config(world.tokenizer(), world.hidden_size)
    for prompt, trace in itertools.islice(examples("sft", 0, 0.2, world.task), 100):
        lengths = [len(tokenizer(text)["input_ids"]) for text in (prompt, trace)]
        assert lengths[1] + 1 <= world.max_new_tokens
        assert lengths[0] + world.max_new_tokens <= config.max_position_embeddings
    assert config.hidden_size == 4 * config.head_dim


@pytest.mark.parametrize("name", WORLDS)
def test_sizes_are_those_of_the_names(name: str) -> None:
    world = WORLDS[name]
    size = sum(p.numel() for p in Qwen3ForCausalLM(toy_config(world.tokenizer(), world.hidden_size)).parameters())
    wanted = {"chain": 280_704, "chain-100k": 1e5, "chain-1m": 1e6, "strings": 280_608}[name]
    assert size == pytest.approx(wanted, rel=0.05 if "-" in name else 0)


@pytest.mark.parametrize(("name", "least"), [("chain", 0.8), ("chain-100k", 0.3), ("chain-1m", 0.9), ("strings", 0.9)])
def test_shipped_teachers_solve_what_students_do_not(name: str, least: float) -> None:
    world, folder = WORLDS[name], "" if name == "chain" else f"{name}/"
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(resolve(f"package://opdlab.toy/models/{folder}{which}"))
        for which in ("teacher", "student")
    )
    pass_1, pass_4 = evaluate(teacher.float(), world.tokenizer(), world, num_problems=8, n=4)
    assert least < pass_1 <= pass_4
    assert evaluate(student.float(), world.tokenizer(), world, num_problems=8, n=4)[0] < 0.3


def test_shipped_weights_are_small() -> None:
    shipped = Path(resolve("package://opdlab.toy/models/teacher")).parent.rglob("*.safetensors")
    sizes = [file.stat().st_size for file in shipped]
    assert len(sizes) == 8
    assert sum(sizes) < 8e6


def test_an_untrained_model_solves_nothing() -> None:
    world = WORLDS["chain"]
    tokenizer = world.tokenizer()
    with torch.random.fork_rng():
        untrained = Qwen3ForCausalLM(toy_config(tokenizer)).eval()
    assert evaluate(untrained, tokenizer, world, num_problems=2, n=2) == (0, 0)


def test_training_keeps_the_weights_of_the_step_that_is_asked_for() -> None:
    world = WORLDS["strings"]
    tokenizer = world.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(toy_config(tokenizer, 8))
    batch = collate(tokenizer, list(itertools.islice(examples("sft", 0, task=world.task), 4)))
    before = float(model(**batch).loss.detach())
    kept = train(model, tokenizer, examples("sft", 1, task=world.task), 4, 3e-2, horizon=4, keep_step=2)
    after = float(model(**batch).loss.detach())
    model.load_state_dict(kept)
    assert after < float(model(**batch).loss.detach()) < before
