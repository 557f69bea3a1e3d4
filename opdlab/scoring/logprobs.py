"""Log-probability and entropy of sampled tokens, and the most likely tokens.

Shapes: N positions, H hidden size, V vocabulary, C of its columns, K support. Log-probabilities and entropies are in
nats.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdlab.scoring.head import Buffers, Head, LogitTiles, autocast_inputs, places, product, reused, tiles
from opdlab.scoring.head_gradients import HeadGradients


class TokenStatistics(NamedTuple):
    """Statistics of each position from one pass over the head. Each [N], float32, nats.

    Attributes:
        logprobs: log-probability of the target token; carries a gradient from :func:`token_statistics`.
        entropy: entropy of the next-token distribution.
        log_normalizer: log-sum-exp of the logits: a logit minus this is its log-probability.
        max_logit: the largest logit; a token with this logit is the most likely one.
    """

    logprobs: Tensor
    entropy: Tensor
    log_normalizer: Tensor
    max_logit: Tensor


class TopK(NamedTuple):
    """The K most likely tokens of a distribution. Each [N, K].

    Attributes:
        ids: token ids, long, most likely first.
        logits: their logits, float32.
    """

    ids: Tensor
    logits: Tensor


class OnlineSoftmax:
    """Running softmax sums over the vocabulary for each of N positions, updated tile by tile.

    Earlier sums are rescaled when a larger logit arrives: Milakov & Gimelshein, arXiv 1805.02867.

    Args:
        num_rows: N.
        like: gives device and dtype, float32 or wider.
        hidden_size: H, to also sum the rows of a matrix weighted by their probability; 0 to skip this.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> softmax = OnlineSoftmax(1, logits)
        >>> for tile in logits.split(2, dim=1):
        ...     _ = softmax.add(slice(0, 1), tile.clone())
        >>> softmax.statistics(logits[:, 0]).logprobs, logits.log_softmax(1)[:, 0]
        (tensor([-2.4076]), tensor([-2.4076]))
    """

    def __init__(self, num_rows: int, like: Tensor, hidden_size: int = 0) -> None:
        # Not -inf: the difference of two infinities is NaN.
        self.max_logit = like.new_full((num_rows,), torch.finfo(like.dtype).min)
        self._sum = like.new_zeros(num_rows)  # of exp(z - max)
        self._moment = like.new_zeros(num_rows)  # of exp(z - max) * (z - max)
        self._rows = like.new_zeros(num_rows, hidden_size)  # of exp(z - max) * a row of the matrix
        self._memory: Buffers = {}

    def add(self, rows: slice, logits: Tensor) -> Tensor:
        """Add a tile of logits [N', C], which is overwritten.

        Returns:
            ``exp(z - max)`` [N', C]; it is overwritten when the next tile is added.
        """
        before = self.max_logit[rows]
        largest = torch.maximum(before, logits.amax(1))
        shift = before - largest
        factor = shift.exp()
        logits -= largest[:, None]
        exponentials = torch.exp(logits, out=reused(self._memory, "exponentials", logits.shape, logits))
        # A logit of -inf has probability 0 and must contribute 0, but 0 * -inf is NaN.
        moment = logits.clamp_(min=torch.finfo(logits.dtype).min).mul_(exponentials).sum(1)
        self._moment[rows] = (self._moment[rows] + shift * self._sum[rows]) * factor + moment
        self._sum[rows] = self._sum[rows] * factor + exponentials.sum(1)
        self._rows[rows] *= factor[:, None]
        self.max_logit[rows] = largest
        return exponentials

    def add_rows(self, rows: slice, summed: Tensor) -> None:
        """Add ``exp(z - max) @ matrix`` [N', H] of the last added tile."""
        self._rows[rows] += summed

    def statistics(self, target_logits: Tensor) -> TokenStatistics:
        """Return the statistics of targets with the given logits, [N]; call after every tile has been added."""
        log_sum = self._sum.log()
        normalizer, entropy = self.max_logit + log_sum, log_sum - self._moment / self._sum  # [N] each
        return TokenStatistics(target_logits - normalizer, entropy, normalizer, self.max_logit)

    @property
    def expected_rows(self) -> Tensor:
        """Return the mean of the matrix's rows under the distribution, [N, H]; 0 if no logit is above -inf."""
        return self._rows / self._sum.clamp(min=torch.finfo(self._sum.dtype).tiny)[:, None]

    @property
    def log_normalizer(self) -> Tensor:
        """Return the log-sum-exp of the logits that were added, [N]; -inf if there are none."""
        return self.max_logit + self._sum.log()


def token_statistics(hidden: Tensor, head: Head, targets: Tensor) -> TokenStatistics:
    """Return log-probability of the targets, entropy and log-normalizer, without materializing [N, V].

    The backward pass recomputes each tile of logits. If only the hidden states take a gradient, their gradient
    ``slope * (weight[y] - E[weight])``, [N, H], is summed in the forward pass, and nothing is computed twice. A trained
    low-rank update of a frozen weight needs every probability again, as a trained weight does, but no V x H buffer.

    Args:
        hidden: [N, H]; differentiable.
        head: its weight, bias and low-rank update are differentiable.
        targets: [N] long.

    Returns:
        See :class:`TokenStatistics`; float32, or float64 for float64 inputs.
    """
    head = head.gathered()
    ahead = torch.is_grad_enabled() and hidden.requires_grad and not head.trained
    with autocast_inputs(hidden) as states:
        outputs: tuple[Tensor, ...] = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
            states, *head.tensors, targets, head, ahead
        )
    return TokenStatistics(*outputs)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, targets, head, ahead = inputs  # the tensors are the head's
        softmax, chosen, _ = vocabulary_pass(hidden, head, targets[:, None], hidden.shape[1] if ahead else 0)
        statistics = softmax.statistics(chosen.squeeze(1))
        ctx.head, ctx.ahead = head, ahead
        if ahead:
            own = head.weight[targets].to(chosen.dtype)  # [N, H]
            if head.low_rank is not None:
                own = own + head.low_rank.expand(head.low_rank.up[targets].to(chosen.dtype))
            ctx.save_for_backward((own * head.slope(chosen) - softmax.expected_rows).to(hidden.dtype))
        else:
            ctx.save_for_backward(hidden, *tensors, targets, statistics.log_normalizer)
        ctx.mark_non_differentiable(*statistics[1:])
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        upstream, saved = gradients[0], ctx.saved_tensors
        if ctx.ahead:
            return (upstream[:, None] * saved[0]).to(saved[0].dtype), *[None] * 7
        hidden, *_, targets, normalizer = saved
        made = LogitTiles(ctx.head, hidden)
        sums = HeadGradients(ctx, made)
        for rows, columns in tiles(hidden.shape[0], ctx.head):
            logits = made.tile(rows, columns)
            slope = ctx.head.slope(logits)
            gradient = logits.sub_(normalizer[rows, None]).exp_().mul_(-upstream[rows, None])  # [N', C]
            inside, place = places(targets[rows, None], columns)
            gradient.scatter_add_(1, place, (upstream[rows, None] * inside).to(gradient.dtype))
            sums.add_tile(rows, columns, gradient.mul_(slope))
        return *sums.returned(), None, None, None


def vocabulary_pass(
    hidden: Tensor, head: Head, ids: Tensor, hidden_size: int = 0, k: int = 0, left_out: int | None = None
) -> tuple[OnlineSoftmax, Tensor, TopK]:
    """Return the sums over the vocabulary, the logits of given ids, [N, I], and the K most likely tokens, in one pass.

    Args:
        hidden: [N, H].
        head: the head.
        ids: [N, I] long.
        hidden_size: H, to also sum the head's rows weighted by their probability; 0 to skip this.
        k: number of most likely tokens.
        left_out: number of columns of ``ids`` that the sums leave out, the first ones. The most likely tokens are then
            those of the others, and the sums leave them out too. None to sum over the whole vocabulary.
    """
    like = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    softmax = OnlineSoftmax(hidden.shape[0], like, hidden_size)
    chosen = like.new_full(ids.shape, -torch.inf)  # ids beyond the vocabulary have probability 0
    top = TopK(ids.new_zeros(len(hidden), k), like.new_full((len(hidden), k), -torch.inf))
    made = LogitTiles(head, hidden)
    for rows, columns in tiles(hidden.shape[0], head):
        logits = made.tile(rows, columns)
        inside, place = places(ids[rows], columns)
        chosen[rows] = torch.where(inside, logits.gather(1, place), chosen[rows])
        slope = head.slope(logits) if hidden_size else 1.0
        if left_out:
            leave_out_(logits, inside[:, :left_out], place[:, :left_out])
        if k:
            new_logits, new_places = logits.topk(min(k, logits.shape[1]), dim=1)
            if left_out is not None:
                logits.scatter_(1, new_places, -torch.inf)
            if not columns.start and new_logits.shape[1] == k:
                top.logits[rows], top.ids[rows] = new_logits, new_places
            else:
                both = torch.cat([top.logits[rows], new_logits], dim=1)  # [N', K + min(K, C)]
                top.logits[rows], best = both.topk(k, dim=1)
                top.ids[rows] = torch.cat([top.ids[rows], new_places + columns.start], dim=1).gather(1, best)
                if left_out is not None:  # the sums take what has fallen out of the most likely tokens
                    softmax.add(rows, both.scatter_(1, best, -torch.inf))
        exponentials = softmax.add(rows, logits)
        if hidden_size:
            factors = exponentials.mul_(slope)  # [N', C]
            summed = product(factors.to(hidden.dtype), head.weight[columns].to(hidden.dtype))  # @ [C, H]
            if head.low_rank is not None:
                summed += head.low_rank.expand(factors @ head.low_rank.up[columns].to(factors.dtype))
            softmax.add_rows(rows, summed)
    return softmax, chosen, top


def leave_out_(logits: Tensor, inside: Tensor, place: Tensor) -> None:
    """Set logits [N, C] to -inf at the given places [N, K] that are inside the columns, in place."""
    # Added, not assigned: a place outside is an arbitrary column, whose logit stays.
    logits.scatter_add_(1, place, torch.zeros_like(place, dtype=logits.dtype).masked_fill_(inside, -torch.inf))


@torch.no_grad()
def topk_with_statistics(hidden: Tensor, head: Head, targets: Tensor, k: int) -> tuple[TopK, TokenStatistics]:
    """Return the top K and the target's statistics from one pass over the head, without gradient.

    Args:
        hidden: [N, H].
        head: the head.
        targets: [N] long.
        k: size of the support.

    Returns:
        The top K and the :class:`TokenStatistics`.
    """
    with autocast_inputs(hidden) as states:
        softmax, chosen, top = vocabulary_pass(states, head.gathered(), targets[:, None], k=k)
    return top, softmax.statistics(chosen.squeeze(1))


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return the log-probability of each target token: :func:`token_statistics` for a head given by its parts.

    Args:
        hidden: [N, H]; differentiable.
        weight: [V, H]; differentiable.
        targets: [N] long.
        bias: [V]; differentiable.
        temperature: sampling temperature, above 0.
        softcap: bound of the logits' soft cap, or None.
        scale: factor on the logits.

    Returns:
        [N] float32 (float64 for float64 inputs), nats.

    Example:
        >>> hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
        >>> targets = torch.tensor([0, 1, 2, 3, 4])
        >>> plain = (hidden @ weight.T / 0.7).log_softmax(-1)[torch.arange(5), targets]
        >>> torch.allclose(token_logprobs(hidden, weight, targets, temperature=0.7), plain, atol=1e-5)
        True
    """
    return token_statistics(hidden, Head(weight, bias, scale, softcap, temperature), targets).logprobs
