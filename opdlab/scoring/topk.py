"""The most likely tokens of a distribution.

Shapes: N positions, H hidden size, V vocabulary, K support.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from opdlab.scoring.head import Head, LogitTiles, autocast_inputs, places, tiles, wide_dtype
from opdlab.scoring.logprobs import OnlineSoftmax, TokenStatistics


class TopK(NamedTuple):
    """The K most likely tokens of a distribution. Each [N, K].

    Attributes:
        ids: token ids, long, most likely first.
        logits: their logits, float32.
    """

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def topk_with_statistics(
    hidden: Tensor, head: Head, targets: Tensor, k: int, vocab_size: int | None = None
) -> tuple[TopK, TokenStatistics]:
    """Return the top K and the target's statistics from one pass over the head, without gradient.

    Args:
        hidden: [N, H].
        head: the head.
        targets: [N] long.
        k: size of the support.
        vocab_size: only the first ``vocab_size`` tokens may enter the support (this excludes rows that pad the
            embedding).

    Returns:
        The top K and the :class:`TokenStatistics`.
    """
    with autocast_inputs(hidden) as states:
        return _topk_with_statistics(states, head.gathered(), targets, k, vocab_size or head.weight.shape[0])


def _topk_with_statistics(
    hidden: Tensor, head: Head, targets: Tensor, k: int, limit: int
) -> tuple[TopK, TokenStatistics]:
    like = hidden.new_empty(0, dtype=wide_dtype(hidden))
    softmax = OnlineSoftmax(hidden.shape[0], like)
    target_logits = like.new_zeros(hidden.shape[0], 1)
    ids = torch.zeros(hidden.shape[0], k, dtype=torch.long, device=hidden.device)
    values = like.new_full((hidden.shape[0], k), -torch.inf)
    made = LogitTiles(head, hidden)
    for rows, columns in tiles(hidden.shape[0], head.weight.shape[0]):
        logits = made.tile(rows, columns)
        inside, place = places(targets[rows, None], columns)
        target_logits[rows] = torch.where(inside, logits.gather(1, place), target_logits[rows])
        if columns.start < limit:
            new = logits[:, : limit - columns.start]
            new_values, new_places = new.topk(min(k, new.shape[1]), dim=1)
            both = torch.cat([values[rows], new_values], dim=1)  # [N', K + min(K, C)]
            values[rows], best = both.topk(k, dim=1)
            ids[rows] = torch.cat([ids[rows], new_places + columns.start], dim=1).gather(1, best)
        softmax.add(rows, logits)
    return TopK(ids, values), softmax.statistics(target_logits.view(-1))
