"""Sizes of rollout buffers and batches."""

from dataclasses import dataclass

from opdlab.errors import require


@dataclass(frozen=True)
class ReuseConfig:
    """Sizes of the rollout buffer and its reuse, per process.

    Args:
        prompts_per_pool: prompts per rollout buffer; a buffer has ``prompts_per_pool * sampling.num_samples`` rollouts.
        epochs: passes over a buffer before the next is sampled.
        batch_size: rollouts in an optimizer step; must divide the buffer. ``trainer.accumulate_grad_batches`` splits
            it into that many micro-batches and does not change the step.
    """

    prompts_per_pool: int = 32
    epochs: int = 2
    batch_size: int = 32

    def __post_init__(self) -> None:
        for key in ("prompts_per_pool", "epochs", "batch_size"):
            value = getattr(self, key)
            require(value >= 1, f"{key} is {value}, but must be at least 1")

    def check_prompts(self, num_prompts: int, world_size: int = 1) -> None:
        """Raise a UsageError if there are fewer prompts than a buffer needs.

        Args:
            num_prompts: prompts to train on.
            world_size: processes that share them.
        """
        each = num_prompts // world_size
        require(
            each >= self.prompts_per_pool,
            f"data.reuse.prompts_per_pool is {self.prompts_per_pool}, but there are only {each} prompts"
            f"{' for each process' if world_size > 1 else ''}: lower it",
        )

    def check(self, samples_per_prompt: int, micro_batches: int) -> None:
        """Raise a UsageError if the sizes do not divide.

        Args:
            samples_per_prompt: rollouts of each prompt.
            micro_batches: number of micro-batches of an optimizer batch.

        Raises:
            UsageError: ``batch_size`` does not divide the buffer, or ``micro_batches`` does not divide ``batch_size``.

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
