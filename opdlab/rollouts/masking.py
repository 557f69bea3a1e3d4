"""Masking of positions that the loss ignores."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

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
    return _masked(rollouts, ~first)


def mask_uncounted(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts with the positions masked that their loss mask leaves out.

    Loss, gate and denominators ignore them; attention does not.

    Args:
        rollouts: B rollouts; the result has no loss mask, because its mask holds it.

    Example:
        >>> mask, zeros = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
        >>> counted = torch.tensor([[True, False, True]])
        >>> rollouts = Rollouts(*2 * (torch.tensor([[7, 3, 1]]), mask), mask.float(), *5 * (zeros,), loss_mask=counted)
        >>> mask_uncounted(rollouts).mask.int().tolist()
        [[1, 0, 1]]
    """
    if rollouts.loss_mask is None:
        return rollouts
    return replace(_masked(rollouts, rollouts.loss_mask.bool()), loss_mask=None)


def _masked(rollouts: Rollouts, kept: Tensor) -> Rollouts:
    mask = rollouts.mask & kept
    return replace(rollouts, mask=mask, behavior_logprobs=rollouts.behavior_logprobs.masked_fill(~mask, 0.0))
