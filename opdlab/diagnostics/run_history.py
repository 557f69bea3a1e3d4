"""What GateMonitor keeps over a run: drift and weights by the age of the rollouts, and by segment and step.

Age is the number of optimizer steps since the last refresh of the snapshot that sampled a rollout; the reuse
epoch is the number of passes over its buffer before this one. Drift is in nats.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.diagnostics.trace import StepTrace

MAX_AGES = 64
"""Number of rows for ages; the last row holds all older rollouts too."""
MAX_EPOCHS = 16
"""Number of rows for reuse epochs; the last row holds all later ones too."""

_ROWS = MAX_AGES + MAX_EPOCHS
_COLUMNS = 4  # positions, sum of |d|, sum of w - 1, sum of (w - 1)^2


def new_age_table(device: torch.device | str = "cpu") -> Tensor:
    """Return an empty table of sums: [ages and then reuse epochs, 4] float64."""
    return torch.zeros(_ROWS, _COLUMNS, dtype=torch.float64, device=device)


@torch.no_grad()
def add_to_age_table(table: Tensor, trace: StepTrace) -> None:
    """Add a micro-batch's valid positions by a dozen small operations, without waiting for the device.

    Args:
        table: on the trace's device; changed in place.
        trace: of the micro-batch.
    """
    valid = trace.inputs.mask.bool()
    # Sums of (w - 1)^2: weights lie around 1, so sums of w^2 would cancel in the standard deviation.
    excess = (trace.gates.weights.double() - 1).masked_fill(~valid, 0.0)
    columns = torch.stack([valid.double(), trace.inputs.drift.abs().double(), excess, excess.square()])
    rollouts = columns.sum(2).T
    table.index_add_(0, trace.age.clamp(0, MAX_AGES - 1), rollouts)
    table[MAX_AGES + min(trace.reuse_epoch, MAX_EPOCHS - 1)].add_(rollouts.sum(0))


@dataclass(frozen=True)
class AgeMetrics:
    """Means over the valid positions of each age that occurred, oldest last.

    Args:
        ages: optimizer steps, or reuse epochs.
        num_positions: number of positions in the means.
        drift: mean of ``|d|``, nats.
        weight_mean: mean of the weights.
        weight_std: standard deviation of the weights.
    """

    ages: list[int]
    num_positions: list[int]
    drift: list[float]
    weight_mean: list[float]
    weight_std: list[float]


def read_ages(table: Tensor) -> dict[str, AgeMetrics]:
    """Return the metrics of a table on the host: ``age`` and ``reuse_epoch``."""
    found = {}
    for family, sums in (("age", table[:MAX_AGES]), ("reuse_epoch", table[MAX_AGES:])):
        ages = sums[:, 0].nonzero().flatten()
        num, drift, excess, squares = sums[ages].unbind(1)
        mean = excess / num
        std = (squares / num - mean.square()).clamp(min=0).sqrt()
        columns = (ages, num.long(), drift / num, 1 + mean, std)
        found[family] = AgeMetrics(*(column.tolist() for column in columns))
    return found


def age_scalars(table: Tensor) -> dict[str, float]:
    """Return the metrics of a table on the host, by their name in the log.

    Example:
        >>> table = new_age_table()
        >>> table[3] = torch.tensor([4.0, 0.8, 0.4, 0.12])
        >>> {tag: round(value, 3) for tag, value in age_scalars(table).items()}
        {'age/drift/003': 0.2, 'age/weight_mean/003': 1.1, 'age/weight_std/003': 0.141}
    """
    scalars = {}
    for family, metrics in read_ages(table).items():
        digits = 3 if family == "age" else 1
        for name in ("drift", "weight_mean", "weight_std"):
            for age, value in zip(metrics.ages, getattr(metrics, name), strict=True):
                scalars[f"{family}/{name}/{age:0{digits}d}"] = value
    return scalars


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
