"""How much of a buffer takes its responses from the data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdlab.errors import UsageError, require
from opdlab.policies.demonstrations import Given
from opdlab.seeds import derive_seed
from opdlab.types import Prompt

MEND = "give the field that holds it as data.demonstrations.field, or set data.demonstrations.share to 0"
"""What to do without demonstrations, for messages."""


@dataclass(frozen=True)
class DemonstrationConfig:
    """Responses from the data in place of sampled ones.

    A share of each buffer's rollouts takes its response from the data, with a stop token behind it; what is longer than
    ``sampling.max_new_tokens`` is cut. The share is 1 - lambda of GKD (arXiv 2306.13649); share 1 with the objective
    ``nll`` is sequence-level distillation. Teacher, snapshot, drift and gate treat these rollouts as all others.

    Args:
        share: of the buffer's rollouts, 0 to 1, rounded to whole rollouts; spread evenly over its prompts.
        field: field of a row with the response: text, or a list of parts with ``content`` and, if a part does not count
            in the loss, ``loss: false``. Null if the source sets :attr:`opdlab.types.Problem.demonstration` itself.

    Raises:
        UsageError: the share is out of range.
    """

    share: float = 0.0
    field: str | None = None

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"share is {self.share}, but must be a share from 0 to 1")

    def check(self, num_rollouts: int) -> None:
        """Raise a UsageError if the share is not a single rollout of a buffer."""
        require(
            not self.share or round(self.share * num_rollouts) > 0,
            f"data.demonstrations.share is {self.share}, which is no rollout of a buffer of {num_rollouts}: raise it, "
            "or set it to 0",
        )


def demonstrations_per_prompt(share: float, num_prompts: int, num_samples: int) -> tuple[int, int]:
    """Return how many rollouts of each prompt take the given response, and how many prompts have one more.

    Args:
        share: of the buffer's rollouts, 0 to 1.
        num_prompts: of the buffer.
        num_samples: rollouts of each prompt.

    Example:
        Half of 24 rollouts are 12: one for each of 8 prompts, and another one for 4 of them.

        >>> demonstrations_per_prompt(0.5, num_prompts=8, num_samples=3)
        (1, 4)
    """
    return divmod(round(share * num_prompts * num_samples), num_prompts)


def choose_demonstrations(prompts: Sequence[Prompt], num_samples: int, share: float, seed: int) -> list[Given] | None:
    """Return the given response of each prompt and how many of its rollouts take it; None if the share is 0.

    Args:
        prompts: of a buffer.
        num_samples: rollouts of each prompt.
        share: of the rollouts, 0 to 1.
        seed: chooses the prompts that take one more than the others.

    Raises:
        UsageError: a prompt has no demonstration.
    """
    if not share:
        return None
    least, more = demonstrations_per_prompt(share, len(prompts), num_samples)
    generator = torch.Generator().manual_seed(derive_seed("demonstrations", seed))
    chosen = set(torch.randperm(len(prompts), generator=generator)[:more].tolist())
    given = []
    for index, prompt in enumerate(prompts):
        if prompt.demonstration is None:
            raise UsageError(f"the problem '{prompt.problem.id}' has no demonstration: {MEND}")
        given.append(Given(prompt.demonstration, prompt.demonstration_loss, least + (index in chosen)))
    return given
