"""Two processes with half of each micro-batch are one process: gradients and what is logged, for every gate."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opdlab.replay.record import read_record, record_folder
from tests.ranks.pair import Pair, pair
from tests.ranks.steps import RECORDED, Taken, cases, take_steps

__all__ = ["pair"]
CLOCKS = ("time/update_seconds", "train/tokens_per_second")
Halves = Callable[[int], list[Taken]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Taken:
    """Steps of one process."""
    torch.set_num_threads(1)
    return take_steps(0, 1, 1, folder / "whole")


@pytest.fixture(scope="module")
def halves(pair: Pair, folder: Path) -> Halves:
    """Steps of two processes, by the number of micro-batches."""
    kept: dict[int, list[Taken]] = {}

    def steps(micro_batches: int) -> list[Taken]:
        if micro_batches not in kept:
            kept[micro_batches] = pair.run(take_steps, 2, micro_batches, folder / f"halves-{micro_batches}")
        return kept[micro_batches]

    return steps


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", cases())
def test_gradient_and_scalars_are_those_of_one_process(
    whole: Taken, halves: Halves, name: str, micro_batches: int
) -> None:
    first, second = halves(micro_batches)
    gradient = whole.gradients[name]
    assert float(gradient.norm()) > 0
    assert float((first.gradients[name] - gradient).norm() / gradient.norm()) < 1e-6
    assert torch.equal(first.gradients[name], second.gradients[name])
    expected, logged = whole.logged[name], first.logged[name]
    assert logged.keys() == expected.keys() >= {"train/loss", "gate/gradient_cosine", "rollout/reverse_kl"}
    different = {
        key: (value, logged[key])
        for key, value in expected.items()
        if key not in CLOCKS and not math.isclose(value, logged[key], rel_tol=1e-4, abs_tol=1e-6)
    }
    assert not different


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_callbacks_of_each_process_see_the_whole_batch(whole: Taken, halves: Halves, micro_batches: int) -> None:
    assert whole.messages
    for taken in halves(micro_batches):
        assert taken.messages == whole.messages
        torch.testing.assert_close(taken.ages, whole.ages)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_record_has_the_rows_of_all_processes(whole: Taken, halves: Halves, folder: Path, micro_batches: int) -> None:
    halves(micro_batches)
    one, both = (read_record(record_folder(folder / name, RECORDED)) for name in ("whole", f"halves-{micro_batches}"))
    assert both.facts.num_processes == 2
    assert len(both.batches) == 2 * micro_batches
    assert torch.cat([batch.rollouts.rollout_ids for batch in both.batches]).tolist() == list(range(8))
    assert both.facts.loss == pytest.approx(one.facts.loss, rel=1e-5)
    assert both.facts.gradient_norm == pytest.approx(one.facts.gradient_norm, rel=1e-5)
    assert sum(float(batch.shares.sum()) for batch in both.batches) == pytest.approx(1, rel=1e-6)
