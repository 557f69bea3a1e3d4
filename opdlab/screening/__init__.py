"""Screening of a pair before training: whether distilling it can work, and what will go wrong.

Data flows one way: models and prompts (``pair``), measurements (``measure``), checks with verdicts (``outcome``), and a
table, a page and a JSON file (``report``). All limits are in ``thresholds``.
"""

from opdlab.screening.outcome import Screening, judge, screen
from opdlab.screening.pair import Missing, Pair, ScreenConfig
from opdlab.screening.report import render_page, write_results
from opdlab.screening.thresholds import LIMITS, Limits
from opdlab.screening.verdicts import Check

__all__ = [
    "Check",
    "LIMITS",
    "Limits",
    "Missing",
    "Pair",
    "ScreenConfig",
    "Screening",
    "judge",
    "render_page",
    "screen",
    "write_results",
]
