"""Rollout reuse: a rollout buffer that is sampled lazily, scored once, and trained on for several passes."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.rollouts.pool import Pool, exchange_rows, join_shares
from opdlab.rollouts.reuse import ReuseConfig
from opdlab.seeds import derive_seed
from opdlab.types import Minibatch, Prompt, prompts_at, trimmed


class Collect(Protocol):
    """Function that fills a rollout buffer: :meth:`opdlab.rollouts.Collector.collect`, as the module calls it."""

    def __call__(
        self, prompts: Sequence[Prompt], *, share: range, seed: int, first_rollout_id: int, first_batch: Tensor
    ) -> Pool:
        """Return a buffer of rollouts of ``prompts``, or a share of it.

        If the next buffer is sampled ahead, it also receives ``when_sampled``: a function that it calls once the
        rollouts are sampled, which asks :class:`SampleAhead` for the next buffer.

        Args:
            prompts: prompts of the buffer.
            share: positions of the prompts whose rollouts are returned; of all prompts with one process.
            seed: determines the samples.
            first_rollout_id: id of the buffer's first rollout.
            first_batch: [B] long, the buffer's rows in the first optimizer batch: the training step may fill in their
                behavior log-probabilities.
        """


class SampleAhead(Protocol):
    """Function that begins to sample the next buffer: :meth:`opdlab.module.OPDModule.sample_ahead`."""

    def __call__(
        self, prompts: Sequence[Prompt], *, share: range, seed: int, first_rollout_id: int, steps: int
    ) -> None:
        """Begin to sample a buffer, of which :class:`Collect` is asked for next, with the same arguments.

        Args:
            prompts: see :class:`Collect`.
            share: see there.
            seed: see there.
            first_rollout_id: see there.
            steps: optimizer steps until the buffer begins.
        """


@runtime_checkable
class Windows(Protocol):
    """Prompts that differ from pass to pass, equally many in each: :class:`opdlab.data.streams.StreamedPrompts`."""

    def of_pass(self, number: int) -> Sequence[Prompt]:
        """Return the prompts of a pass."""


@dataclass(frozen=True)
class Position:
    """A loader's position, in units that no batch size and no number of processes changes.

    Args:
        epoch: finished passes over the prompts.
        prompts: prompts of this pass whose buffers are finished.
        buffers: finished buffers of the run.
        rollouts: rollouts in these buffers.
        rows: rows of the current buffer that were trained on, over all passes; whole optimizer batches only.

    Example:
        A run is in its first buffer, after three optimizer batches of eight rollouts.

        >>> Position(rows=24)
        Position(epoch=0, prompts=0, buffers=0, rollouts=0, rows=24)
    """

    epoch: int = 0
    prompts: int = 0
    buffers: int = 0
    rollouts: int = 0
    rows: int = 0


class RolloutLoader:
    """Loader of minibatches of rollouts; one epoch is one pass over the prompts.

    The prompts are shuffled and divided into buffers. A buffer is filled when its first minibatch is requested, and
    then yields ``reuse_epochs`` passes of shuffled minibatches. Lightning does not prefetch from a loader that has a
    length, so a buffer is sampled after the previous step and all its callbacks, including a refresh of the behavior
    policy. Lightning also saves :meth:`state_dict` in its checkpoints.

    Several processes work on one buffer. Prompts, their order, seeds and optimizer batches are those of one process.
    Each process collects the rollouts of an equal share of the prompts. Before each pass they exchange rows, so that
    each holds the rows that it trains on: of each micro-batch, the part at its rank.

    Args:
        prompts: prompts to sample from.
        collect: fills a buffer.
        samples_per_prompt: rollouts that ``collect`` returns for each prompt.
        prompts_per_pool: prompts in a buffer.
        batch_size: rollouts in an optimizer step, of all processes.
        micro_batches: equal parts of an optimizer batch: Lightning's ``accumulate_grad_batches``.
        reuse_epochs: passes over a buffer.
        seed: determines the order and the samples.
        rank: rank of this process.
        world_size: number of processes.
        sample_ahead: is told of the next buffer while one is in use; None to sample each when it begins.

    Raises:
        UsageError: the sizes do not divide, or there are fewer prompts than a buffer needs.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        collect: Collect,
        *,
        samples_per_prompt: int = 1,
        prompts_per_pool: int = 32,
        batch_size: int = 32,
        micro_batches: int = 1,
        reuse_epochs: int = 2,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sample_ahead: SampleAhead | None = None,
    ) -> None:
        self._pool_size = prompts_per_pool * samples_per_prompt
        overlap = int(sample_ahead is not None)
        self.reuse = ReuseConfig(prompts_per_pool, reuse_epochs, batch_size, overlap)  # checks its values
        self.reuse.check(samples_per_prompt, micro_batches, world_size)
        self.reuse.check_prompts(len(prompts))
        self._prompts = prompts
        self._collect, self._sample_ahead = collect, sample_ahead
        self._asked_at: int | None = None  # number of the buffer beside which the next one is sampled
        self._micro_batches = micro_batches
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self._minibatches_per_buffer = reuse_epochs * (self._pool_size // batch_size) * micro_batches
        self._position = Position()
        self._pool: Pool | None = None  # this process's rows of the buffer at the position, once it is filled
        self._held = self._as_collected  # the buffer's rows that each process has, in the order of its tensors

    def __len__(self) -> int:
        return len(self._prompts) // self.reuse.prompts_per_pool * self._minibatches_per_buffer

    @property
    def num_yielded(self) -> int:
        """Return the number of minibatches of this pass over the prompts that lie before the position."""
        left = (len(self._prompts) - self._position.prompts) // self.reuse.prompts_per_pool
        rows = self._position.rows // self.reuse.batch_size * self._micro_batches
        return len(self) - left * self._minibatches_per_buffer + rows

    def __iter__(self) -> Iterator[Minibatch]:
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            if self._pool is None:
                self._fill()
            elif self._sample_ahead is not None and self._asked_at != self._position.buffers:  # after a resume
                self._ask_ahead()
            yield from self._next_optimizer_batch()

    @property
    def _as_collected(self) -> list[Tensor]:
        return list(torch.arange(self._pool_size).view(self._world_size, -1))

    def _fill(self) -> None:
        """Collect the buffer at the position, or this process's share of it."""
        prompts, wanted = self._wanted(self._position)
        if self._sample_ahead is not None:
            wanted["when_sampled"] = self._ask_ahead
        pool = self._collect(prompts, **wanted, first_batch=self._rows_of_pass(0)[0].flatten())
        if self._world_size > 1:
            state, weights, pad_id = pool.state_dict(), pool.weights, pool.pad_id
            del pool  # the state alone holds the tensors
            join_shares(state, weights, pad_id)
            pool = Pool.from_state_dict(state)
        self._pool, self._held = pool, self._as_collected

    def _wanted(self, at: Position) -> tuple[list[Prompt], dict[str, Any]]:
        """Return the prompts of the buffer that begins at a position, and what else :class:`Collect` is told of it."""
        each = self.reuse.prompts_per_pool // self._world_size
        generator = torch.Generator().manual_seed(derive_seed("prompts", self.seed, at.epoch))
        order = torch.randperm(len(self._prompts), generator=generator)[at.prompts :]
        prompts = self._prompts.of_pass(at.epoch) if isinstance(self._prompts, Windows) else self._prompts
        return prompts_at(prompts, order[: self.reuse.prompts_per_pool].tolist()), {
            "share": range(self._rank * each, (self._rank + 1) * each),
            "seed": derive_seed("pool", self.seed, at.buffers),
            "first_rollout_id": at.rollouts,
        }

    def _ask_ahead(self) -> None:
        """Let the next buffer be sampled beside the steps on this one."""
        assert self._sample_ahead is not None
        self._asked_at = self._position.buffers
        left = self.reuse.epochs * self._pool_size - self._position.rows
        prompts, wanted = self._wanted(self._after(self._position))
        self._sample_ahead(prompts, **wanted, steps=left // self.reuse.batch_size)

    def _rows_of_pass(self, reuse_epoch: int) -> Tensor:
        """Return the buffer's rows in the order of a pass, [optimizer batches, micro-batches, processes, rows]."""
        number = self._position.prompts // self.reuse.prompts_per_pool  # of the buffer in this pass over the prompts
        # The 0 keeps the order of earlier versions, where it was the rank.
        seed = derive_seed("rows", self.seed, 0, self._position.epoch, number, reuse_epoch)
        rows = torch.randperm(self._pool_size, generator=torch.Generator().manual_seed(seed))
        size = self.reuse.batch_size // (self._micro_batches * self._world_size)
        return rows.view(-1, self._micro_batches, self._world_size, size)

    @staticmethod
    def _shares(rows: Tensor) -> list[Tensor]:
        """Return for each process the rows that it trains on in a pass, in order."""
        return list(rows.permute(2, 0, 1, 3).flatten(1))

    def _exchange(self, rows: Tensor) -> None:
        """Exchange rows between the processes, so that each has those that it trains on in a pass."""
        wanted = self._shares(rows)
        if self._world_size == 1 or all(map(torch.equal, wanted, self._held)):
            return
        assert self._pool is not None
        state, self._pool = self._pool.state_dict(), None  # the state alone holds the tensors
        exchange_rows(state, self._held, wanted)
        self._pool, self._held = Pool.from_state_dict(state), wanted

    def _next_optimizer_batch(self) -> Iterator[Minibatch]:
        reuse_epoch, start = divmod(self._position.rows, self._pool_size)
        rows = self._rows_of_pass(reuse_epoch)
        self._exchange(rows)
        pool = self._pool
        assert pool is not None
        is_first = self._position.rows == 0
        chunks = rows[start // self.reuse.batch_size, :, self._rank]  # [micro-batches, rows]
        places = [self._places(chunk) for chunk in chunks]
        num_tokens = pool.rollouts.num_tokens[torch.cat(places)]
        total, non_empty = int(num_tokens.sum()), int((num_tokens > 0).sum())
        parts = tuple(trimmed(pool.rollouts.rows(part), pool.targets.rows(part)) for part in places)
        for position, part in enumerate(parts):
            if position + 1 == len(parts):  # a state taken before repeats the optimizer batch
                self._move(self.reuse.batch_size)
            yield Minibatch(
                *part,
                rows=chunks[position],
                num_tokens=total,
                num_rollouts=non_empty,
                micro_batches=parts,
                position=position,
                reuse_epoch=reuse_epoch,
                pool_metrics=pool.metrics,
                behavior_known=not (is_first and pool.first_batch_unscored),
            )

    def _places(self, rows: Tensor) -> Tensor:
        """Return the places of the buffer's rows in this process's tensors."""
        places = torch.empty(self._pool_size, dtype=torch.long)
        places[self._held[self._rank]] = torch.arange(len(self._held[self._rank]))
        return places[rows]

    def _move(self, rows: int = 0) -> None:
        """Move the position by some rows, and on to the next buffer and the next pass over the prompts if it ends."""
        at = replace(self._position, rows=self._position.rows + rows)
        if at.rows >= self.reuse.epochs * self._pool_size:
            self._pool = None
            at = self._after(at)
        self._position = self._begin(at) if at.rows == 0 else at

    def _after(self, at: Position) -> Position:
        """Return the position at which the buffer after that of a position begins."""
        return self._begin(
            Position(
                epoch=at.epoch,
                prompts=at.prompts + self.reuse.prompts_per_pool,
                buffers=at.buffers + 1,
                rollouts=at.rollouts + self._pool_size,
            )
        )

    def _begin(self, at: Position) -> Position:
        """Return the position of a buffer's begin: in the next pass over the prompts if too few are left in this."""
        ends = at.prompts + self.reuse.prompts_per_pool > len(self._prompts)
        return replace(at, epoch=at.epoch + 1, prompts=0) if ends else at

    def fill_behavior(self, rows: Tensor, logprobs: Tensor) -> None:
        """Store behavior log-probabilities computed by a training step in the buffer, for later passes.

        Args:
            rows: [B] long, in host memory: rows of the current buffer that this process holds.
            logprobs: [B, T] nats, detached: under the behavior policy.
        """
        if self._pool is None:  # this was the buffer's last minibatch
            return
        rollouts = self._pool.rollouts
        behavior = rollouts.behavior_logprobs.clone()
        behavior[self._places(rows), : logprobs.shape[1]] = logprobs.cpu()
        self._pool = replace(self._pool, rollouts=replace(rollouts, behavior_logprobs=behavior))

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the buffer if it is in use, as tensors and plain values.

        It does not depend on the number of processes. All must call this, and only the first receives the buffer.
        """
        state: dict[str, Any] = asdict(self._position)
        if self._position.rows:
            assert self._pool is not None
            pool = self._pool.state_dict()
            if self._world_size > 1:
                every, none = torch.arange(self._pool_size), torch.arange(0)
                exchange_rows(pool, self._held, [every, *[none] * (self._world_size - 1)])
            if self._rank == 0:
                state["pool"] = pool
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position, and this process's rows of the buffer, from a :meth:`state_dict`.

        Raises:
            UsageError: the state is inside a buffer, and this loader's sizes do not allow to finish it.
        """
        names = asdict(Position()).keys()
        require(
            names <= state.keys() and "pools" not in state,
            "the checkpoint was written by another version of opdlab, so a run cannot go on from it: start a new run "
            "from its student",
        )
        self._position = Position(**{name: state[name] for name in names})
        self._pool = None
        if "pool" in state:
            pool = Pool.from_state_dict(state["pool"])
            require(
                len(pool.rollouts) == self._pool_size,
                f"data.reuse.prompts_per_pool * model.sampling.num_samples is {self._pool_size}, but the checkpoint is "
                f"inside a rollout buffer of {len(pool.rollouts)}: resume with sizes that give as many, they may "
                "change where a buffer ends",
            )
            check_batch_size(self.reuse.batch_size, self._position.rows, self._pool_size)
            if self._world_size == 1:
                self._pool, self._held = pool, self._as_collected
            else:
                self._held = self._shares(self._rows_of_pass(self._position.rows // self._pool_size))
                self._pool = pool.rows(self._held[self._rank])
        self._move()  # the buffer, or the pass over the prompts, may end here with this loader's sizes


def check_batch_size(batch_size: int, rows: int, pool_size: int) -> None:
    """Raise a UsageError if batches of this size cannot finish the pass over a buffer that a checkpoint is inside.

    Args:
        batch_size: rollouts in an optimizer step.
        rows: rollouts that the buffer has yielded, in all passes.
        pool_size: rollouts in the buffer.
    """
    left = pool_size - rows % pool_size
    require(
        left % batch_size == 0,
        f"data.reuse.batch_size is {batch_size}, but the checkpoint is inside a pass over a rollout buffer of which "
        f"{left} rollouts are left: choose a size that divides {left}, or resume with the size of the run",
    )
