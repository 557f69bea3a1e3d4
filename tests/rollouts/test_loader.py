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

    def __call__(
        self, prompts: Sequence[Prompt], *, share: range, seed: int, first_rollout_id: int, first_batch: Tensor
    ) -> Pool:
        assert share == range(len(prompts))
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


def test_the_seed_decides_the_prompts_the_samples_and_the_batches() -> None:
    def seen(seed: int) -> tuple[list[list[int]], list[int], list[list[int]]]:
        collect = Collector()
        rows = [batch.rows.tolist() for batch in loader(collect, seed=seed)]
        return [prompts for prompts, _ in collect.calls], [samples for _, samples in collect.calls], rows

    one, again, other = seen(1), seen(1), seen(2)
    assert one == again
    for part, other_part in zip(one, other, strict=True):
        assert part != other_part


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


@pytest.mark.parametrize("taken", [0, 2, 6, 8, 12, 15])
def test_the_next_buffer_is_known_while_one_is_in_use(taken: int) -> None:
    """Over the end of a pass over the prompts too, and after a resume: inside a buffer at once, else as one begins."""
    collected: list[tuple[int, dict[str, Any]]] = []
    asked: list[tuple[int, dict[str, Any]]] = []
    seen = taken

    def sample_ahead(prompts: Sequence[Prompt], *, steps: int, **options: Any) -> None:
        asked.append((seen + steps, {"prompts": list(prompts), **options}))

    def collect(prompts: Sequence[Prompt], *, when_sampled: Any, first_batch: Tensor, **options: Any) -> Pool:
        collected.append((seen, {"prompts": list(prompts), **options}))
        when_sampled()
        return Collector()(prompts, first_batch=first_batch, **options)

    first = loader()
    for _ in islice(chain(first, first, first), taken):
        pass
    made = loader(collect, sample_ahead=sample_ahead)
    made.load_state_dict(first.state_dict())
    assert not asked
    for _ in islice(chain(made, made, made), 26 - taken):
        seen += 1
    assert [step for step, _ in asked] == [step for step in (6, 12, 18, 24, 30) if step > taken]
    collected = [each for each in collected if each[0] > taken]
    assert collected == asked[:-1]


def test_prompts_are_shuffled_anew_each_epoch_and_none_twice() -> None:
    collect = Collector()
    made = loader(collect)
    for _ in range(2):
        list(made)
    epochs = [collect.calls[0][0] + collect.calls[1][0], collect.calls[2][0] + collect.calls[3][0]]
    assert epochs[0] != epochs[1]
    assert all(max(Counter(epoch).values()) == 1 for epoch in epochs)
    assert len({seed for _, seed in collect.calls}) == 4


def test_rollout_ids_are_unique_over_pools_and_epochs() -> None:
    made, seen = loader(reuse_epochs=1), Counter[int]()
    for _ in range(3):
        seen.update(flat(ids_of(list(made))))
    assert max(seen.values()) == 1


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
    whole = stop // micro_batches * micro_batches  # a state inside an optimizer batch repeats it
    before = run(stopped, stop)[:whole]
    resumed = loader(micro_batches=micro_batches)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.num_yielded == whole % len(resumed)
    assert before + run(resumed, 120 - whole) == uninterrupted


@pytest.mark.parametrize("stop", [2, 4, 6, 8, 10])  # optimizer batches of 4 rollouts; six of them are a buffer
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"micro_batches": 1}, {"micro_batches": 4}),
        ({"micro_batches": 4}, {"micro_batches": 1}),
        ({"micro_batches": 2}, {"batch_size": 2}),
        ({}, {"batch_size": 8}),  # 8 are a pass over the buffer
        ({"micro_batches": 2}, {"batch_size": 8, "micro_batches": 8}),
    ],
)
def test_other_batches_train_on_exactly_what_was_left(before: Any, after: Any, stop: int) -> None:
    made = loader(**before)
    batches = iter(made)
    list(islice(batches, stop * before.get("micro_batches", 1)))
    state = made.state_dict()
    left = flat(ids_of(list(batches)))
    collect = Collector()
    resumed = loader(collect, **after)
    resumed.load_state_dict(state)
    yielded, rest = resumed.num_yielded, list(resumed)
    assert flat(ids_of(rest)) == left
    assert yielded + len(rest) == len(resumed)
    assert len(collect.calls) == (1 if stop <= 6 else 0)  # the second buffer


