"""Weights sharded over two processes by FSDP2: one process's gradients, losses, checkpoints and export."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opdlab.policies import LanguageModel
from tests.ranks.pair import Processes
from tests.ranks.steps import take_steps
from tests.toy_run import STUDENT

# Another objective, gate, support or denominator each.
CASES = (
    "teacher's support, token_mean",
    "policy gradient, sequence_mean",
    "student's support, token_mean",
    "whole vocabulary, token_mean",
    "gate span",
    "block64 without a token, token_mean",
)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy student with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = LanguageModel(STUDENT)
    network = AutoModelForCausalLM.from_pretrained(model.model.name_or_path, tie_word_embeddings=False)
    network.lm_head.weight.data = model.model.get_input_embeddings().weight.detach() * 1.1
    network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_and_scalars_are_those_of_one_process(
    pair: Processes, untied: str, tmp_path: Path, head: str, micro_batches: int
) -> None:
    torch.set_num_threads(1)
    path = STUDENT if head == "tied" else untied
    arguments = micro_batches, tmp_path, "model_parallel", path, CASES
    alone = take_steps(0, 1, *arguments)
    first, second = pair.run(take_steps, 2, *arguments)
    for name, gradient in alone.gradients.items():
        error = float((first.gradients[name] - gradient).norm() / gradient.norm())
        print(head, micro_batches, name, error)
        assert error < 1e-5, name
        assert torch.equal(first.gradients[name], second.gradients[name])
