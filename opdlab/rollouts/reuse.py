"""Sizes of rollout buffers and batches."""

from dataclasses import dataclass

from opdlab.errors import require


@dataclass(frozen=True)
class ReuseConfig:
    """Sizes of the rollout buffer and its reuse: those of the run, which its processes share equally.

    Args:
        prompts_per_pool: prompts per rollout buffer; a buffer has ``prompts_per_pool * sampling.num_samples`` rollouts.
            With several processes, a multiple of their number.
        epochs: passes over a buffer before the next is sampled.
        batch_size: rollouts in an optimizer step; must divide the buffer. ``trainer.accumulate_grad_batches`` splits
            it into that many micro-batches, and the processes share each of them; neither changes the step.
        overlap: rollout buffers that are sampled ahead: 0 to sample a buffer when it begins, 1 to sample the next one
            beside training, from a copy of the behavior snapshot. Its rollouts are then older by the optimizer steps
            of one buffer.
    """

    prompts_per_pool: int = 32
    epochs: int = 2
    batch_size: int = 32
    overlap: int = 0

    def __post_init__(self) -> None:
        require(
            self.overlap in (0, 1),
            f"overlap is {self.overlap}, but must be 0, or 1 to sample the next rollout buffer beside training",
        )
        for key in ("prompts_per_pool", "epochs", "batch_size"):
            value = getattr(self, key)
            require(value >= 1, f"{key} is {value}, but must be at least 1")

    def check_prompts(self, num_prompts: int) -> None:
        """Raise a UsageError if there are fewer prompts than a buffer needs.

        Args:
            num_prompts: prompts to train on.
        """
        require(
            num_prompts >= self.prompts_per_pool,
            f"data.reuse.prompts_per_pool is {self.prompts_per_pool}, but there are only {num_prompts} prompts: "
            "lower it",
        )

    def check(self, samples_per_prompt: int, micro_batches: int, num_processes: int = 1) -> None:
        """Raise a UsageError if the sizes do not divide.

        Args:
            samples_per_prompt: rollouts of each prompt.
            micro_batches: number of micro-batches of an optimizer batch.
            num_processes: processes that share a buffer.

        Raises:
            UsageError: ``batch_size`` does not divide the buffer, the micro-batches and processes do not divide
                ``batch_size``, or the processes do not divide ``prompts_per_pool``.

        Example:
            >>> ReuseConfig(prompts_per_pool=4, batch_size=8).check(samples_per_prompt=2, micro_batches=4)
        """
        pool_size = self.prompts_per_pool * samples_per_prompt
        require(
            pool_size % self.batch_size == 0,
            f"data.reuse.batch_size is {self.batch_size}, which does not divide a rollout buffer of {pool_size} "
            "(prompts_per_pool * num_samples): choose one that does",
        )
        require(micro_batches >= 1, f"trainer.accumulate_grad_batches is {micro_batches}, but must be at least 1")
        require(
            self.batch_size % micro_batches == 0,
            f"trainer.accumulate_grad_batches is {micro_batches}, which does not divide data.reuse.batch_size, which "
            f"is {self.batch_size}: choose one that does",
        )
        require(
            self.batch_size % (num_processes * micro_batches) == 0,
            f"data.reuse.batch_size is {self.batch_size}, which {num_processes} processes (trainer.devices * "
            f"trainer.num_nodes) with trainer.accumulate_grad_batches {micro_batches} cannot share equally: choose a "
            f"multiple of {num_processes * micro_batches}",
        )
        require(
            self.prompts_per_pool % num_processes == 0,
            f"data.reuse.prompts_per_pool is {self.prompts_per_pool}, which {num_processes} processes "
            f"(trainer.devices * trainer.num_nodes) cannot share equally: choose a multiple of {num_processes}",
        )
