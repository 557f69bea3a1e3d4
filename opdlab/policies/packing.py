"""Packing of rows end to end in one pass, and the check that a model keeps packed rows apart.

Shapes: H hidden size; R x W tokens of a pass.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

# Lengths in tokens of the sequences that the comparison packs. Short ones suffice, because leaks occur at the boundary.
_COMPARED = (7, 5, 9)
# Largest mean relative error of the states, in float32 and in narrower types. Packed and separate rows round
# differently because the matrix shapes differ. In bfloat16 the mean is about 0.01, single tokens reach 0.2, and mixed
# rows have 0.4.
_ROUNDING, _NARROW_ROUNDING = 1e-3, 5e-2
# Share of it by which a state may change when only the row before it changes: shapes and rounding are then the same.
_LEAK = 1e-2


def packed_attention(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments with which transformers keeps packed rows apart.

    transformers derives the masks from positions that restart at 0. The other arguments are for flash attention, which
    would otherwise derive them from the positions in every layer, with a device synchronization each time.

    Args:
        lengths: tokens of each row.
        device: the model's device.

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
    """True if the attention kernel skips tokens of other rows, instead of computing and masking them."""
    implementation = model.config.get_text_config()._attn_implementation
    return implementation is not None and (
        implementation == "flex_attention" or is_flash_attention_requested(None, implementation)
    )


@torch.no_grad()
def keeps_packed_rows_apart(model: PreTrainedModel) -> bool:
    """True if a few short packed sequences give the same states as separate ones.

    Recurrent and convolutional layers carry state from one row into the next, and other layers may ignore row
    boundaries. The check runs the model: packed states must equal those of separate rows, and must not change with the
    row before them.

    Args:
        model: on the device on which it will run.
    """

    def forward(tokens: Tensor, attention: Mapping[str, Any]) -> Tensor:
        states: Tensor = model.base_model(input_ids=tokens, use_cache=False, **attention).last_hidden_state
        return states

    device, size = model.device, model.config.get_text_config().vocab_size
    place = torch.arange(sum(_COMPARED), device=device)
    tokens = place * max(1, size // len(place))  # spread over the vocabulary: the first tokens are often barely trained
    one, other = (tokens % size)[None], ((tokens + (place < _COMPARED[0]) * (size // 2)) % size)[None]
    attention = packed_attention(_COMPARED, device)
    separate = torch.cat([forward(part, {}) for part in one.split(_COMPARED, dim=1)], dim=1)
    try:
        packed, changed = forward(one, attention), forward(other, attention)
    except (TypeError, ValueError, NotImplementedError):  # the model does not accept these arguments
        return False
    narrow = packed.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device.type)
    tolerance = _NARROW_ROUNDING if narrow else _ROUNDING
    behind = slice(_COMPARED[0], None)
    leaked = state_errors(changed[:, behind], packed[:, behind])
    return float(state_errors(packed, separate).mean()) <= tolerance and float(leaked.max()) <= _LEAK * tolerance


def state_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the relative error of each position's state, [..., H] -> [...]; NaN becomes infinity."""
    size = theirs.float().norm(dim=-1)
    # The bound avoids division by 0: the state of a padding token may be 0.
    error: Tensor = (ours - theirs).float().norm(dim=-1) / size.clamp(min=0.1 * float(size.mean()))
    return error.nan_to_num(torch.inf)
