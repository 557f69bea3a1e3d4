"""Division of rollouts into passes through a model: padded groups of rows, or rows packed end to end.

The division limits padding and the activations in memory. Rows are grouped by length in tokens; a row longer than the
bound gets its own pass.

Shapes: B rollouts, N valid response positions, H hidden size; R x W tokens of a pass.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opdlab.policies.cpu_attention import OWN
from opdlab.policies.packing import packed_attention
from opdlab.types import Rollouts

# Above this share of positions, picking them costs more than it saves.
WORTHWHILE = 0.9
# Indices into [R * W] of the states that the pass of this thread reads; None where all are computed.
_READ: ContextVar[Tensor | None] = ContextVar("_READ", default=None)


@dataclass(frozen=True)
class Pass:
    """The tokens of one pass through the model.

    Args:
        tokens: [R, W] long, the rows' tokens from column 0 on, padded on the right; packed rows share one row, R = 1.
        wanted: [n] long, indices into [R * W] of the states that score a response token.
        attention: arguments of the model's forward that keep packed rows apart.
    """

    tokens: Tensor
    wanted: Tensor
    attention: Mapping[str, Any] = field(default_factory=dict)

    def states(self, model: Callable[..., Any], skips: bool = False, own: bool = False) -> Tensor:
        """Return the wanted hidden states, [n, H], of the model below the head.

        Args:
            model: the model below the head.
            skips: False to compute all that the model computes; True to leave out the last layer's feed-forward part at
                other positions, prompts and padding among them, see :func:`opdlab.policies.last_layer.prepare`.
            own: True to take :mod:`opdlab.policies.cpu_attention` where it applies.
        """
        share = len(self.wanted) / self.tokens.numel()
        before = _READ.set(self.wanted if skips and 0 < share <= WORTHWHILE else None)
        before_own = OWN.set(own)
        try:
            hidden: Tensor = model(input_ids=self.tokens, use_cache=False, **self.attention).last_hidden_state
        finally:
            _READ.reset(before)
            OWN.reset(before_own)
        return hidden.flatten(0, 1).index_select(0, self.wanted)


def at_read_positions(plain: Callable[..., Tensor], states: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Return a module's output where a pass reads states, and zeros elsewhere; everywhere if no pass says so.

    Args:
        plain: the module's ``forward``.
        states: [R, W, H].
        *rest: with further arguments, which may be of each position, the output is computed everywhere.
        **options: likewise.
    """
    wanted = _READ.get()
    if wanted is None or rest or options:
        return plain(states, *rest, **options)
    made = plain(states.flatten(0, 1).index_select(0, wanted)[None])[0]  # [n, H]
    return made.new_zeros(states.shape).flatten(0, 1).index_copy(0, wanted, made).view_as(states)


