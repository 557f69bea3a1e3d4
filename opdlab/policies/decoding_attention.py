"""The attention of the decoding loop on a CPU, where a row has one new token: two products and a softmax.

torch's attention kernel is made for many queries; for one it takes up to twice as long as the products. Both parts are
registered with transformers as an attention and a mask of their own, and what they do not know they leave to
transformers.

Shapes: A rows, H heads of queries, G of keys, W columns of the cache, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "opdlab_decoding"


@contextmanager
def decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Decode a model with this attention inside the block, if it would take torch's kernel on a CPU in float32.

    Products in a narrower dtype, autocast's among them, would round what the kernel sums in float32.

    Args:
        model: a causal language model.
    """
    config = model.config.get_text_config(decoder=True)
    takes_kernel = model.config._attn_implementation == config._attn_implementation == "sdpa"
    wide = model.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # Models with an attention of their own, such as Falcon, would warn.
    if model.device.type != "cpu" or not takes_kernel or not wide or not model._can_set_attn_implementation():
        yield
        return
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation("sdpa")


def one_token_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the attention of one query per row and head, [A, 1, H, D].

    Args:
        module: the layer.
        query: [A, H, 1, D].
        key: [A, G, W, D].
        value: [A, G, W, D].
        attention_mask: [A, 1, 1, W]: bool, False for columns that do not count, or float, added to the logits; None
            if every column counts.
        **options: of transformers' attention, which is called instead for several queries, in another dtype, for a
            mask of each head, and with what only it knows.
    """
    rows, heads, queries, size = query.shape
    unknown = options.get("position_bias") is not None
    unknown |= any(options.get(name) for name in ("dropout", "softcap", "output_attentions"))
    of_heads = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or query.dtype != torch.float32 or unknown or of_heads:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    scaling = options.get("scaling")
    # The heads that share keys stand together: [A, G, H / G, D] @ [A, G, D, W] -> [A, G, H / G, W]
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    logits = (grouped * (size**-0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits.masked_fill_(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits += attention_mask
    mixed = logits.softmax(-1) @ value  # [A, G, H / G, D]
    return mixed.reshape(rows, 1, heads, mixed.shape[3]), None


def one_token_mask(**options: Any) -> Tensor | None:
    """Return the mask of one query per row for :func:`one_token_attention`, [A, 1, 1, W] float.

    Args:
        **options: of transformers' masks; for other than causal attention, more queries or no padding, its own is
            called.
    """
    padding = options.get("attention_mask")  # [A, W], False for columns that a row does not use
    if options["q_length"] != 1 or options["mask_function"] is not causal_mask_function or padding is None:
        mask: Tensor | None = sdpa_mask(**options)
        return mask
    start = options.get("kv_offset", 0)
    unused = ~padding[:, start : start + options["kv_length"]].bool()
    dtype = options["dtype"]
    return torch.zeros(unused.shape, dtype=dtype).masked_fill_(unused, torch.finfo(dtype).min)[:, None, None]


AttentionInterface.register(NAME, one_token_attention)
AttentionMaskInterface.register(NAME, one_token_mask)