@pytest.mark.parametrize(("epochs", "batches"), [(2, 0), (3, 1), (5, 5)])
def test_other_passes_end_the_buffer_earlier_or_later(epochs: int, batches: int) -> None:
    made = loader()
    list(islice(made, 5))
    resumed = loader(collect := Collector(), reuse_epochs=epochs)
    resumed.load_state_dict(made.state_dict())
    seen = iter(resumed)
    assert [batch.reuse_epoch for batch in islice(seen, batches)] == [2, 3, 3, 4, 4][:batches]
    assert collect.calls == []
    next(seen)
    assert len(collect.calls) == 1


def test_a_finished_buffer_is_not_collected_again() -> None:
    made = loader(first := Collector())
    list(islice(made, 6))
    resumed = loader(collect := Collector())
    resumed.load_state_dict(made.state_dict())
    next(iter(resumed))
    assert len(collect.calls) == 1
    assert set(collect.calls[0][0]).isdisjoint(first.calls[0][0])


def test_sizes_may_change_where_a_buffer_ends() -> None:
    made = loader()
    seen = flat(ids_of(list(islice(made, 6))))
    other = loader(collect := Collector(), prompts_per_pool=3, batch_size=2)
    other.load_state_dict(made.state_dict())
    assert other.num_yielded == len(other) - 2 * 9  # two buffers of three prompts are left of 11 - 4
    rest = list(other)
    assert len(rest) == 2 * 9
    assert set(flat(ids_of(rest))).isdisjoint(seen)
    taken = Counter(chain.from_iterable(indices for indices, _ in collect.calls))
    assert max(taken.values()) == 1
    assert len(taken) == 6


def test_other_sizes_at_the_end_of_a_pass_begin_the_next() -> None:
    made = loader(prompts_per_pool=2)
    list(islice(made, 4 * 3))  # four of five buffers
    resumed = loader(collect := Collector())
    resumed.load_state_dict(made.state_dict())  # three prompts are left, which are no buffer of four
    assert resumed.num_yielded == 0
    assert len(list(resumed)) == len(resumed)
    assert len(collect.calls) == 2


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

    # Resumed inside the first optimizer batch, and after it; there are two buffers of three passes of two batches.
    for stop in (1, micro_batches, micro_batches + 1):
        stopped = loader(Collector(unscored=True), micro_batches=micro_batches)
        first = [step(stopped, batch) for batch in islice(stopped, stop)]
        resumed = loader(Collector(unscored=True), micro_batches=micro_batches)
        resumed.load_state_dict(stopped.state_dict())
        whole = stop // micro_batches * micro_batches
        batches = first[:whole] + [step(resumed, batch) for batch in resumed]
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
    state = made.state_dict()
    with pytest.raises(UsageError, match=r"num_samples is 4, but the checkpoint is inside a rollout buffer of 8"):
        loader(prompts_per_pool=2).load_state_dict(state)
    with pytest.raises(UsageError, match=r"batch_size is 8, but .* 4 rollouts are left: choose a size that divides 4"):
        loader(batch_size=8).load_state_dict(state)
    with pytest.raises(UsageError, match="another version of opdlab"):
        loader().load_state_dict({"epoch": 0, "pool_index": 0, "cursor": 1})
    with pytest.raises(UsageError, match="another version of opdlab"):
        loader().load_state_dict({**state, "pools": [state["pool"]]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts_per_pool": 12}, "prompts_per_pool is 12, but there are only 11"),
        ({"prompts_per_pool": 0}, "prompts_per_pool is 0"),
        ({"batch_size": 3}, "batch_size is 3, which does not divide a rollout buffer of 8"),
        ({"micro_batches": 3}, "accumulate_grad_batches is 3"),
        ({"reuse_epochs": 0}, "epochs is 0"),
        (
            {"world_size": 3},
            r"batch_size is 4, which 3 processes \(trainer.devices \* trainer.num_nodes\) with .*_batches 1",
        ),
        (
            {"world_size": 2, "micro_batches": 4},
            "batch_size is 4, which 2 .* 4 cannot share equally: choose a multiple of 8",
        ),
        ({"world_size": 8, "batch_size": 8}, "prompts_per_pool is 4, which 8 .* share equally: choose a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loader(**options)
