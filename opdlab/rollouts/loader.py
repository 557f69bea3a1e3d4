"""Rollout reuse: a rollout buffer that is sampled lazily, scored once, and trained on for several passes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

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
        self._reuse = ReuseConfig(prompts_per_pool, reuse_epochs, batch_size)  # checks its values
        self._reuse.check(samples_per_prompt, micro_batches)
        self._reuse.check_prompts(len(prompts), world_size)
        self._prompts = prompts
        self._collect = collect
        self._micro_batches = micro_batches
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._epoch = 0  # finished passes over the prompts
        self._pool_index = 0  # buffer within the epoch
        self._cursor = 0  # minibatches of the buffer already yielded
        self._pool: Pool | None = None

    @property
    def pools_per_epoch(self) -> int:
        """Return the number of buffers in one pass over the prompts; leftover prompts are dropped for that pass."""
        return len(self._prompts) // self._world_size // self._reuse.prompts_per_pool

    @property
    def minibatches_per_pool(self) -> int:
        """Return the number of minibatches that one buffer yields over all its passes."""
        return self._reuse.epochs * (self._pool_size // self._reuse.batch_size) * self._micro_batches

    def __len__(self) -> int:
        return self.pools_per_epoch * self.minibatches_per_pool

    def __iter__(self) -> Iterator[Minibatch]:
        if self._pool_index == self.pools_per_epoch - 1 and self._cursor == self.minibatches_per_pool:
            self._epoch, self._pool_index, self._cursor = self._epoch + 1, 0, 0
        while self._pool_index < self.pools_per_epoch:
            if self._pool is None or self._cursor == 0:
                self._pool = self._next_pool()
            yield from self._rest_of_pool()
            if self._pool_index == self.pools_per_epoch - 1:
                return
            self._pool_index, self._cursor = self._pool_index + 1, 0

    def _next_pool(self) -> Pool:
        generator = torch.Generator().manual_seed(derive_seed("prompts", self._seed, self._epoch))
        order = torch.randperm(len(self._prompts), generator=generator)[self._rank :: self._world_size]
        start = self._pool_index * self._reuse.prompts_per_pool
        chosen = [self._prompts[i] for i in order[start : start + self._reuse.prompts_per_pool].tolist()]
        number = (self._epoch * self.pools_per_epoch + self._pool_index) * self._world_size + self._rank
        pool_seed = derive_seed("pool", self._seed, number)
        return self._collect(
            chosen,
            seed=pool_seed,
            first_rollout_id=number * self._pool_size,
            first_batch=self._row_order(0)[: self._reuse.batch_size],
        )

    def _rest_of_pool(self) -> Iterator[Minibatch]:
        first = self._cursor // self._micro_batches
        batches_per_pass = self._pool_size // self._reuse.batch_size
        for batch in range(first, self._reuse.epochs * batches_per_pass):
            reuse_epoch, number = divmod(batch, batches_per_pass)
            rows = self._row_order(reuse_epoch)[number * self._reuse.batch_size :][: self._reuse.batch_size]
            minibatches = self._optimizer_batch(rows, reuse_epoch, is_first=batch == 0)
            for minibatch in minibatches[self._cursor % self._micro_batches :]:
                self._cursor += 1
                yield minibatch

    def _row_order(self, reuse_epoch: int) -> Tensor:
        seed = derive_seed("rows", self._seed, self._rank, self._epoch, self._pool_index, reuse_epoch)
        return torch.randperm(self._pool_size, generator=torch.Generator().manual_seed(seed))

    def _optimizer_batch(self, rows: Tensor, reuse_epoch: int, is_first: bool) -> list[Minibatch]:
        pool = self._pool
        assert pool is not None
        num_tokens = pool.rollouts.num_tokens[rows]
        total, non_empty = int(num_tokens.sum()), int((num_tokens > 0).sum())
        chunks = rows.chunk(self._micro_batches)
        parts = tuple(trimmed(pool.rollouts.rows(part), pool.targets.rows(part)) for part in chunks)
        return [
            Minibatch(
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
            for position, part in enumerate(parts)
        ]

    def fill_behavior(self, rows: Tensor, logprobs: Tensor) -> None:
        """Store behavior log-probabilities computed by a training step in the buffer, for later passes.

        Args:
            rows: [B] long, in host memory: rows of the current buffer.
            logprobs: [B, T] nats, detached: under the behavior policy.
        """
        assert self._pool is not None
        rollouts = self._pool.rollouts
        behavior = rollouts.behavior_logprobs.clone()
        behavior[rows, : logprobs.shape[1]] = logprobs.cpu()
        self._pool = replace(self._pool, rollouts=replace(rollouts, behavior_logprobs=behavior))

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position, and the buffer if it is still in use, as tensors and plain values."""
        pool = self._pool if 0 < self._cursor < self.minibatches_per_pool else None
        state: dict[str, Any] = {"epoch": self._epoch, "pool_index": self._pool_index, "cursor": self._cursor}
        if pool is not None:
            state["pool"] = {
                "rollouts": pool.rollouts.state_dict(),
                "targets": pool.targets.state_dict(),
                "metrics": pool.metrics,
                "first_batch_unscored": pool.first_batch_unscored,
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position and the buffer of :meth:`state_dict`.

        Raises:
            UsageError: the buffer in the state has a different size from this loader's.
        """
        self._epoch, self._pool_index, self._cursor = state["epoch"], state["pool_index"], state["cursor"]
        self._pool = None
        if (pool := state.get("pool")) is not None:
            rollouts = Rollouts.from_state_dict(pool["rollouts"])
            require(
                len(rollouts) == self._pool_size,
                f"the checkpoint is in the middle of a rollout buffer of {len(rollouts)}, but the configuration asks "
                f"for {self._pool_size}: resume with the configuration that the run was started with",
            )
            targets = Targets.from_state_dict(pool["targets"])
            self._pool = Pool(rollouts, targets, pool["metrics"], pool["first_batch_unscored"])
