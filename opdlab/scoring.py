"""Log-probabilities from hidden states, in bounded memory: the only place where the model's head is applied.

The head turns a hidden state into logits over the vocabulary, in this order: ``z = hidden @ weight.T + bias``;
``z *= scale``; ``z = softcap * tanh(z / softcap)``; ``z /= temperature``. For a response of 16,384 tokens and a
vocabulary of 151,936 these logits are 10 GB in float32, so they never exist at once: rows are worked off in chunks,
a few floats per row are kept, and the backward pass computes a chunk's logits again.

Shapes: N positions, H hidden size, V vocabulary, K support. Log-probabilities and entropies are in nats.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at any one time, forward or backward: 16 Mi floats, 64 MB in float32.
_MAX_CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits, and the temperature at which they are scored.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: bound of the soft cap (Gemma's ``final_logit_softcapping``), or None.
        temperature: sampling temperature, above 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V], float32 or wider. For pieces of a batch only: this is the large tensor."""
        weight = self.weight if hidden.dtype == self.weight.dtype else self.weight.to(hidden.dtype)
        z = _widen(hidden @ weight.T)
        return self.transform(z if self.bias is None else z + self.bias.to(z.dtype))

    def transform(self, z: Tensor) -> Tensor:
        """Apply scale, soft cap and temperature to raw logits."""
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1.0 else z / self.temperature

    def transform_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Carry a gradient on transformed logits back to raw logits; ``logits`` are the transformed ones."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits * (self.temperature / self.softcap)).square())
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient * factor


class TokenStatistics(NamedTuple):
    """What one pass over the head yields for each position. Each [N], float32, nats.

    Attributes:
        logprobs: log-probability of the target token; the only field that carries a gradient.
        entropy: entropy of the next-token distribution.
        log_normalizer: log-sum-exp of the logits: a logit minus this is its log-probability.
    """

    logprobs: Tensor
    entropy: Tensor
    log_normalizer: Tensor


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_autocast(hidden: Tensor) -> Tensor:
    """Follow autocast here, where it is seen: the backward pass runs outside it and must repeat the same logits."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _chunks(num_rows: int, row_size: int) -> Iterator[slice]:
    step = max(1, _MAX_CHUNK_LOGITS // max(row_size, 1))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _head_of(ctx: Any, saved_weight: Tensor, saved_bias: Tensor | None) -> Head:
    return Head(saved_weight, saved_bias, ctx.scale, ctx.softcap, ctx.temperature)


def _remember(ctx: Any, head: Head) -> None:
    ctx.scale, ctx.softcap, ctx.temperature = head.scale, head.softcap, head.temperature


class _HeadGradients:
    """Accumulates the head's gradients over chunks, in float32: sums of rounded products would bias training."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None

    def returned(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_weight = None if self.weight is None else self.weight.to(weight.dtype)
        grad_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, grad_weight, grad_bias


def _chunk_statistics(logits: Tensor, targets: Tensor) -> TokenStatistics:
    """Statistics of a chunk; overwrites ``logits`` [N, V], which may be the largest tensor alive."""
    normalizer = logits.logsumexp(-1)
    logits -= normalizer[:, None]
    logprobs = logits.gather(1, targets[:, None]).squeeze(1)
    # A logit of -inf has probability 0 and must count 0, not 0 * -inf.
    entropy = -(logits.exp() * logits.clamp_(min=torch.finfo(logits.dtype).min)).sum(-1)
    return TokenStatistics(logprobs, entropy, normalizer)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = replace(head, weight=weight.to(hidden.dtype))  # once, not for every chunk
        logprobs, entropy, normalizer = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            statistics = _chunk_statistics(head.logits(hidden[rows]), targets[rows])
            logprobs[rows], entropy[rows], normalizer[rows] = statistics
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        _remember(ctx, head)
        ctx.mark_non_differentiable(entropy, normalizer)
        return logprobs, entropy, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        head = _head_of(ctx, weight.to(hidden.dtype), bias)
        sums = _HeadGradients(ctx, hidden, weight, bias)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = head.logits(hidden[rows])
            gradient = -(logits - normalizer[rows, None]).exp_()
            gradient.scatter_add_(1, targets[rows, None], torch.ones_like(gradient[:, :1]))
            gradient *= gradients[0][rows, None]
            gradient = head.transform_gradient(gradient, logits)
            if sums.hidden is not None:
                sums.hidden[rows] = gradient.to(hidden.dtype) @ head.weight
            if sums.weight is not None:
                sums.weight.addmm_(gradient.T, hidden[rows].to(gradient.dtype))
            if sums.bias is not None:
                sums.bias += gradient.sum(0)
        return (*sums.returned(weight, bias), None, None)


class _SupportLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, support: Tensor, head: Head) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.new_empty(support.shape, dtype=wide)
        for rows in _chunks(hidden.shape[0], support.shape[1] * weight.shape[1]):
            ids = support[rows]
            raw = _widen(torch.bmm(weight[ids].to(hidden.dtype), hidden[rows].unsqueeze(-1)).squeeze(-1))
            logits[rows] = head.transform(raw if bias is None else raw + bias[ids])
        ctx.save_for_backward(hidden, weight, bias, support, logits)
        _remember(ctx, head)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, support, logits = ctx.saved_tensors
        head = _head_of(ctx, weight, bias)
        sums = _HeadGradients(ctx, hidden, weight, bias)
        for rows in _chunks(hidden.shape[0], support.shape[1] * weight.shape[1]):
            ids = support[rows]
            gradient = head.transform_gradient(gradients[0][rows], logits[rows])
            if sums.hidden is not None:
                narrow = gradient.to(hidden.dtype).unsqueeze(1)
                sums.hidden[rows] = torch.bmm(narrow, weight[ids].to(hidden.dtype)).squeeze(1)
            if sums.weight is not None:
                outer = gradient.unsqueeze(-1) * hidden[rows].to(gradient.dtype).unsqueeze(1)
                sums.weight.index_add_(0, ids.flatten(), outer.flatten(0, 1))
            if sums.bias is not None:
                sums.bias.index_add_(0, ids.flatten(), gradient.flatten())
        return (*sums.returned(weight, bias), None, None)


