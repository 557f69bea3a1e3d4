"""Which rows go through a model together, so that little of what is computed is padding."""

from collections.abc import Sequence

# What another pass through the model costs, in tokens' worth of one: what starting its kernels takes.
PASS_OVERHEAD = 1024


def length_groups(lengths: Sequence[int], overhead: int = PASS_OVERHEAD) -> list[list[int]]:
    """Group rows of similar length; each group is padded to its longest row.

    From the longest row on, a new group begins where it saves more padding in all rows that are left than another pass
    costs.

    Args:
        lengths: tokens of each row; rows of length 0 are left out.
        overhead: cost of a pass, tokens.

    Returns:
        Indices of the rows, group by group.

    Example:
        >>> length_groups([100, 7, 0, 90, 5], overhead=50)
        [[0, 3], [1, 4]]
        >>> length_groups([100, 7, 0, 90, 5], overhead=1000)
        [[0, 3, 1, 4]]
    """
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    longest = 0
    for place, row in enumerate(order):
        if not groups or (longest - lengths[row]) * (len(order) - place) > overhead:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups
