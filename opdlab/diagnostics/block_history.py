"""Weight and drift of each segment over a whole run, for heat maps, in bounded memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class BlockHistory:
    """Mean weight and mean drift of each segment, at up to ``max_steps`` steps evenly spread over the run.

    When it is full, every second step is dropped, and from then on only every second added step is kept, and so on. So
    each column is one step and not an average of fresh and stale steps.

    Args:
        max_blocks: segments.
        max_steps: even, at least 2.
    """

    max_blocks: int
    max_steps: int = 256
    steps: list[int] = field(default_factory=list)
    _columns: list[Tensor] = field(default_factory=list)
    _offered: int = 0
    _stride: int = 1

    def add(self, step: int, weights: Tensor, drift: Tensor) -> None:
        """Add a step's [max_blocks] means on the host; NaN if no rollout has the segment."""
        if self._offered % self._stride == 0:
            self.steps.append(step)
            self._columns.append(torch.stack([weights, drift]).float())
        self._offered += 1
        if len(self.steps) > self.max_steps:
            self.steps, self._columns = self.steps[::2], self._columns[::2]
            self._stride *= 2

    @property
    def values(self) -> Tensor:
        """Return weights, and drift in nats; [2, max_blocks, steps]."""
        if not self._columns:
            return torch.empty(2, self.max_blocks, 0)
        return torch.stack(self._columns, dim=-1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and plain values."""
        return {"steps": self.steps, "values": self.values, "offered": self._offered, "stride": self._stride}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, also one with another number of segments."""
        self.steps, self._offered, self._stride = list(state["steps"]), state["offered"], state["stride"]
        values: Tensor = state["values"].cpu()
        missing = self.max_blocks - values.shape[1]  # a negative number cuts
        self._columns = list(nn.functional.pad(values, (0, 0, 0, missing), value=torch.nan).unbind(-1))
