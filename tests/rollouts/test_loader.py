"""Laws of rollout reuse, with a collector that returns synthetic rollouts."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.rollouts import Minibatch, Pool, RolloutLoader, Rollouts, Targets
from opdlab.types import Problem, Prompt

PROMPTS = [Prompt(i, Problem(str(i), str(i), None), (i,)) for i in range(11)]


class Collector:
    """Two rollouts of each prompt, of length 1 to 3; counts its calls."""

    def __init__(self, unscored: bool = False) -> None:
        self.calls: list[tuple[list[int], int]] = []
        self.unscored = unscored

    def __call__(self, prompts: Sequence[Prompt], *, seed: int, first_rollout_id: int, first_batch: Tensor) -> Pool:
        indices = [p.index for p in prompts for _ in range(2)]
        self.calls.append(([p.index for p in prompts], seed))
        ids = torch.arange(first_rollout_id, first_rollout_id + len(indices))
        mask = torch.arange(3) <= (ids % 3)[:, None]
        values = ids[:, None].float().repeat(1, 3)
        behavior = values.index_fill(0, first_batch, -1) if self.unscored else values
        column, zeros = torch.tensor(indices), ids * 0
        rollouts = Rollouts(
            column[:, None],
            torch.ones(len(indices), 1).bool(),
            mask.long(),
            mask,
            behavior,
            zeros,
            ids,
            column,
            *(zeros, zeros),
        )
        return Pool(rollouts, Targets(values), {"rollout/length": 2.0}, self.unscored)


def loader(collect: Any = None, **options: Any) -> RolloutLoader:
    settings: dict[str, Any] = {"samples_per_prompt": 2, "prompts_per_pool": 4, "batch_size": 4, "reuse_epochs": 3}
    return RolloutLoader(PROMPTS, collect or Collector(), **{**settings, **options})


def ids_of(batches: Sequence[Minibatch]) -> list[list[int]]:
    return [batch.rollouts.rollout_ids.tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def test_length_is_what_is_yielded() -> None:
    for micro_batches in (1, 2, 4):
        made = loader(micro_batches=micro_batches)
        assert len(list(made)) == len(made) == 2 * 3 * 2 * micro_batches  # buffers x passes x batches x parts


def test_each_pool_is_collected_once_lazily_and_passed_over_in_new_orders() -> None:
    collect = Collector()
    batches = iter(loader(collect))
    assert collect.calls == []
    first = list(islice(batches, 6))
    assert len(collect.calls) == 1
    passes = [flat(ids_of(first[start : start + 2])) for start in (0, 2, 4)]
    assert all(sorted(each) == list(range(8)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    next(batches)
    assert len(collect.calls) == 2


def test_prompts_are_shuffled_anew_each_epoch_and_none_twice() -> None:
    collect = Collector()
    made = loader(collect)
    for _ in range(2):
        list(made)
    epochs = [collect.calls[0][0] + collect.calls[1][0], collect.calls[2][0] + collect.calls[3][0]]
    assert epochs[0] != epochs[1]
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert len({seed for _, seed in collect.calls}) == 4


def test_rollout_ids_are_unique_over_pools_epochs_and_ranks() -> None:
    seen: Counter[int] = Counter()
    for rank in range(2):
        made = loader(rank=rank, world_size=2, reuse_epochs=1)
        for _ in range(3):
            seen.update(flat(ids_of(list(made))))
    assert max(seen.values()) == 1


def test_ranks_share_the_prompts() -> None:
    collectors = [Collector(), Collector()]
    for rank, collect in enumerate(collectors):
        list(loader(collect, rank=rank, world_size=2))
    parts = [{i for indices, _ in c.calls for i in indices} for c in collectors]
    assert parts[0].isdisjoint(parts[1])


def test_micro_batches_partition_the_batch_and_know_its_denominators() -> None:
    whole, parts = list(loader()), list(loader(micro_batches=4))
    for index, batch in enumerate(whole):
        group = parts[4 * index : 4 * index + 4]
        assert flat(ids_of(group)) == batch.rollouts.rollout_ids.tolist()
        assert [part.position for part in group] == [0, 1, 2, 3]
        assert {part.num_tokens for part in group} == {batch.num_tokens}
        assert sum(int(part.rollouts.mask.sum()) for part in group) == batch.num_tokens
        assert len(group[0].micro_batches) == 4


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("stop", range(1, 60, 7))
def test_state_goes_on_exactly_where_it_was_taken(micro_batches: int, stop: int) -> None:
    def run(made: RolloutLoader, num: int) -> list[list[int]]:
        seen: list[list[int]] = []
        while len(seen) < num:
            seen += ids_of(list(islice(made, num - len(seen))))
        return seen

    uninterrupted = run(loader(micro_batches=micro_batches), 120)
    stopped = loader(micro_batches=micro_batches)
    before = run(stopped, stop)
    collect = Collector()
    resumed = loader(collect, micro_batches=micro_batches)
    resumed.load_state_dict(stopped.state_dict())
    assert before + run(resumed, 120 - stop) == uninterrupted


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_behavior_of_the_first_batch_is_filled_in_and_kept(micro_batches: int) -> None:
    def step(made: RolloutLoader, batch: Minibatch) -> Minibatch:
        if not batch.behavior_known:
            before = batch.rollouts.behavior_logprobs.clone()
            assert bool((before == -1).all())
            # The collector's behavior log-probabilities equal these.
            made.fill_behavior(batch.rows, batch.targets.logprobs)
            assert torch.equal(batch.rollouts.behavior_logprobs, before)  # a batch is never modified in place
        return batch

    # Resumed within the first optimizer batch, and after it; there are two buffers of three passes of two batches.
    for stop in (1, micro_batches, micro_batches + 1):
        stopped = loader(Collector(unscored=True), micro_batches=micro_batches)
        first = [step(stopped, batch) for batch in islice(stopped, stop)]
        resumed = loader(Collector(unscored=True), micro_batches=micro_batches)
        resumed.load_state_dict(stopped.state_dict())
        batches = first + [step(resumed, batch) for batch in resumed]
        fresh = [index for index, batch in enumerate(batches) if not batch.behavior_known]
        assert fresh == [*range(micro_batches), *range(6 * micro_batches, 7 * micro_batches)]
        for batch in batches:
            if batch.behavior_known:
                valid = batch.rollouts.mask
                assert torch.equal(batch.rollouts.behavior_logprobs[valid], batch.targets.logprobs[valid])


def test_state_holds_a_pool_only_while_it_is_in_use() -> None:
    made = loader()
    assert "pool" not in made.state_dict()
    batches = iter(made)
    next(batches)
    assert "pool" in made.state_dict()
    list(islice(batches, 5))
    assert "pool" not in made.state_dict()


def test_a_state_of_another_size_is_refused() -> None:
    made = loader()
    next(iter(made))
    with pytest.raises(UsageError, match="rollout buffer of 8, but the configuration asks for 4"):
        loader(prompts_per_pool=2).load_state_dict(made.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts_per_pool": 12}, "prompts_per_pool is 12, but there are only 11"),
        ({"prompts_per_pool": 0}, "prompts_per_pool is 0"),
        ({"batch_size": 3}, "batch_size is 3, which does not divide a rollout buffer of 8"),
        ({"micro_batches": 3}, "accumulate_grad_batches is 3"),
        ({"reuse_epochs": 0}, "epochs is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loader(**options)
