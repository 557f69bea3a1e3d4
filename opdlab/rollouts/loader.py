"""Rollout reuse: a rollout buffer that is sampled lazily, scored once, and trained on for several passes."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from opdlab.errors import require
from opdlab.rollouts.reuse import ReuseConfig
from opdlab.seeds import derive_seed
from opdlab.types import Minibatch, Prompt, Rollouts, Targets, trimmed


@dataclass(frozen=True)
class Pool:
    """A rollout buffer: rollouts with their targets, in host memory.

    Args:
        rollouts: all rollouts of the buffer.
        targets: the teacher's targets, computed once.
        metrics: metrics of sampling and scoring, by name.
        first_batch_unscored: True if the next training step fills in the behavior log-probabilities of the first
            optimizer batch, see :meth:`RolloutLoader.fill_behavior`.
    """

    rollouts: Rollouts
    targets: Targets
    metrics: dict[str, float] = field(default_factory=dict)
    first_batch_unscored: bool = False


class Collect(Protocol):
    """Function that fills a rollout buffer: :meth:`opdlab.rollouts.Collector.collect`, as the module calls it."""

    def __call__(self, prompts: Sequence[Prompt], *, seed: int, first_rollout_id: int, first_batch: Tensor) -> Pool:
        """Return a buffer of rollouts of ``prompts``.

        Args:
            prompts: prompts to sample from.
            seed: determines the samples.
            first_rollout_id: id of the buffer's first rollout.
            first_batch: [B] long, rows of the first optimizer batch: the training step may fill in their behavior
                log-probabilities.
        """


@dataclass(frozen=True)
class Position:
    """A loader's position, in units that no batch size and no number of processes changes.

    Args:
        epoch: finished passes over the prompts.
        prompts: prompts of this pass whose buffers are finished, of all processes.
        buffers: finished buffers of the run, of all processes.
        rollouts: rollouts in these buffers.
        rows: rows of the current buffer that were trained on, over all passes; whole optimizer batches only.

    Example:
        Two processes are in their first buffer, after three optimizer batches of eight rollouts.

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

    Args:
        prompts: prompts to sample from; ``rank`` and ``world_size`` select this process's share.
        collect: fills a buffer.
        samples_per_prompt: rollouts that ``collect`` returns for each prompt.
        prompts_per_pool: prompts in a buffer, per process.
        batch_size: rollouts in an optimizer step, per process.
        micro_batches: equal parts of an optimizer batch: Lightning's ``accumulate_grad_batches``.
        reuse_epochs: passes over a buffer.
        seed: determines the order and the samples.
        rank: rank of this process.
        world_size: number of processes.

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
    ) -> None:
        self._pool_size = prompts_per_pool * samples_per_prompt
        self.reuse = ReuseConfig(prompts_per_pool, reuse_epochs, batch_size)  # checks its values
        self.reuse.check(samples_per_prompt, micro_batches)
        self.reuse.check_prompts(len(prompts), world_size)
        self._prompts = prompts
        self._collect = collect
        self._micro_batches = micro_batches
        self.seed, self.world_size = seed, world_size
        self._rank = rank
        self._prompts_per_buffer = prompts_per_pool * world_size  # of all processes; leftovers of a pass are dropped
        self._minibatches_per_buffer = reuse_epochs * (self._pool_size // batch_size) * micro_batches
        self._position = Position()
        self._pool: Pool | None = None  # the buffer at the position, once it is filled

    def __len__(self) -> int:
        return len(self._prompts) // self._prompts_per_buffer * self._minibatches_per_buffer

    @property
    def num_yielded(self) -> int:
        """Return the number of minibatches of this pass over the prompts that lie before the position."""
        left = (len(self._prompts) - self._position.prompts) // self._prompts_per_buffer
        rows = self._position.rows // self.reuse.batch_size * self._micro_batches
        return len(self) - left * self._minibatches_per_buffer + rows

    def __iter__(self) -> Iterator[Minibatch]:
        epoch = self._position.epoch
        while self._position.epoch == epoch:
            if self._pool is None:
                self._pool = self._next_pool()
            yield from self._next_optimizer_batch(self._pool)

    def _next_pool(self) -> Pool:
        at = self._position
        generator = torch.Generator().manual_seed(derive_seed("prompts", self.seed, at.epoch))
        order = torch.randperm(len(self._prompts), generator=generator)[at.prompts :][self._rank :: self.world_size]
        return self._collect(
            [self._prompts[i] for i in order[: self.reuse.prompts_per_pool].tolist()],
            seed=derive_seed("pool", self.seed, at.buffers + self._rank),
            first_rollout_id=at.rollouts + self._rank * self._pool_size,
            first_batch=self._row_order(0)[: self.reuse.batch_size],
        )

    def _row_order(self, reuse_epoch: int) -> Tensor:
        number = self._position.prompts // self._prompts_per_buffer  # of the buffer in this pass over the prompts
        seed = derive_seed("rows", self.seed, self._rank, self._position.epoch, number, reuse_epoch)
        return torch.randperm(self._pool_size, generator=torch.Generator().manual_seed(seed))

    def _next_optimizer_batch(self, pool: Pool) -> Iterator[Minibatch]:
        reuse_epoch, start = divmod(self._position.rows, self._pool_size)
        rows = self._row_order(reuse_epoch)[start:][: self.reuse.batch_size]
        is_first = self._position.rows == 0
        num_tokens = pool.rollouts.num_tokens[rows]
        total, non_empty = int(num_tokens.sum()), int((num_tokens > 0).sum())
        chunks = rows.chunk(self._micro_batches)
        parts = tuple(trimmed(pool.rollouts.rows(part), pool.targets.rows(part)) for part in chunks)
        for position, part in enumerate(parts):
            if position + 1 == len(parts):  # a state taken before repeats the optimizer batch
                self._move(len(rows))
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

    def _move(self, rows: int = 0) -> None:
        """Move the position by some rows, and on to the next buffer and the next pass over the prompts if it ends."""
        at = replace(self._position, rows=self._position.rows + rows)
        if at.rows >= self.reuse.epochs * self._pool_size:
            self._pool = None
            at = Position(
                epoch=at.epoch,
                prompts=at.prompts + self._prompts_per_buffer,
                buffers=at.buffers + self.world_size,
                rollouts=at.rollouts + self.world_size * self._pool_size,
            )
        if at.rows == 0 and at.prompts + self._prompts_per_buffer > len(self._prompts):
            at = replace(at, epoch=at.epoch + 1, prompts=0)
        self._position = at

    def fill_behavior(self, rows: Tensor, logprobs: Tensor) -> None:
        """Store behavior log-probabilities computed by a training step in the buffer, for later passes.

        Args:
            rows: [B] long, in host memory: rows of the current buffer.
            logprobs: [B, T] nats, detached: under the behavior policy.
        """
        if self._pool is None:  # this was the buffer's last minibatch
            return
        rollouts = self._pool.rollouts
        behavior = rollouts.behavior_logprobs.clone()
        behavior[rows, : logprobs.shape[1]] = logprobs.cpu()
        self._pool = replace(self._pool, rollouts=replace(rollouts, behavior_logprobs=behavior))

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the buffers of all processes if they are in use, as tensors and plain values.

        With several processes, all must call this, and only the first receives the buffers of the others.
        """
        state: dict[str, Any] = asdict(self._position)
        if self._position.rows:
            pool = self._pool
            assert pool is not None
            own = {
                "rollouts": pool.rollouts.state_dict(),
                "targets": pool.targets.state_dict(),
                "metrics": pool.metrics,
                "first_batch_unscored": pool.first_batch_unscored,
            }
            state["pools"] = _gathered(own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position and this process's buffer of :meth:`state_dict`.

        Raises:
            UsageError: the state is inside a buffer, and this loader's sizes or number of processes do not allow to
                finish it.
        """
        names = asdict(Position()).keys()
        require(
            names <= state.keys(),
            "the checkpoint was written by another version of opdlab, so a run cannot go on from it: start a new run "
            "from its student",
        )
        self._position = Position(**{name: state[name] for name in names})
        pools, self._pool = state.get("pools", []), None
        if pools:
            require(
                len(pools) == self.world_size,
                f"trainer.devices * trainer.num_nodes is {self.world_size}, but the checkpoint is inside a rollout "
                f"buffer of {len(pools)} processes: resume with as many, the number may change where a buffer ends",
            )
            pool = pools[self._rank]
            rollouts = Rollouts.from_state_dict(pool["rollouts"])
            require(
                len(rollouts) == self._pool_size,
                f"data.reuse.prompts_per_pool * model.sampling.num_samples is {self._pool_size}, but the checkpoint is "
                f"inside a rollout buffer of {len(rollouts)}: resume with sizes that give as many, they may change "
                "where a buffer ends",
            )
            check_batch_size(self.reuse.batch_size, self._position.rows, len(rollouts))
            targets = Targets.from_state_dict(pool["targets"])
            self._pool = Pool(rollouts, targets, pool["metrics"], pool["first_batch_unscored"])
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


def _gathered(value: Any) -> list[Any]:
    """Return the values of all processes on the first one; on the others, and without processes, only their own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(value, values, group=_host_group())
    return values or [value]


@functools.cache
def _host_group() -> Any:
    """Return a group of all processes that exchanges host memory: a buffer may not fit on a device."""
    return distributed.new_group(backend="gloo")
