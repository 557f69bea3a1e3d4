"""Two processes with half of each micro-batch are one process: gradients and what is logged, for every gate."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdlab.collectives import gather_on_first, gather_rows, sum_over_processes
from opdlab.replay.record import read_record, record_folder
from tests.ranks.pair import Processes
from tests.ranks.steps import RECORDED, Taken, cases, take_steps
from tests.toy_run import STUDENT

CLOCKS = ("time/update_seconds", "train/tokens_per_second")
# Largest relative error of a gradient in float32, by the number of micro-batches. Passes of another shape round in
# another way, and gates and exponentials magnify that: with two, 2.4e-6 was seen. A gate that each process normalises
# alone has 1e-2.
ERRORS = {1: 1e-6, 2: 5e-6}
# The gradient of k3 is an exponential of a log-ratio, whose rounding a large ratio magnifies: 1.9e-6 was seen, and in
# float64 6e-16, see below.
OF_K3 = 5e-6
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
def halves(pair: Processes, folder: Path) -> Halves:
    """Steps of two processes, by the number of micro-batches."""
    return cache(lambda micro_batches: pair.run(take_steps, 2, micro_batches, folder / f"halves-{micro_batches}"))


@pytest.mark.parametrize("micro_batches", ERRORS)
@pytest.mark.parametrize("name", cases())
def test_gradient_and_scalars_are_those_of_one_process(
    whole: Taken, halves: Halves, name: str, micro_batches: int
) -> None:
    first, second = halves(micro_batches)
    gradient = whole.gradients[name]
    assert float(gradient.norm()) > 0
    limit = OF_K3 if name.startswith("k3") else ERRORS[micro_batches]
    assert float((first.gradients[name] - gradient).norm() / gradient.norm()) < limit
    assert torch.equal(first.gradients[name], second.gradients[name])
    expected, logged = whole.logged[name], first.logged[name]
    assert logged.keys() == expected.keys() >= {"train/loss", "gate/gradient_cosine", "train/teacher_entropy"}
    different = {
        key: (value, logged[key])
        for key, value in expected.items()
        # A spread of weights near 1 has their rounding, which is not the same on all processors: 1.1e-6 was seen.
        if key not in CLOCKS and not math.isclose(value, logged[key], rel_tol=1e-4, abs_tol=5e-6)
    }
    assert not different


@pytest.mark.parametrize("micro_batches", ERRORS)
def test_what_gradients_miss_in_float32_is_rounding(pair: Processes, folder: Path, micro_batches: int) -> None:
    """With a student in float64 they are those of one process, to 1e-15 where 2e-6 was seen in float32."""
    names = [name for name in cases() if name.startswith(("k3", "k2", "whole", "gate span"))]
    alone = take_steps(0, 1, micro_batches, folder / "whole-64", names=names, dtype=torch.float64)
    places = folder / f"halves-64-{micro_batches}", "ddp", STUDENT, names, torch.float64
    first, _ = pair.run(take_steps, 2, micro_batches, *places)
    for name, gradient in alone.gradients.items():
        assert gradient.dtype == torch.float64
        assert float((first.gradients[name] - gradient).norm() / gradient.norm()) < 1e-12, name


@pytest.mark.parametrize("micro_batches", ERRORS)
def test_callbacks_of_each_process_see_the_whole_batch(whole: Taken, halves: Halves, micro_batches: int) -> None:
    assert whole.messages
    for taken in halves(micro_batches):
        assert taken.messages == whole.messages
        torch.testing.assert_close(taken.ages, whole.ages, rtol=1e-5, atol=1e-3)  # sums of w - 1 cancel


@pytest.mark.parametrize("micro_batches", ERRORS)
def test_a_record_has_the_rows_of_all_processes(whole: Taken, halves: Halves, folder: Path, micro_batches: int) -> None:
    halves(micro_batches)
    one, both = (read_record(record_folder(folder / name, RECORDED)) for name in ("whole", f"halves-{micro_batches}"))
    assert both.facts.num_processes == 2
    assert len(both.batches) == 2 * micro_batches
    ids = [torch.cat([batch.rollouts.rollout_ids for batch in each.batches]).tolist() for each in (one, both)]
    assert ids[0] == ids[1]
    assert both.facts.loss == pytest.approx(one.facts.loss, rel=1e-5)
    assert both.facts.gradient_norm == pytest.approx(one.facts.gradient_norm, rel=1e-5)
    assert sum(float(batch.shares.sum()) for batch in both.batches) == pytest.approx(1, rel=1e-6)


def rows_of(rank: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Tensors of several widths in memory, so that numbers begin at odd places of what is sent."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank)).double()
    values[:1] = torch.nan
    tensors = {"mask": values > 0, "wide": values, "correct": (values > 0).to(torch.int8) - 1}
    return {**tensors, "narrow": values.bfloat16(), "tokens": values.nan_to_num().long() << 40, "age": values[:, :1]}


def gathered(rank: int, shapes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    own = {name: tensor.expand(shapes[rank]) for name, tensor in rows_of(rank, *shapes[rank]).items()}
    return gather_rows(own, shapes)


@pytest.mark.parametrize("shapes", [[(2, 5), (3, 4)], [(2, 5), (0, 1)], [(1, 1), (1, 1)]])
def test_rows_of_each_process_arrive_bit_for_bit(pair: Processes, shapes: list[tuple[int, int]]) -> None:
    for found in pair.run(gathered, shapes):
        for rank, shape in enumerate(shapes):
            for name, expected in rows_of(rank, *shape).items():
                assert found[rank][name].dtype == expected.dtype
                torch.testing.assert_close(found[rank][name], expected.expand(shape), rtol=0, atol=0, equal_nan=True)


def summed(rank: int) -> tuple[Tensor, Tensor]:
    own = torch.tensor([1.0, 10.0]) + rank
    return own, sum_over_processes(own)


def test_a_sum_leaves_what_each_process_has(pair: Processes) -> None:
    for rank, (own, total) in enumerate(pair.run(summed)):
        assert own.tolist() == [1.0 + rank, 10.0 + rank]
        assert total.tolist() == [3.0, 21.0]


def on_first(rank: int) -> list[str]:
    return gather_on_first(f"of {rank}")


def test_the_first_process_alone_gets_what_is_gathered_there(pair: Processes) -> None:
    assert pair.run(on_first) == [["of 0", "of 1"], []]
