"""Attention on a CPU in float32: products and a softmax, for one new token and for short rows without padding.

torch's attention kernel is made for many queries, each head by itself. With a boolean mask it takes up to twice as long
for the one query of the decoding loop as two products. For short rows, products of 32 queries of all heads that share
keys take 0.81 to 1.01 of its time, backward pass included (``benchmarks/attention.py``). In the decoding loop and in
scoring this takes the place of transformers' ``sdpa``, whose name models keep; everywhere else, and for what it does
not know, it calls that.

Shapes: A rows, H heads of queries, G of keys, R = H / G heads that share keys, W columns, Q queries, D head size, E
size of a value.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as _theirs
from transformers.masking_utils import causal_mask_function
from transformers.masking_utils import sdpa_mask as _their_mask

# True in the passes of this thread that take this attention.
OWN: ContextVar[bool] = ContextVar("OWN", default=False)
# Queries that are computed together: fewer make small products, more compute much that causality forbids.
BLOCK = 32
# Tokens of the longest row per entry of a head. The probabilities are kept for the backward pass: at this length they
# have about a quarter of the memory of a layer's other activations, and the share grows with the length.
LONGEST = 12


@contextmanager
def own_attention() -> Iterator[None]:
    """Take this attention inside the block where it applies."""
    before = OWN.set(True)
    try:
        yield
    finally:
        OWN.reset(before)


def cpu_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the attention, [A, Q, H, E]; what ``sdpa`` stands for in transformers.

    Args:
        module: the layer.
        query: [A, H, Q, D].
        key: [A, G, W, D].
        value: [A, G, W, E].
        attention_mask: [A, 1, Q, W]: bool, False for columns that do not count, or float, added to the logits; None
            for causal attention, or if there is one query, for all columns.
        **options: of transformers' attention, which is called instead outside of :func:`own_attention`, in another
            dtype, whose products would round what the kernel sums in float32, for several queries with a mask or with
            earlier columns, for long rows or if no heads share keys, for a mask of each head, and with what only it
            knows.
    """
    if torch.compiler.is_compiling() or not OWN.get():
        return _theirs(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    queries, width, size = query.shape[2], key.shape[2], query.shape[3]
    unknown = any(options.get(name) is not None for name in ("position_bias", "cache"))
    unknown |= any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
    unknown |= query.dtype != torch.float32 or key.dtype != torch.float32 or not query.is_cpu
    if not unknown and not torch.is_autocast_enabled("cpu"):
        scaling: float | None = options.get("scaling")
        scaling = size**-0.5 if scaling is None else scaling
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if queries == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _one_query(query * scaling, key, value, attention_mask), None
        shares = query.shape[1] > key.shape[1]  # otherwise the products are small, and gain nothing
        if 1 < queries == width <= LONGEST * size and shares and causal and attention_mask is None:
            found: Tensor = _CausalAttention.apply(query * scaling, key, value)  # type: ignore[no-untyped-call]
            return found, None
    return _theirs(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of one query per row and head, [A, 1, H, E]; the query is scaled."""
    rows, heads, _, size = query.shape
    # The heads that share keys stand together: [A, G, R, D] @ [A, G, D, W] -> [A, G, R, W]
    logits = query.reshape(rows, key.shape[1], -1, size) @ key.transpose(2, 3)
    if mask is not None and mask.dtype == torch.bool:
        logits.masked_fill_(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits += mask
    mixed = logits.softmax(-1) @ value  # [A, G, R, E]
    return mixed.reshape(rows, 1, heads, mixed.shape[3])


class _CausalAttention(torch.autograd.Function):
    """Causal attention of whole rows, a block of n queries at a time: the columns after a block are never computed.

    With the gradient ``dO`` of a block's output ``O = P V``: ``dV = P^T dO``; of the logits,
    ``dS = P * (dP - sum(dP * P))`` with ``dP = dO V^T``; ``dQ = dS K`` and ``dK = dS^T Q``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, width, size = query.shape
        q = query.reshape(rows * key.shape[1], -1, width, size)  # [A * G, R, W, D]
        k, v = key.flatten(0, 1), value.flatten(0, 1)  # [A * G, W, D] and [A * G, W, E]
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
        mixed = query.new_empty(rows, width, key.shape[1], q.shape[1], v.shape[2])  # [A, W, G, R, E]
        kept = []
        for begin in range(0, width, BLOCK):
            end = min(begin + BLOCK, width)
            some, count = q[:, :, begin:end].flatten(1, 2), end - begin  # [A * G, R * n, D]
            logits = torch.bmm(some, k[:, :end].transpose(1, 2)).view(-1, count, end)  # [A * H, n, end]
            logits[:, :, begin:].masked_fill_(future[:count, :count], -torch.inf)
            probabilities = logits.softmax(-1).view(len(k), -1, end)  # [A * G, R * n, end]
            part = torch.bmm(probabilities, v[:, :end]).view(rows, -1, q.shape[1], count, v.shape[2])
            mixed[:, begin:end] = part.permute(0, 3, 1, 2, 4)
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(q, k, v, *kept)
        return mixed.view(rows, width, heads, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        rows, width, heads = gradient.shape[:3]
        shared = q.shape[1]
        upstream = gradient.view(rows, width, heads // shared, shared, -1)  # [A, W, G, R, E]
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for begin, probabilities in zip(range(0, width, BLOCK), kept, strict=True):
            end = min(begin + BLOCK, width)
            some = upstream[:, begin:end].permute(0, 2, 3, 1, 4).reshape(len(k), -1, v.shape[2])  # [A * G, R * n, E]
            of_v[:, :end].baddbmm_(probabilities.transpose(1, 2), some)
            of_logits = torch.bmm(some, v[:, :end].transpose(1, 2)).mul_(probabilities)
            of_logits.addcmul_(probabilities, of_logits.sum(-1, keepdim=True), value=-1)
            of_q[:, :, begin:end] = torch.bmm(of_logits, k[:, :end]).view(len(k), shared, end - begin, -1)
            of_k[:, :end].baddbmm_(of_logits.transpose(1, 2), q[:, :, begin:end].flatten(1, 2))
        of_keys, of_values = (each.view(rows, -1, width, each.shape[2]) for each in (of_k, of_v))
        return of_q.view(rows, heads, width, -1), of_keys, of_values


def kept_probabilities(width: int, size: int) -> int:
    """Return how many probabilities a head keeps of a row of causal attention for the backward pass; 0 if it is long.

    Args:
        width: tokens of the row.
        size: head size.

    Example:
        >>> kept_probabilities(40, size=24), kept_probabilities(289, size=24)
        (1344, 0)
    """
    ends = [min(begin + BLOCK, width) for begin in range(0, width, BLOCK)] if width <= LONGEST * size else []
    return sum((end - begin) * end for begin, end in zip([0, *ends], ends, strict=False))


def cpu_mask(**options: Any) -> Tensor | None:
    """Return the mask for :func:`cpu_attention`; of one query per row, [A, 1, 1, W] float.

    Args:
        **options: of transformers' masks; outside of :func:`own_attention`, on another device, in another dtype, for
            other than causal attention, more queries or no padding, its own is called. The query is the last column:
            the loop's caches have no room for later ones.
    """
    padding: Tensor | None = options.get("attention_mask")  # [A, W], False for columns that a row does not use
    own = not torch.compiler.is_compiling() and OWN.get() and options["dtype"] == torch.float32
    own &= options["q_length"] == 1 and options["mask_function"] is causal_mask_function
    if not own or padding is None or not padding.is_cpu or torch.is_autocast_enabled("cpu"):
        mask: Tensor | None = _their_mask(**options)
        return mask
    start = options.get("kv_offset", 0)
    unused = ~padding[:, start : start + options["kv_length"]].bool()
    dtype = options["dtype"]
    return torch.zeros(unused.shape, dtype=dtype).masked_fill_(unused, torch.finfo(dtype).min)[:, None, None]


AttentionInterface.register("sdpa", cpu_attention)
AttentionMaskInterface.register("sdpa", cpu_mask)
