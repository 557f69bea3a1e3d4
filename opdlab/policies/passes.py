"""How rollouts go through a model: as padded groups of rows, or packed end to end, and with how many activations kept.

Shapes: B rollouts, N valid response positions, H hidden size; R x W tokens of a pass.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from opdlab.policies.lengths import recomputed_first
from opdlab.types import Rollouts

# Tokens [R, W] and further arguments of the model's forward -> hidden states [R, W, H].
Forward = Callable[[Tensor, Mapping[str, Any]], Tensor]

# Sequences that the comparison packs: tokens of each. Short ones suffice, since what leaks does so at the seam.
_COMPARED = (7, 5, 9)
# Mean relative error of the states in float32 and in narrower types: packed and separate rows round differently, since
# they are multiplied in other shapes. In bfloat16 it is about 0.01, at single tokens 0.2; rows that mix have 0.4.
_ROUNDING, _NARROW_ROUNDING = 1e-3, 5e-2
# Share of it that any state may change by where only what stands before it does: shapes, and so rounding, are the same.
_LEAK = 1e-2


def last_hidden_state(model: Callable[..., Any], tokens: Tensor, attention: Mapping[str, Any]) -> Tensor:
    """What the model below the head makes of the tokens: [R, W] -> [R, W, H]."""
    hidden: Tensor = model(input_ids=tokens, use_cache=False, **attention).last_hidden_state
    return hidden


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once.

    Args:
        tokens: [R, W] long, the rows' tokens from column 0 on, padding after them; packed rows stand in one row.
        wanted: [n] long, places in [R * W] of the states that score a response token.
        attention: arguments of the model's forward that keep packed rows apart.
    """

    tokens: Tensor
    wanted: Tensor
    attention: Mapping[str, Any] = field(default_factory=dict)

    def states(self, forward: Forward, recompute: bool = False) -> Tensor:
        """The wanted hidden states, [n, H].

        Args:
            forward: runs the model.
            recompute: keep no activations, and compute them again in the backward pass.
        """

        def run(tokens: Tensor) -> Tensor:
            return forward(tokens, self.attention).flatten(0, 1)[self.wanted]

        if not recompute:
            return run(self.tokens)
        states: Tensor = checkpoint(run, self.tokens, use_reentrant=False, preserve_rng_state=False)  # dropout is off
        return states


class FedRows:
    """Rollouts with every row moved to column 0, so that padding follows it.

    Causal attention then needs no mask for padding, which is faster, and lets torch take the kernels that accept none.

    Args:
        rollouts: on the model's device.

    Attributes:
        lengths: tokens of each row that have to be fed: up to the last but one valid token; 0 where none is valid.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        valid = rollouts.mask.bool()
        self._padding = (~rollouts.prompt_mask.bool()).sum(1)
        # Place of the state that scores a row's first token.
        self._first = rollouts.prompt_tokens.shape[1] - self._padding - 1
        last = (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(1)
        lengths = torch.where(last > 0, self._first + last, 0)
        # One look at the device for the whole batch.
        self.lengths, self._counts = torch.stack([lengths, valid.sum(1)]).tolist()
        self._tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], dim=1)
        self._row, self._position = valid.nonzero(as_tuple=True)  # of each valid position

    def states(self, forward: Forward, groups: Sequence[Sequence[int]], packed: bool, max_tokens: int | None) -> Tensor:
        """Run the model over all rows.

        Args:
            forward: runs the model.
            groups: indices of the rows of each pass; rows of length 0 may be left out.
            packed: whether a group's rows stand end to end, instead of one below the other.
            max_tokens: whose activations may exist at a time where gradients are wanted, see
                :func:`recomputed_first`; the others are computed again in the backward pass.

        Returns:
            Hidden states of the valid positions, [N, H], in row-major order.
        """
        costs = [sum(self._lengths_of(group)) if packed else len(group) * self._width(group) for group in groups]
        order, num_again = recomputed_first(costs, max_tokens if torch.is_grad_enabled() else None)
        passes, places = self._passes([groups[number] for number in order], packed)
        states = [one.states(forward, recompute=number < num_again) for number, one in enumerate(passes)]
        return states[0] if len(states) == 1 else torch.cat(states)[places.argsort()]

    def _lengths_of(self, group: Sequence[int]) -> list[int]:
        return [self.lengths[row] for row in group]

    def _width(self, group: Sequence[int]) -> int:
        return max(1, *self._lengths_of(group))

    def _passes(self, groups: Sequence[Sequence[int]], packed: bool) -> tuple[list[Pass], Tensor]:
        """The passes, and the place among all valid positions of each state that they yield, [N]."""
        number = [0] * len(self.lengths)  # of a row's pass, and where in the pass the row begins
        start = [0] * len(self.lengths)
        for count, group in enumerate(groups):
            taken = self._lengths_of(group) if packed else [self._width(group)] * len(group)
            for row, begin in zip(group, itertools.accumulate(taken, initial=0), strict=False):
                number[row], start[row] = count, begin
        device = self._tokens.device
        of_row = torch.tensor([number, start], device=device)
        places = of_row[0, self._row].argsort(stable=True)
        wanted = (of_row[1] + self._first)[self._row] + self._position
        sizes = [sum(self._counts[row] for row in group) for group in groups]
        feed = self._packed if packed else self._padded
        parts = torch.split(wanted[places], sizes)
        return [feed(group, part) for group, part in zip(groups, parts, strict=True)], places

    def _padded(self, group: Sequence[int], wanted: Tensor) -> Pass:
        rows = torch.tensor(group, device=wanted.device)
        columns = torch.arange(self._width(group), device=wanted.device) + self._padding[rows, None]
        return Pass(self._tokens[rows].gather(1, columns.clamp(max=self._tokens.shape[1] - 1)), wanted)

    def _packed(self, group: Sequence[int], wanted: Tensor) -> Pass:
        lengths = self._lengths_of(group)
        rows, counts = torch.tensor([group, lengths], device=wanted.device)
        row = rows.repeat_interleave(counts, output_size=sum(lengths))
        attention = packed_attention(lengths, wanted.device)
        columns = attention["position_ids"][0] + self._padding[row]
        return Pass(self._tokens[row, columns][None], wanted, attention)


# -- packing ---------------------------------------------------------------------------------------------------------


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
    forward = partial(last_hidden_state, model.base_model)
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
