"""Logits of a support, and the log-sum of the logits outside it, from one pass over the head.

The sum outside the support is summed there: taken as ``log(1 - P)`` in float32 it would lose all digits where the
support has nearly all of the probability.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, K support.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdlab.scoring.head import Head, LogitTiles, autocast_inputs, places, tiles
from opdlab.scoring.head_gradients import HeadGradients
from opdlab.scoring.logprobs import TokenStatistics, leave_out_, vocabulary_pass


class SupportTail(NamedTuple):
    """A support of each position, and the rest of the vocabulary as one number; float32, or float64.

    Attributes:
        ids: [N, K] long, token ids.
        valid: [N, K] bool, False at an id that stands in the support a second time; it is counted once.
        logits: [N, K].
        log_tail: [N], log-sum-exp of the logits outside the support; -inf if there are none.
        statistics: of the whole vocabulary.
    """

    ids: Tensor
    valid: Tensor
    logits: Tensor
    log_tail: Tensor
    statistics: TokenStatistics


def first_occurrences(ids: Tensor) -> Tensor:
    """Return a mask that is False where an id stands in its row a second time, [N, K] bool.

    Example:
        >>> first_occurrences(torch.tensor([[7, 3, 7], [5, 5, 5]]))
        tensor([[ True,  True, False],
                [ True, False, False]])
    """
    ordered, order = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(first).scatter_(1, order, first)


def support_tail(hidden: Tensor, head: Head, targets: Tensor, support: Tensor) -> SupportTail:
    """Return the logits of K chosen tokens per position and the log-sum of all other logits, in one pass.

    The logits, ``log_tail``, and of the statistics ``logprobs`` and ``log_normalizer`` are differentiable. Their
    gradient reaches every token, so the backward pass recomputes each tile of logits. If only the hidden states take a
    gradient, the forward pass sums the expected row of the head outside the support, [N, H], and the backward pass
    reads only K rows per position.

    Args:
        hidden: [N, H]; differentiable.
        head: its weight, bias and low-rank update are differentiable.
        targets: [N] long.
        support: [N, K] integers, token ids.

    Returns:
        See :class:`SupportTail`.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> head = Head(logits.T)  # of one hidden state of size 1
        >>> tail = support_tail(torch.ones(1, 1), head, torch.tensor([0]), torch.tensor([[3, 1, 3]]))
        >>> tail.logits, tail.log_tail, logits[:, [0, 2]].logsumexp(1)
        (tensor([[3., 1., 3.]]), tensor([2.1269]), tensor([2.1269]))
    """
    head = head.gathered()
    ids = support.long()
    valid = first_occurrences(ids)
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not head.trained
    with autocast_inputs(hidden) as states:
        logits, target_logits, normalizer, log_tail, entropy, max_logit = _SupportTail.apply(  # type: ignore[no-untyped-call]
            states, *head.tensors, torch.cat([ids, targets[:, None]], dim=1), valid, head, ahead
        )
    statistics = TokenStatistics(target_logits - normalizer, entropy, normalizer, max_logit)
    return SupportTail(ids, valid, logits, log_tail, statistics)


class _SupportTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, ids, valid, head, ahead = inputs  # the tensors are the head's
        k = valid.shape[1]
        softmax, chosen, _ = vocabulary_pass(hidden, head, ids, hidden.shape[1] if ahead else 0, left_out=k)
        log_tail = softmax.log_normalizer
        outside = softmax.expected_rows if ahead else None
        logits, target_logits = chosen[:, :k].contiguous(), chosen[:, k]
        softmax.add(slice(None), logits.masked_fill(~valid, -torch.inf))
        _, entropy, normalizer, max_logit = softmax.statistics(target_logits)
        ctx.head, ctx.ahead = head, ahead
        ctx.save_for_backward(hidden, *tensors, ids, valid, chosen, normalizer, log_tail, outside)
        ctx.mark_non_differentiable(entropy, max_logit)
        return logits, target_logits, normalizer, log_tail, entropy, max_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_logits, of_target, of_normalizer, of_log_tail, *_ = gradients
        hidden, *_, ids, valid, chosen, normalizer, log_tail, outside = ctx.saved_tensors
        head, k = ctx.head, valid.shape[1]
        probabilities = (chosen[:, :k] - normalizer[:, None]).exp() * valid
        # Of the logits of support and target, and of each logit outside the support per unit of softmax outside it.
        at_ids = torch.cat([of_logits + of_normalizer[:, None] * probabilities, of_target[:, None]], dim=1)
        of_tail = of_normalizer * (log_tail - normalizer).exp() + of_log_tail
        made = LogitTiles(head, hidden)
        sums = HeadGradients(ctx, made)
        if ctx.ahead:
            sums.add_support(ids, at_ids * head.slope(chosen))
            sums.add_hidden(outside * of_tail[:, None])
            return *sums.returned(), None, None, None, None
        reference = log_tail.clamp(min=torch.finfo(log_tail.dtype).min)  # the difference of two infinities is NaN
        for rows, columns in tiles(len(hidden), head):
            logits = made.tile(rows, columns)
            slope = head.slope(logits)
            inside, place = places(ids[rows], columns)
            leave_out_(logits, inside[:, :k], place[:, :k])
            gradient = logits.sub_(reference[rows, None]).exp_().mul_(of_tail[rows, None])  # [N', C]
            gradient.scatter_add_(1, place, at_ids[rows] * inside)
            sums.add_tile(rows, columns, gradient.mul_(slope))
        return *sums.returned(), None, None, None, None


@torch.no_grad()
def topk_with_tail(hidden: Tensor, head: Head, targets: Tensor, k: int = 0, given: Tensor | None = None) -> SupportTail:
    """Return a support of the K most likely tokens, or of given ones, or of both, with its tail, without gradient.

    Args:
        hidden: [N, H].
        head: the head.
        targets: [N] long.
        k: number of most likely tokens in the support.
        given: [N, G] integers, token ids, each once in a row; None for none.

    Returns:
        See :class:`SupportTail`; the support has the K most likely tokens, most likely first, and then the given ones.
    """
    given = targets.new_zeros(len(targets), 0) if given is None else given.long()
    num_given = given.shape[1]
    with autocast_inputs(hidden) as states:
        ids = torch.cat([given, targets[:, None]], dim=1)
        softmax, chosen, top = vocabulary_pass(states, head.gathered(), ids, k=k, left_out=num_given)
    ids, logits = given, chosen[:, :num_given]
    if k:  # the pass has the most likely tokens among those that are not given
        both_ids, both = torch.cat([top.ids, given], dim=1), torch.cat([top.logits, logits], dim=1)
        best_logits, best = both.topk(k, dim=1)
        ids, logits = (torch.cat(parts, dim=1) for parts in ((both_ids.gather(1, best), ids), (best_logits, logits)))
        softmax.add(slice(None), both.scatter_(1, best, -torch.inf)[:, :k].clone())
    valid = first_occurrences(ids)
    log_tail = softmax.log_normalizer
    softmax.add(slice(None), logits.masked_fill(~valid, -torch.inf))
    return SupportTail(ids, valid, logits, log_tail, softmax.statistics(chosen[:, -1]))
