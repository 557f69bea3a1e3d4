"""How rollouts go through a model: as padded groups of rows, or packed end to end, and with how many activations kept.

Little of what is computed should be padding, and no more at once than fits. Rows go by their lengths in tokens; a row
longer than the bound has a pass of its own.

Shapes: B rollouts, N valid response positions, H hidden size; R x W tokens of a pass.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opdlab.policies.packing import packed_attention
from opdlab.types import Rollouts


@dataclass(frozen=True)
class Pass:
    """The tokens that go through the model at once.

    Args:
        tokens: [R, W] long, the rows' tokens from column 0 on, padding after them; packed rows stand in one row.
        wanted: [n] long, indices into [R * W] of the states that score a response token.
        attention: arguments of the model's forward that keep packed rows apart.
    """

    tokens: Tensor
    wanted: Tensor
    attention: Mapping[str, Any] = field(default_factory=dict)

    def states(self, model: Callable[..., Any]) -> Tensor:
        """Return the wanted hidden states, [n, H], of the model below the head."""
        hidden: Tensor = model(input_ids=self.tokens, use_cache=False, **self.attention).last_hidden_state
        return hidden.flatten(0, 1)[self.wanted]


class PackedRows:
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
        # Column of the state that scores a row's first token.
        self._first = rollouts.prompt_tokens.shape[1] - self._padding - 1
        last = (valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)).amax(1)
        lengths = torch.where(last > 0, self._first + last, 0)
        # One look at the device for the whole batch.
        self.lengths, self._counts = torch.stack([lengths, valid.sum(1)]).tolist()
        self._tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], dim=1)
        self._row, self._position = valid.nonzero(as_tuple=True)  # of each valid position

    def states(
        self, model: Callable[..., Any], groups: Sequence[Sequence[int]], packed: bool, max_tokens: int | None
    ) -> Tensor:
        """Run the model over all rows.

        Args:
            model: the model below the head.
            groups: indices of the rows of each pass; rows of length 0 may be left out.
            packed: whether a group's rows stand end to end, instead of one below the other.
            max_tokens: whose activations may exist at a time where gradients are wanted, see
                :func:`recomputed_first`; the others are computed again in the backward pass.

        Returns:
            Hidden states of the valid positions, [N, H], in row-major order.
        """
        num_again = 0
        if max_tokens is not None and torch.is_grad_enabled():
            lengths = [[self.lengths[row] for row in group] for group in groups]
            costs = [sum(each) if packed else len(each) * max(1, *each) for each in lengths]
            order, num_again = recomputed_first(costs, max_tokens)
            groups = [groups[number] for number in order]
        passes, order_of_states = self._passes(groups, packed)
        states = [
            # Dropout is off, so no state of a random generator has to be kept.
            checkpoint(one.states, model, use_reentrant=False, preserve_rng_state=False)
            if number < num_again
            else one.states(model)
            for number, one in enumerate(passes)
        ]
        return states[0] if len(states) == 1 else torch.cat(states)[order_of_states.argsort()]

    def _passes(self, groups: Sequence[Sequence[int]], packed: bool) -> tuple[list[Pass], Tensor]:
        """Return the passes, and for each state that they yield its index among all valid positions, [N]."""
        number = [0] * len(self.lengths)  # of a row's pass, and where in the pass the row begins
        start = [0] * len(self.lengths)
        for count, group in enumerate(groups):
            widest = max(1, *(self.lengths[row] for row in group))
            taken = [self.lengths[row] if packed else widest for row in group]
            for row, begin in zip(group, itertools.accumulate(taken, initial=0), strict=False):
                number[row], start[row] = count, begin
        of_row = torch.tensor([number, start], device=self._tokens.device)
        order = of_row[0, self._row].argsort(stable=True)
        wanted = (of_row[1] + self._first)[self._row] + self._position
        sizes = [sum(self._counts[row] for row in group) for group in groups]
        passes = []
        for group, part in zip(groups, torch.split(wanted[order], sizes), strict=True):
            if packed:
                passes.append(self._packed(group, part))
                continue
            rows = torch.tensor(group, device=part.device)
            width = max(1, *(self.lengths[row] for row in group))
            columns = torch.arange(width, device=part.device) + self._padding[rows, None]
            passes.append(Pass(self._tokens[rows].gather(1, columns.clamp(max=self._tokens.shape[1] - 1)), part))
        return passes, order

    def _packed(self, group: Sequence[int], wanted: Tensor) -> Pass:
        lengths = [self.lengths[row] for row in group]
        rows, counts = torch.tensor([group, lengths], device=wanted.device)
        row = rows.repeat_interleave(counts, output_size=sum(lengths))
        attention = packed_attention(lengths, wanted.device)
        columns = attention["position_ids"][0] + self._padding[row]
        return Pass(self._tokens[row, columns][None], wanted, attention)


# -- which rows share a pass -----------------------------------------------------------------------------------------

# What another pass through the model costs, in tokens' worth of one: what starting its kernels takes.
PASS_OVERHEAD = 1024


def length_groups(
    lengths: Sequence[int], overhead: int = PASS_OVERHEAD, max_tokens: int | None = None
) -> list[list[int]]:
    """Group rows of similar length; each group is padded to its longest row.

    From the longest row on, a new group begins where the group is full, or where a shorter one saves more padding in
    the rows that would still have joined than another pass costs.

    Args:
        lengths: tokens of each row; rows of length 0 are left out.
        overhead: cost of a pass, tokens.
        max_tokens: of a group, padding included; None for no bound.

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
    longest = room = 0  # tokens of the group's longest row; rows that it can still take
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
    """Divide rows among packs, in which they stand end to end without padding: first fit, longest first.

    First fit decreasing needs at most 11/9 of the fewest packs possible, and 6/9 of a pack (Dosa 2007).

    Args:
        lengths: tokens of each row; rows of length 0 are left out.
        max_tokens: of a pack; None for one pack.

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


def recomputed_first(costs: Sequence[int], max_tokens: int | None) -> tuple[list[int], int]:
    """Order passes such that no more than ``max_tokens`` tokens' activations exist at any time.

    The backward pass begins with the pass that came last. So the last passes may keep their activations, as many as
    fit together, since they are gone when those before are computed again one by one. As computing again takes time in
    proportion to the tokens, the largest passes are the ones that are kept.

    Args:
        costs: tokens of each pass, padding included.
        max_tokens: whose activations may exist at a time; one pass may be larger. None for no bound.

    Returns:
        The passes in order, and how many of the first are to be computed again.

    Example:
        >>> recomputed_first([60, 100, 40], max_tokens=100)
        ([0, 2, 1], 2)
        >>> recomputed_first([60, 90, 40, 10], max_tokens=100)
        ([0, 2, 1, 3], 2)
    """
    if max_tokens is None:
        return list(range(len(costs))), 0
    kept: list[int] = []
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        if not kept or sum(costs[other] for other in kept) + costs[number] <= max_tokens:
            kept.append(number)
    again = [number for number in range(len(costs)) if number not in kept]
    return again + kept, len(again)