def token_statistics(hidden: Tensor, head: Head, targets: Tensor) -> TokenStatistics:
    """Log-probability of the targets, entropy and log-normalizer, without ever holding [N, V].

    Args:
        hidden: [N, H]; differentiable.
        head: its weight and bias are differentiable.
        targets: [N] long.

    Returns:
        See :class:`TokenStatistics`; float32, or float64 for float64 inputs.
    """
    hidden = _as_autocast(hidden)
    outputs: tuple[Tensor, Tensor, Tensor] = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head
    )
    return TokenStatistics(*outputs)


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
    """Log-probability of each target token, without ever holding [N, V].

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
    """Logits of K chosen tokens per position: K rows of the head are read per position, forward and backward.

    Args:
        hidden: [N, H]; differentiable.
        weight: [V, H]; differentiable.
        support: [N, K] long, token ids.
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
    return support_logits_of(hidden, Head(weight, bias, scale, softcap, temperature), support)


def support_logits_of(hidden: Tensor, head: Head, support: Tensor) -> Tensor:
    """:func:`support_logits` for a :class:`Head`."""
    hidden, support = _as_autocast(hidden), support.long()
    # Where the support is a good part of the vocabulary, one product with the whole head is cheaper than gathering
    # rows, and its logits are no larger than a few supports.
    if head.weight.shape[0] <= 8 * support.shape[-1]:
        return head.logits(hidden).gather(1, support)
    logits: Tensor = _SupportLogits.apply(hidden, head.weight, head.bias, support, head)  # type: ignore[no-untyped-call]
    return logits


class TopK(NamedTuple):
    """A distribution's K likeliest tokens. Each [N, K].

    Attributes:
        ids: token ids, long, likeliest first.
        logits: their logits, float32.
    """

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def topk_with_statistics(
    hidden: Tensor, head: Head, targets: Tensor, k: int, vocab_size: int | None = None
) -> tuple[TopK, TokenStatistics]:
    """One pass over the head for the top K and for the target's statistics, in chunks, without gradient.

    Args:
        hidden: [N, H].
        head: the head.
        targets: [N] long.
        k: size of the support.
        vocab_size: only the first so many tokens may enter the support (rows that pad the embedding may not).

    Returns:
        The top K and the :class:`TokenStatistics`.
    """
    limit = head.weight.shape[0] if vocab_size is None else vocab_size
    wide = torch.promote_types(hidden.dtype, torch.float32)
    ids = torch.empty(hidden.shape[0], k, dtype=torch.long, device=hidden.device)
    values = hidden.new_empty(hidden.shape[0], k, dtype=wide)
    logprobs, entropy, normalizer = (hidden.new_empty(hidden.shape[0], dtype=wide) for _ in range(3))
    for rows in _chunks(hidden.shape[0], head.weight.shape[0]):
        logits = head.logits(hidden[rows])
        values[rows], ids[rows] = logits[:, :limit].topk(k, dim=-1)
        logprobs[rows], entropy[rows], normalizer[rows] = _chunk_statistics(logits, targets[rows])
    return TopK(ids, values), TokenStatistics(logprobs, entropy, normalizer)
