"""The processes of tests end in time, whatever a function does, and others take their place."""

import time

import pytest
import torch
from torch import distributed

from tests.ranks.pair import Processes


def total(rank: int, value: float) -> float:
    summed = torch.tensor(value * (rank + 1))
    distributed.all_reduce(summed)
    return float(summed)


def waits_in_vain(rank: int) -> None:
    if rank == 0:
        raise ValueError("broken on purpose")
    distributed.barrier()


def sleeps(rank: int) -> None:
    time.sleep(600 * rank)


def test_a_failure_or_a_hang_ends_all_and_the_next_call_starts_others(pair: Processes) -> None:
    assert pair.run(total, 2.0) == [6.0, 6.0]
    with pytest.raises(AssertionError, match="(?s)rank 0 has failed: .*broken on purpose"):
        pair.run(waits_in_vain)
    assert pair.run(total, 1.0) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="rank 1 has not returned in time"):
        pair.run(sleeps, seconds=3.0)
    assert pair.run(total, 1.0) == [3.0, 3.0]
