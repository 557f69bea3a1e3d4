"""A screening: models and problems in, ranked checks out."""

from collections import Counter
from dataclasses import dataclass

from opdlab.policies import BaseTeacher, LocalTeacher, SelfTeacher
from opdlab.progress import Progress
from opdlab.screening.learning_checks import learning_checks
from opdlab.screening.measure import Measurements, measure
from opdlab.screening.pair import Pair, ScreenConfig
from opdlab.screening.run_checks import run_checks
from opdlab.screening.scoring_checks import scoring_checks
from opdlab.screening.thresholds import ORDER
from opdlab.screening.verdicts import Check


@dataclass(frozen=True)
class Screening:
    """The result of a screening.

    Args:
        measurements: what was measured.
        checks: with verdicts, the worst ones first.
    """

    measurements: Measurements
    checks: list[Check]

    @property
    def summary(self) -> str:
        """Return the number of checks by verdict, such as ``1 bad, 2 look, 14 good``."""
        counts = Counter(check.verdict for check in self.checks)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])


def screen(pair: Pair, config: ScreenConfig, progress: Progress | None = None) -> Screening:
    """Return measurements and checks of a pair; the same numbers at every call, those of time apart.

    Args:
        pair: student, teacher and problems.
        config: options.
        progress: shows progress bars.
    """
    gives_hidden = isinstance(pair.teacher, BaseTeacher | LocalTeacher | SelfTeacher)
    found = measure(pair, config, progress)
    return Screening(found, judge(found, gives_hidden))


def judge(found: Measurements, gives_hidden: bool = True) -> list[Check]:
    """Return the checks of measurements, the worst ones first.

    Args:
        found: the measurements.
        gives_hidden: True if the teacher can be compared over the whole vocabulary.
    """
    checks = [*scoring_checks(found), *learning_checks(found), *run_checks(found, gives_hidden)]
    return sorted(checks, key=lambda check: ORDER.index(check.verdict))
