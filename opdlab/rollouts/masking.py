"""Masking of positions that the loss ignores."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from opdlab.types import Rollouts


def mask_first_occurrences(rollouts: Rollouts, token_ids: Sequence[int]) -> Rollouts:
    """Return the rollouts with the first occurrence of each given token masked in each response.

    Loss, gate and denominators ignore masked positions; attention does not. ``num_tokens`` then counts the remaining
    positions and no longer equals the response length.

    Args:
        rollouts: B rollouts of T response tokens.
        token_ids: M token ids.

    Example:
        >>> mask, zeros = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        >>> rollouts = Rollouts(*2 * (torch.tensor([[7, 3, 7, 3, 1]]), mask), mask.float(), *5 * (zeros,))
        >>> mask_first_occurrences(rollouts, [3, 1]).mask.int().tolist()
        [[1, 0, 1, 1, 0]]
    """
    if not token_ids:
        return rollouts
    ids = torch.tensor(list(token_ids), device=rollouts.tokens.device)
    found = (rollouts.tokens[..., None] == ids) & rollouts.mask.bool()[..., None]  # [B, T, M]
    first = (found & (found.cumsum(1) == 1)).any(-1)
    mask = rollouts.mask & ~first
    return replace(rollouts, mask=mask, behavior_logprobs=rollouts.behavior_logprobs.masked_fill(~mask, 0.0))
