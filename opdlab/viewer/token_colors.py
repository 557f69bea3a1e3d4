"""Quantities for the colours of tokens: names, units, and ranges of the colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.diagnostics import metric_rows

# Share of the values that the colours cover, so that a single token with a drift of 20 nats does not hide the rest.
COVERED = 0.99
_NOISE = 1e-3  # share of the scale


@dataclass(frozen=True)
class Quantity:
    """A quantity of positions.

    Args:
        name: as in :class:`opdlab.viewer.ShownRollout`.
        label: name on the page.
        unit: empty for a number without a unit.
        meaning: one line.
        neutral: the value without colour; None: 0 if there are both signs, otherwise the end nearer to 0.
    """

    name: str
    label: str
    unit: str = ""
    meaning: str = ""
    neutral: float | None = 0.0


# Values of positions whose mean is not logged. Those that are logged have a row ``train/NAME`` in the table of metrics.
_NOT_LOGGED = (
    Quantity("drift", "drift", "nats", "student's log-probability less that of the behavior snapshot that sampled"),
    Quantity("segment_drift", "segment drift", "nats", "mean drift of the position's segment, as the gate sees it"),
    Quantity("weight", "weight", "", "factor of the position's loss, from the gate", 1.0),
    Quantity("position_loss", "position loss", "nats", "the objective's loss before the gate"),
    Quantity("teacher_logprob", "teacher log-probability", "nats", "of the sampled token"),
    Quantity("student_logprob", "student log-probability", "nats", "of the sampled token, when the step was taken"),
    Quantity("behavior_logprob", "behavior log-probability", "nats", "of the sampled token, when it was sampled"),
    Quantity("gradient_norm", "gradient norm", "nats per unit", "of the position's loss at the last hidden state"),
)
_NEUTRAL = {"teacher_support_mass": 1.0, "student_support_mass": 1.0, "support_overlap": 1.0}


def quantities(names: Sequence[str]) -> list[Quantity]:
    """Return the quantities of these names: those with a label in a fixed order, then others under their own name.

    Example:
        >>> [quantity.label for quantity in quantities(["my_value", "entropy", "teacher_gap", "drift"])]
        ['drift', 'teacher gap', 'entropy', 'my value']
    """
    rows = {row.name.removeprefix("train/"): row for row in metric_rows() if row.name.startswith("train/")}
    logged = (
        Quantity(name, row.label, "" if row.unit == "share" else row.unit, row.meaning, _NEUTRAL.get(name, 0.0))
        for name, row in rows.items()
    )
    known = [quantity for quantity in (*_NOT_LOGGED, *logged) if quantity.name in names]
    others = sorted(set(names) - {quantity.name for quantity in known})
    return known + [Quantity(name, name.replace("_", " "), neutral=None) for name in others]


@dataclass(frozen=True)
class ColorScale:
    """Range of the colours: the value without colour, and the values with the strongest colours on both sides.

    Args:
        low: values up to this one have the strongest colour of the lower side; ``neutral`` if no value is lower.
        neutral: the value without colour.
        high: as ``low``, above.
        below: True if values lie below ``low``.
        above: True if values lie above ``high``.
    """

    low: float
    neutral: float
    high: float
    below: bool
    above: bool


def color_scale(values: Tensor, neutral: float | None) -> ColorScale:
    """Return a scale that covers most values, the same on both sides of the neutral one if there are values on both.

    Args:
        values: [N] float32, of the positions that count; values that are not finite are ignored.
        neutral: see :class:`Quantity`.

    Example:
        >>> scale = color_scale(torch.tensor([-0.1, *(0.001 * i for i in range(200)), 20.0]), 0.0)
        >>> round(scale.low, 3), scale.neutral, round(scale.high, 3), scale.below, scale.above
        (-0.198, 0.0, 0.198, False, True)
    """
    finite = values[values.isfinite()].double()
    if not finite.numel():
        finite = torch.zeros(1, dtype=torch.float64)
    middle = min(max(float(finite.min()), 0.0), float(finite.max())) if neutral is None else neutral
    distance = (finite - middle).abs()
    reach = float(distance.kthvalue(math.ceil(COVERED * finite.numel())).values) or float(distance.max())
    # A loss of -1e-9 or a probability of 1.0000001 is rounding, and does not count as a second side.
    slack = _NOISE * reach
    low = middle - reach if finite.min() < middle - slack else middle
    high = middle + reach if finite.max() > middle + slack else middle
    below, above = bool((values < low - slack).any()), bool((values > high + slack).any())
    return ColorScale(low, middle, high, below, above)
