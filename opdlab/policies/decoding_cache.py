"""The cache of the decoding loop: it has room for the next tokens, and rows can leave and enter.

Shapes: A rows of the batch.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Room for this share of the columns, and for so many columns at least: few tokens copy the cache.
ROOM_SHARE, MIN_ROOM = 0.125, 32
_NAMES = ("keys", "values")


class RoomyLayer(DynamicLayer):  # type: ignore[misc] # transformers is not typed
    """A plain layer of a cache with room for the next tokens; transformers' own copies itself for each token.

    Args:
        states: keys and values, [A, heads, columns, head size] each.
        width: columns that are in use; the others are room.
        max_width: columns of the largest cache.
    """

    def __init__(self, states: Sequence[Tensor], width: int, max_width: int) -> None:
        super().__init__()
        self.lazy_initialization(*states)
        self._states, self._max_width = list(states), max_width
        for place, each in enumerate(states):
            self.replace(place, each, width)

    def replace(self, place: int, states: Tensor, width: int) -> None:
        """Take other memory for keys (place 0) or values (1); what it had is free then."""
        self._states[place] = states
        setattr(self, _NAMES[place], states[:, :, :width])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append a token's keys and values, and return all."""
        width = self.keys.shape[2]
        end = width + key_states.shape[2]
        for place, new in enumerate((key_states, value_states)):
            states = self._states[place]
            if end > states.shape[2]:
                columns = _with_room(end, self._max_width)
                states = states.new_empty(*states.shape[:2], columns, states.shape[3])
                states[:, :, :width] = self._states[place][:, :, :width]
            states[:, :, width:end] = new
            self.replace(place, states, end)
        return self.keys, self.values


def _with_room(width: int, max_width: int) -> int:
    """Return how many columns to allocate where ``width`` are in use."""
    return max(width, min(width + max(MIN_ROOM, int(width * ROOM_SHARE)), max_width))


def join_layers(layers: Sequence[DynamicLayer], origins: Sequence[Tensor], width: int, max_width: int) -> DynamicLayer:
    """Return a layer with the rows of all layers, padded with zeros or cut on the left to ``width`` columns."""
    first = layers[0]
    slides = isinstance(first, DynamicSlidingWindowLayer)
    if slides:
        first.cumulative_length = width
        width = min(width, first.sliding_window - 1)
    joined = []
    for place, name in enumerate(_NAMES):
        states = [getattr(layer, name) for layer in layers]
        states = [state[:, :, max(0, state.shape[2] - width) :] for state in states]
        _, heads, _, size = states[0].shape
        columns = width if slides else _with_room(width, max_width)
        joined.append(states[0].new_empty(sum(map(len, origins)), heads, columns, size))  # [A, heads, columns, size]
        first_row = 0
        for state, rows in zip(states, origins, strict=True):
            into = joined[-1][first_row : first_row + len(rows)]
            into[:, :, : width - state.shape[2]] = 0  # attention masks it, but must not read NaN
            into[:, :, width - state.shape[2] : width] = state[rows]
            first_row += len(rows)
        if isinstance(first, RoomyLayer):
            first.replace(place, joined[place], width)  # frees the earlier keys before there are new values
        else:
            setattr(first, name, joined[place])
    return first if slides or isinstance(first, RoomyLayer) else RoomyLayer(joined, width, max_width)
