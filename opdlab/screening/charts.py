"""Line charts of a page, as points in the units of an SVG picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from opdlab.screening.answers import Compared
from opdlab.screening.gap import Gap
from opdlab.screening.measure import Measurements
from opdlab.screening.pair import Missing

WIDTH, HEIGHT = 320.0, 130.0


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: of the line.
        values: a number at each tick.
        points: ``x,y`` of each, for SVG.
        dots: the same as pairs.
    """

    name: str
    values: Sequence[float]
    points: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        title: with the unit.
        ticks: below the chart.
        top: value at the upper edge; the lower one is 0.
        lines: one or several.
    """

    title: str
    ticks: Sequence[str]
    top: float
    lines: Sequence[Line]


def charts(found: Measurements) -> list[Chart]:
    """Return the charts of what was measured: probability by K, positions, and prefixes."""
    drawn = [] if isinstance(found.gap, Missing) else _of_gap(found.gap)
    if not isinstance(found.prefixes, Missing):
        rows: dict[str, Compared] = dict(found.prefixes)
        lines = {
            "student": [each.student for each in rows.values()],
            "teacher": [each.teacher for each in rows.values()],
        }
        drawn.append(_chart("pass@1 from a part of the student's answer", list(rows), lines, 1.0))
    return drawn


def _of_gap(gap: Gap) -> list[Chart]:
    sizes = list(gap.student_mass)
    masses = {"student": list(gap.student_mass.values()), "shared top K": list(gap.overlap.values())}
    if gap.teacher_mass:
        masses["teacher"] = list(gap.teacher_mass.values())
    ticks = [f"{each.start}" for each in gap.bins]
    entropies = {"student": [each.student_entropy for each in gap.bins]}
    of_teacher = [each.teacher_entropy for each in gap.bins if each.teacher_entropy is not None]
    if len(of_teacher) == len(gap.bins):
        entropies["teacher"] = of_teacher
    drawn = [
        _chart("probability of the teacher's K most likely tokens", [f"{k}" for k in sizes], masses, 1.0),
        _chart("reverse KL by position, nats", ticks, {"reverse KL": [each.reverse_kl for each in gap.bins]}),
        _chart("entropy by position, nats", ticks, entropies),
    ]
    sure = [each.confidence for each in gap.bins if each.confidence is not None]
    if len(sure) == len(gap.bins):
        drawn.append(_chart("the teacher's confidence by position", ticks, {"teacher": sure}, 1.0))
    return drawn


def _chart(title: str, ticks: Sequence[str], lines: dict[str, list[float]], top: float | None = None) -> Chart:
    largest = top or max((value for values in lines.values() for value in values), default=0.0) or 1.0
    step = WIDTH / max(len(ticks) - 1, 1)
    drawn = []
    for name, values in lines.items():
        dots = [
            (round(number * step, 1), round(HEIGHT * (1 - min(max(value / largest, 0.0), 1.0)), 1))
            for number, value in enumerate(values)
        ]
        drawn.append(Line(name, values, " ".join(f"{x},{y}" for x, y in dots), dots))
    return Chart(title, ticks, largest, drawn)
