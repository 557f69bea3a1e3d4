"""Which rows go through a model together, so that little of what is computed is padding, and no more at once than fits.

Rows go by their lengths in tokens; a row longer than the bound has a pass of its own.
"""

from collections.abc import Sequence

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
    order = _longest_first(lengths)
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
    for row in _longest_first(lengths):
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
    for number in _longest_first(costs):
        if not kept or sum(costs[other] for other in kept) + costs[number] <= max_tokens:
            kept.append(number)
    again = [number for number in range(len(costs)) if number not in kept]
    return again + kept, len(again)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
