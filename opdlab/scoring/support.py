"""Logits of a few chosen tokens per position.

Shapes: N positions, H hidden size, V vocabulary, K support.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdlab.scoring.head import Head, LogitTiles, autocast_inputs, wide_dtype
from opdlab.scoring.head_gradients import HeadGradients, pieces
from opdlab.scoring.logprobs import TokenStatistics, topk_with_statistics, vocabulary_pass


def support_statistics(hidden: Tensor, head: Head, targets: Tensor, support: Tensor) -> tuple[Tensor, TokenStatistics]:
    """Return the logits of K chosen tokens per position, and the token statistics without gradient, in one pass.

    The backward pass reads only the K head rows that each position has chosen. If the vocabulary is not much larger
    than the support, it uses products with the whole head instead, which are then faster.

    Args:
        hidden: [N, H]; differentiable.
        head: its weight, bias and low-rank update are differentiable.
        targets: [N] long.
        support: [N, K] integers, token ids.

    Returns:
        The logits [N, K] and the statistics; float32, or float64 for float64 inputs.
    """
    head = head.gathered()
    ids = torch.cat([support.long(), targets[:, None]], dim=1)  # [N, K + 1] long
    with autocast_inputs(hidden) as states:
        with torch.no_grad():
            softmax, chosen, _ = vocabulary_pass(states, head, ids)
            statistics = softmax.statistics(chosen[:, -1])
        logits: Tensor = _SupportLogits.apply(  # type: ignore[no-untyped-call]
            states, *head.tensors, ids[:, :-1], head, chosen[:, :-1].contiguous()
        )
    return logits, statistics


def support_logits(
    hidden: Tensor,
    weight: Tensor,
    support: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return the logits of K chosen tokens per position; both passes read K rows of the head per position.

    Args:
        hidden: [N, H]; differentiable.
        weight: [V, H]; differentiable.
        support: [N, K] integers, token ids.
        bias: [V]; differentiable.
        temperature: sampling temperature, above 0.
        softcap: bound of the logits' soft cap, or None.
        scale: factor on the logits.

    Returns:
        [N, K] float32 (float64 for float64 inputs).

    Example:
        >>> hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
        >>> support = torch.tensor([[0, 3]]).expand(5, 2)
        >>> torch.allclose(support_logits(hidden, weight, support), (hidden @ weight.T)[:, [0, 3]], atol=1e-5)
        True
    """
    head, ids = Head(weight, bias, scale, softcap, temperature).gathered(), support.long()
    with autocast_inputs(hidden) as states:
        dtype = wide_dtype(states)
        known = states.new_empty(ids.shape, dtype=dtype)
        with torch.no_grad():
            for rows in pieces(len(states), ids.shape[1] * states.shape[1]):
                chosen = head.weight[ids[rows]].to(dtype)  # [N', K, H]
                z = torch.bmm(chosen, states[rows, :, None].to(dtype)).squeeze(-1)  # @ [N', H, 1] -> [N', K]
                if head.bias is not None:
                    z += head.bias[ids[rows]]
                known[rows] = head.transform_(z)
        logits: Tensor = _SupportLogits.apply(  # type: ignore[no-untyped-call]
            states, *head.tensors, ids, head, known
        )
    return logits


@torch.no_grad()
def support_overlap(hidden: Tensor, head: Head, support: Tensor, most: int) -> Tensor:
    """Return the share of a support's K tokens that are among the K most likely ones of these hidden states.

    The pass over the head covers a part of the positions, evenly spread, so that it costs little.

    Args:
        hidden: [N, H].
        head: the head.
        support: [N, K] integers, token ids, each once in a row.
        most: largest number of positions, at least 1.

    Returns:
        [M] float32, M <= ``most``, 0 to 1.

    Example:
        >>> head = Head(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
        >>> support_overlap(torch.ones(1, 1), head, torch.tensor([[3, 0]]), most=8)
        tensor([0.5000])
    """
    rows = slice(None, None, -(-len(hidden) // most) or 1)
    ids = support[rows].long()
    top, _ = topk_with_statistics(hidden[rows], head, ids[:, 0], ids.shape[1])
    return (ids[:, :, None] == top.ids[:, None, :]).any(-1).float().mean(-1)


class _SupportLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *inputs: Any) -> Tensor:
        *tensors, support, head, logits = inputs  # the tensors are the head's; the caller has computed the logits
        ctx.save_for_backward(hidden, *tensors, support, logits)
        ctx.head = head
        result: Tensor = logits
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *_, support, logits = ctx.saved_tensors
        sums = HeadGradients(ctx, LogitTiles(ctx.head, hidden))
        sums.add_support(support, gradient * ctx.head.slope(logits))
        return *sums.returned(), None, None, None
