"""The summary in the head of a page: a few metrics, which the index reads."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opdlab.diagnostics.metric_table import metric_title
from opdlab.viewer.rollouts import ShownRollout

# JSON between single quotes, with <, >, & and ' written as \u003c and so on; it precedes all text of models.
_SUMMARY = re.compile(rb"<meta name=\"opdlab-summary\" content='([^']*)'>")
_HEAD = 1 << 14  # bytes of a page; the summary is within the first few hundred


@dataclass(frozen=True)
class PageSummary:
    """A page's row in the index.

    Args:
        metrics: displayed metrics of the page's rollouts, by label.
        facts: of the run.
    """

    metrics: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, dict[str, str]]:
        """Return the content of the page's head."""
        return asdict(self)


def summarize(rollouts: Sequence[ShownRollout], facts: dict[str, str]) -> PageSummary:
    """Return counts and ranges over the rollouts of a page.

    Args:
        rollouts: of the page.
        facts: of the run.
    """
    if not rollouts:
        return PageSummary(facts=facts)
    verdicts = [rollout.correct for rollout in rollouts if rollout.correct is not None]
    drifts = [rollout.mean_drift for rollout in rollouts]
    ages = [rollout.age for rollout in rollouts]
    metrics = {
        "rollouts shown": f"{len(rollouts)} of {rollouts[0].num_ranked}",
        "correct": f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "unchecked",
        metric_title("train/drift/token_mean"): _range(f"{min(drifts):.3g}", f"{max(drifts):.3g}"),
        metric_title("rollout/age"): _range(str(min(ages)), str(max(ages))),
    }
    return PageSummary(metrics, facts)


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def read_summary(path: Path) -> PageSummary:
    """Return the summary in the head of a page; an empty one if there is none, as in pages of earlier versions.

    Args:
        path: of the page.
    """
    try:
        with path.open("rb") as page:
            found = _SUMMARY.search(page.read(_HEAD))
        read = json.loads(found[1]) if found else {}
    except (OSError, ValueError):
        return PageSummary()
    # Pages of earlier versions have their metrics under "figures".
    return PageSummary(_strings(read, "metrics") or _strings(read, "figures"), _strings(read, "facts"))


def _strings(read: object, name: str) -> dict[str, str]:
    """Return the texts of a page under a name; empty if opdlab did not write the page."""
    part = read.get(name) if isinstance(read, dict) else None
    return {key: str(value) for key, value in part.items()} if isinstance(part, dict) else {}


def step_count(steps: int) -> str:
    """Return a number of optimizer steps in words.

    Example:
        >>> step_count(1), step_count(0)
        ('1 step', '0 steps')
    """
    return f"{steps} step{'s' * (steps != 1)}"
