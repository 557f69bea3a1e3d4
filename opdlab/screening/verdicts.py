"""A check: a number, a verdict, what was found and what to do."""

from dataclasses import dataclass

from opdlab.screening.pair import Missing
from opdlab.screening.thresholds import LIMITS, ORDER, Verdict


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Args:
        name: key of its limits, with ``:`` and the name of a set of problems if there are several such checks.
        title: what was checked.
        verdict: ``bad``, ``look``, ``good`` or ``not measured``.
        number: what the verdict is about, or None.
        unit: of the number.
        finding: a sentence without a full stop.
        mend: what to do; empty if nothing needs to be done.
    """

    name: str
    title: str
    verdict: Verdict
    number: float | None
    unit: str
    finding: str
    mend: str = ""


def checked(
    name: str, number: float, finding: str, mend: str, *, verdict: Verdict | None = None, unit: str | None = None
) -> Check:
    """Return a check whose verdict follows from the limits of its name.

    Args:
        name: see :class:`Check`.
        number: compared with the limits.
        finding: see there.
        mend: left out if the verdict is good.
        verdict: instead of that of the limits.
        unit: instead of that of the limits, for a number that the verdict is not taken from.
    """
    limits = LIMITS[name.partition(":")[0]]
    found = limits.verdict(number) if verdict is None else verdict
    return Check(name, _title(name), found, number, unit or limits.unit, finding, "" if found == "good" else mend)


def unmeasured(name: str, missing: Missing) -> Check:
    """Return the check of something that was not measured."""
    return Check(name, _title(name), "not measured", None, "", f"not measured: {missing.reason}")


def worse(*verdicts: Verdict) -> Verdict:
    """Return the worst of some verdicts.

    Example:
        >>> worse("good", "bad", "look")
        'bad'
    """
    return min(verdicts, key=ORDER.index)


def _title(name: str) -> str:
    key, _, of = name.partition(":")
    return LIMITS[key].title + (f": {of}" if of else "")