class PackedRows:
    """Rollouts with every row moved to column 0, so that padding follows it.

    Causal attention then needs no padding mask, so torch can use faster kernels that accept no mask.

    Args:
        rollouts: on the model's device.

    Attributes:
        lengths: [B], input tokens of each row: up to the last but one valid token; 0 if no token is valid.
        places: [N] long, indices into [B * T] of the valid positions.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        valid = rollouts.mask.bool()
        self._padding = (~rollouts.prompt_mask.bool()).sum(1)
        # Column of the state that scores a row's first token, [B].
        self._first = rollouts.prompt_tokens.shape[1] - self._padding - 1
        last = (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(1)
        lengths = torch.where(last > 0, self._first + last, 0)
        # One device synchronization for the whole batch.
        self.lengths, self._counts = torch.stack([lengths, valid.sum(1)]).tolist()
        self._tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], dim=1)
        self._row, self._position = valid.nonzero(as_tuple=True)  # of each valid position, [N]
        self.places = self._row * valid.shape[1] + self._position

    def states(
        self,
        model: Callable[..., Any],
        groups: Sequence[Sequence[int]],
        packed: bool,
        max_tokens: int | None,
        skips: bool,
        own: bool,
    ) -> Tensor:
        """Return the hidden states of all valid positions.

        Args:
            model: the model below the head.
            groups: indices of the rows of each pass; rows of length 0 may be left out.
            packed: True to pack a group's rows end to end; False to pad them.
            max_tokens: tokens whose activations may exist at a time if gradients are enabled, see
                :func:`recomputed_first`; other activations are recomputed in the backward pass.
            skips: see :meth:`Pass.states`.
            own: see there.

        Returns:
            Hidden states of the valid positions, [N, H], in row-major order.
        """
        num_again = 0
        if max_tokens is not None and torch.is_grad_enabled():
            widths = [[self.lengths[row] for row in group] for group in groups]
            costs = [sum(each) if packed else len(each) * max([1, *each]) for each in widths]
            numbers, num_again = recomputed_first(costs, max_tokens)
            groups = [groups[number] for number in numbers]
        # Number of each row's pass, and the row's start in the pass.
        pass_of_row, start = [0] * len(self.lengths), [0] * len(self.lengths)
        for count, group in enumerate(groups):
            widest = max([1, *(self.lengths[row] for row in group)])
            taken = [self.lengths[row] if packed else widest for row in group]
            for row, begin in zip(group, itertools.accumulate(taken, initial=0), strict=False):
                pass_of_row[row], start[row] = count, begin
        of_row = torch.tensor([pass_of_row, start], device=self._tokens.device)
        # The index among all valid positions of each state that the passes return, [N].
        order = of_row[0, self._row].argsort(stable=True)
        wanted = (of_row[1] + self._first)[self._row] + self._position  # [N], indices into each pass's [R * W]
        sizes = [sum(self._counts[row] for row in group) for group in groups]
        passes = []
        for group, part in zip(groups, torch.split(wanted[order], sizes), strict=True):
            lengths = [self.lengths[row] for row in group]
            rows, counts = torch.tensor([group, lengths], device=part.device)
            if packed:
                row = rows.repeat_interleave(counts, output_size=sum(lengths))
                attention = packed_attention(lengths, part.device)
                columns = attention["position_ids"][0] + self._padding[row]
                passes.append(Pass(self._tokens[row, columns][None], part, attention))
            else:
                columns = torch.arange(max([1, *lengths]), device=part.device) + self._padding[rows, None]  # [R, W]
                passes.append(Pass(self._tokens[rows].gather(1, columns.clamp(max=self._tokens.shape[1] - 1)), part))
        states = [
            # Dropout is off, so the state of the random generator need not be saved.
            checkpoint(one.states, model, skips, own, use_reentrant=False, preserve_rng_state=False)
            if number < num_again
            else one.states(model, skips, own)
            for number, one in enumerate(passes)
        ]
        return states[0] if len(states) == 1 else torch.cat(states)[order.argsort()]


# -- which rows share a pass -----------------------------------------------------------------------------------------
# Cost of one more pass through the model, in tokens: the time to launch its kernels. A CPU launches them cheaply for
# what a token costs it; on a GPU small passes leave most of it idle.
PASS_OVERHEAD = {"cpu": 128, "gpu": 1024}


def length_groups(lengths: Sequence[int], overhead: int, max_tokens: int | None = None) -> list[list[int]]:
    """Return groups of rows of similar length; each group is padded to its longest row.

    Rows are taken longest first. A new group starts if the current one is full, or if narrower padding for the rows
    that could still join saves more tokens than another pass costs.

    Args:
        lengths: tokens of each row; rows of length 0 are left out.
        overhead: cost of a pass, tokens, see :data:`PASS_OVERHEAD`.
        max_tokens: tokens of a group, padding included; None for no bound.

    Returns:
        Indices of the rows, group by group.

    Example:
        >>> length_groups([100, 7, 0, 90, 5], overhead=50)
        [[0, 3], [1, 4]]
        >>> length_groups([100, 7, 0, 90, 5], overhead=1000)
        [[0, 3, 1, 4]]
        >>> length_groups([100, 7, 0, 90, 5], overhead=1000, max_tokens=250)
        [[0, 3], [1, 4]]
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    longest = room = 0  # tokens of the group's longest row; number of rows that still fit
    for place, row in enumerate(order):
        joining = min(len(order) - place, room)
        if not joining or (longest - lengths[row]) * joining > overhead:
            groups.append([])
            longest = lengths[row]
            room = len(order) if max_tokens is None else max(1, max_tokens // longest)
        groups[-1].append(row)
        room -= 1
    return groups


def length_packs(lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
    """Return packs of rows, laid end to end without padding: first fit, longest first.

    First fit decreasing needs at most 11/9 * OPT + 6/9 packs, OPT being the smallest possible number (Dosa 2007).

    Args:
        lengths: tokens of each row; rows of length 0 are left out.
        max_tokens: tokens of a pack; None for a single pack.

    Returns:
        Indices of the rows, pack by pack.

    Example:
        >>> length_packs([100, 7, 0, 90, 5], max_tokens=110)
        [[0, 1], [3, 4]]
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not lengths[row]:
            break
        fits = (pack for pack, left in enumerate(room) if max_tokens is None or lengths[row] <= left)
        pack = next(fits, len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(max_tokens or 0)
        packs[pack].append(row)
        room[pack] -= lengths[row]
    return packs


def recomputed_first(costs: Sequence[int], max_tokens: int) -> tuple[list[int], int]:
    """Return an order of passes in which the activations of at most ``max_tokens`` tokens exist at any time.

    The backward pass starts with the last pass. The last passes may therefore keep their activations, as many as fit
    together: these are freed before earlier passes are recomputed one by one. Recomputing takes time in proportion to
    the tokens, so the largest passes are kept.

    Args:
        costs: tokens of each pass, padding included.
        max_tokens: tokens whose activations may exist at a time; a single pass may be larger.

    Returns:
        The passes in order, and the number of passes at the start that are recomputed.

    Example:
        >>> recomputed_first([60, 100, 40], max_tokens=100)
        ([0, 2, 1], 2)
        >>> recomputed_first([60, 90, 40, 10], max_tokens=100)
        ([0, 2, 1, 3], 2)
    """
    kept: list[int] = []
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        if not kept or sum(costs[other] for other in kept) + costs[number] <= max_tokens:
            kept.append(number)
    again = [number for number in range(len(costs)) if number not in kept]
    return again + kept, len(again)
