"""Rows that stand end to end in one pass, and the comparison that shows whether a model keeps them apart.

Shapes: H hidden size; R x W tokens of a pass.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

# Sequences that the comparison packs: tokens of each. Short ones suffice, since what leaks does so at the seam.
_COMPARED = (7, 5, 9)
# Mean relative error of the states in float32 and in narrower types: packed and separate rows round differently, since
# they are multiplied in other shapes. In bfloat16 it is about 0.01, at single tokens 0.2; rows that mix have 0.4.
_ROUNDING, _NARROW_ROUNDING = 1e-3, 5e-2
# Share of it that any state may change by where only what stands before it does: shapes, and so rounding, are the same.
_LEAK = 1e-2


def packed_attention(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments with which transformers keep rows that stand end to end apart.

    Positions that begin anew at 0 are what masks are made from. The other arguments are flash attention's, which would
    else find them out from the positions in every layer, with a look at the device each time.

    Args:
        lengths: tokens of each row.
        device: of the model.

    Example:
        >>> packed_attention([2, 3], torch.device("cpu"))["position_ids"]
        tensor([[0, 1, 0, 1, 2]])
    """
    ends = [0, *itertools.accumulate(lengths)]
    starts, counts = torch.tensor([ends[:-1], list(lengths)], device=device)
    positions = torch.arange(ends[-1], device=device) - starts.repeat_interleave(counts, output_size=ends[-1])
    bounds = torch.tensor(ends, dtype=torch.int32, device=device)
    return {
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def attention_may_pack(model: PreTrainedModel) -> bool:
    """Whether the attention kernel skips what belongs to other rows, instead of computing and masking it."""
    implementation = model.config.get_text_config()._attn_implementation
    return implementation is not None and (
        implementation == "flex_attention" or is_flash_attention_requested(None, implementation)
    )


@torch.no_grad()
def keeps_packed_rows_apart(model: PreTrainedModel) -> bool:
    """Compare rows that stand end to end with separate ones on a few short sequences.

    Recurrent and convolutional layers carry on from one row into the next, and other layers may know nothing of where
    a row begins. So it is tried: the states must be those of separate rows, and must not change with what stands
    before them.

    Args:
        model: on the device that it is to run on.
    """

    def forward(tokens: Tensor, attention: Mapping[str, Any]) -> Tensor:
        states: Tensor = model.base_model(input_ids=tokens, use_cache=False, **attention).last_hidden_state
        return states

    device, size = model.device, model.config.get_text_config().vocab_size
    place = torch.arange(sum(_COMPARED), device=device)
    tokens = place * max(1, size // len(place))  # from all over the vocabulary: the first ones are often hardly trained
    one, other = (tokens % size)[None], ((tokens + (place < _COMPARED[0]) * (size // 2)) % size)[None]
    attention = packed_attention(_COMPARED, device)
    separate = torch.cat([forward(part, {}) for part in one.split(_COMPARED, dim=1)], dim=1)
    try:
        packed, changed = forward(one, attention), forward(other, attention)
    except (TypeError, ValueError, NotImplementedError):  # a model that does not take such arguments
        return False
    narrow = packed.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
    tolerance = _NARROW_ROUNDING if narrow else _ROUNDING
    behind = slice(_COMPARED[0], None)
    leaked = _errors(changed[:, behind], packed[:, behind])
    return float(_errors(packed, separate).mean()) <= tolerance and float(leaked.max()) <= _LEAK * tolerance


def _errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Relative error of each position's state; what is no number is infinitely wrong."""
    size = theirs.float().norm(dim=-1)
    # The state of a padding token may be zeros.
    error: Tensor = (ours - theirs).float().norm(dim=-1) / size.clamp(min=0.1 * float(size.mean()))
    return error.nan_to_num(torch.inf)
