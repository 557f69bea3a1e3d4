"""pass@k against enumeration, the published formula, and itself across processes."""

import itertools
import math
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.metrics import PassAtK
from opdlab.metrics.functional import pass_at_k


def brute_force(row: list[bool], k: int) -> float:
    """The share of all subsets of k samples that hold a correct one."""
    subsets = list(itertools.combinations(row, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def random_answers(num_problems: int, num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(num_problems, 1, generator=generator)
    return torch.rand(num_problems, num_samples, generator=generator) < rates


def measured(k: int, *updates: Tensor) -> float:
    metric = PassAtK(k=k)
    for update in updates:
        metric.update(update)
    return metric.compute().item()


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_equals_enumeration(num_samples: int) -> None:
    answers = random_answers(12, num_samples)
    answers[0], answers[1] = True, False
    for k in range(1, num_samples + 1):
        expected = sum(brute_force(row, k) for row in answers.tolist()) / len(answers)
        assert measured(k, answers) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_samples", [8, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 8])
def test_equals_the_published_product(num_samples: int, k: int) -> None:
    counts = sorted({0, 1, num_samples // 3, num_samples - k, num_samples - 1, num_samples})
    estimates = pass_at_k(torch.tensor(counts), num_samples, k)
    for count, estimate in zip(counts, estimates.tolist(), strict=True):
        # Chen et al., figure 3, and their definition in exact integers.
        published = 1.0
        if num_samples - count >= k:
            published -= math.prod(1 - k / i for i in range(num_samples - count + 1, num_samples + 1))
        assert estimate == pytest.approx(published, abs=1e-9)
        exact = 1 - math.comb(num_samples - count, k) / math.comb(num_samples, k)
        assert estimate == pytest.approx(exact, abs=1e-12)


def test_laws() -> None:
    answers = random_answers(40, 8)
    assert measured(1, answers) == pytest.approx(answers.float().mean().item())
    assert measured(8, answers) == pytest.approx(answers.any(1).float().mean().item())
    by_k = [measured(k, answers) for k in range(1, 9)]
    assert by_k == sorted(by_k)


@pytest.mark.parametrize("shape", [(3, 7), (1, 1)])
def test_too_few_samples_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"pass@8 needs at least 8 samples a problem, got {shape[1]}"):
        PassAtK(k=8).update(torch.ones(*shape, dtype=torch.bool))


def test_k_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="k is 0, but must be at least 1"):
        PassAtK(k=0)


def test_updates_may_differ_in_samples_and_problems() -> None:
    few, many = random_answers(3, 4), random_answers(5, 9, seed=1)
    expected = [brute_force(row, 3) for row in [*few.tolist(), *many.tolist()]]
    assert measured(3, few, many) == pytest.approx(sum(expected) / 8, abs=1e-6)
    assert measured(3, many, few) == pytest.approx(measured(3, few, many))


def test_reset() -> None:
    metric = PassAtK(k=2)
    metric.update(torch.ones(3, 2, dtype=torch.bool))
    metric.reset()
    metric.update(torch.zeros(3, 2, dtype=torch.bool))
    assert metric.compute().item() == 0.0


# Ranks hold unequal numbers of problems, as with a benchmark that does not divide evenly.
SHARES = (slice(0, 9), slice(9, 13))


def _one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = PassAtK(k=3)
    metric.update(random_answers(13, 6)[SHARES[rank]])
    (Path(folder) / str(rank)).write_text(f"{metric.compute().item()} {metric.standard_error().item()}")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_one_of_two, args=(rank, str(tmp_path)), daemon=True) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    whole = PassAtK(k=3)
    whole.update(random_answers(13, 6))
    expected = [whole.compute().item(), whole.standard_error().item()]
    for rank in "01":
        assert [float(figure) for figure in (tmp_path / rank).read_text().split()] == pytest.approx(expected, abs=1e-7)
    alone = [measured(3, random_answers(13, 6)[share]) for share in SHARES]
    assert abs(alone[0] - alone[1]) > 0.01  # otherwise a missing synchronisation would pass too
