"""The measured numbers, compared with float64 and with plain loops."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.metrics.functional import moments, standard_error
from opdlab.policies import LanguageModel, LocalTeacher, share_vocabulary
from opdlab.screening.answers import compare
from opdlab.screening.gap import Gap, ladder, measure_gap, requests, shared_ranks
from opdlab.types import Rollouts
from tests.policies.tiny_models import CONFIGS, rollouts, save_random


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LocalTeacher]:
    folder = tmp_path_factory.mktemp("models")
    student = LanguageModel(str(save_random(folder / "student", CONFIGS["qwen3"]()))).eval()
    teacher = LocalTeacher(str(save_random(folder / "teacher", CONFIGS["gemma2"]())))
    share_vocabulary(student, teacher)
    return student, teacher


def logprobs64(model: LanguageModel, given: Rollouts) -> Tensor:
    """Log-probabilities of the vocabulary at the valid positions, [N, V], in float64, one rollout at a time."""
    network, found = copy.deepcopy(model.model).double(), []
    for row in range(len(given)):
        prompt = given.prompt_tokens[row][given.prompt_mask[row].bool()]
        response = given.tokens[row][given.mask[row].bool()]
        logits = network(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        found.append((logits / given.temperature).log_softmax(-1))
    return torch.cat(found).detach()


def gap_at(pair: tuple[LanguageModel, LocalTeacher], given: Rollouts, k: int) -> Gap:
    student, teacher = pair
    return measure_gap(student, given, teacher.score(given, requests(k, student.vocab_size)[0]), batch_size=3)


def test_the_gap_equals_float64(pair: tuple[LanguageModel, LocalTeacher]) -> None:
    given = replace(rollouts(), prompt_ids=torch.tensor([0, 0, 1, 2]))
    p, q = (logprobs64(model, given) for model in (pair[0], pair[1].model))
    found, size = gap_at(pair, given, 37), p.shape[1]
    near: Any = pytest.approx
    reverse = (p.exp() * (p - q)).sum(1)
    assert found.num_tokens == len(p) == 18
    assert found.reverse_kl == near(float(reverse.mean()), abs=1e-5)  # K = V - 1: that of the vocabulary
    assert found.forward_kl == near(float((q.exp() * (q - p)).sum(1).mean()), abs=1e-5)
    assert found.student_entropy == near(float(-(p.exp() * p).sum(1).mean()), abs=1e-5)
    assert found.teacher_entropy == near(float(-(q.exp() * q).sum(1).mean()), abs=1e-5)
    assert found.confidence == near(float(q.exp().amax(1).mean()), abs=1e-6)
    tokens = given.tokens[given.mask.bool()]
    apart = (p - q).gather(1, tokens[:, None])
    assert found.difference == near(float(apart.abs().mean()), abs=1e-5)
    assert found.sampled_kl == near(float(apart.mean()), abs=1e-5)
    for k in ladder(37):
        top, own = q.topk(k).indices, p.topk(k).indices
        assert found.student_mass[k] == near(float(p.exp().gather(1, top).sum(1).mean()), abs=1e-6)
        assert found.teacher_mass[k] == near(float(q.exp().gather(1, top).sum(1).mean()), abs=1e-6)
        both = [len(set(a) & set(b)) / k for a, b in zip(top.tolist(), own.tolist(), strict=True)]
        assert found.overlap[k] == near(sum(both) / len(both))
    assert size == 38
    # By prompt: the first two rollouts, of 7 and 4 tokens, have one prompt.
    parts = torch.split(reverse, [11, 1, 6])
    sums = moments(torch.stack([each.sum() for each in parts]), torch.tensor([11.0, 1.0, 6.0]))
    assert found.reverse_kl_error == near(float(standard_error(sums, torch.tensor(3))), abs=1e-5)
    # By position: a column each, since the longest response has 7 tokens.
    place = torch.cat([torch.arange(length) for length in (7, 4, 1, 6)])
    assert [each.count for each in found.bins] == [4, 3, 3, 3, 2, 2, 1]
    for each in found.bins:
        assert each.reverse_kl == near(float(reverse[place == each.start].mean()), abs=1e-5)


def test_a_small_support_has_one_outcome_more(pair: tuple[LanguageModel, LocalTeacher]) -> None:
    given = rollouts()
    p, q = (logprobs64(model, given).exp() for model in (pair[0], pair[1].model))
    top = q.topk(4).indices
    a, b = (torch.cat([side.gather(1, top), 1 - side.gather(1, top).sum(1, keepdim=True)], 1) for side in (p, q))
    found = gap_at(pair, given, 4)
    assert found.reverse_kl == pytest.approx(float((a * (a.log() - b.log())).sum(1).mean()), abs=1e-5)
    assert found.reverse_kl < gap_at(pair, given, 37).reverse_kl


def test_shared_ranks_count_as_sets_do() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.stack([torch.randperm(20, generator=generator)[:6] for _ in range(9)]) for _ in range(2))
    running = shared_ranks(a, b).cumsum(0)
    for k in range(1, 7):
        pairs = zip(a[:, :k].tolist(), b[:, :k].tolist(), strict=True)
        assert running[k - 1] == sum(len(set(x) & set(y)) for x, y in pairs)


def test_accuracies_are_paired_by_problem() -> None:
    student = torch.tensor([[True, False], [False, False], [True, True]])
    teacher = torch.tensor([[True, True], [False, True], [True, True]])
    found = compare(student, teacher)
    assert [found.student, found.teacher] == pytest.approx([1 / 2, 5 / 6])
    assert [found.student_any, found.teacher_any] == pytest.approx([2 / 3, 1])
    differences = torch.tensor([0.5, 0.5, 0.0])
    assert found.error == pytest.approx(float(differences.std() / 3**0.5))


def test_the_sizes_of_a_support() -> None:
    assert ladder(64) == [1, 2, 4, 8, 16, 32, 64]
    assert ladder(5) == [1, 2, 4, 5]
