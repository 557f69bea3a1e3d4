"""opdlab as ``step_opdlab.py`` runs it, but sampled by transformers' own loop: what opdlab's decoding loop is worth."""

from typing import Any

import step_opdlab
from step_common import Run

from opdlab.policies import sampler


def train(run: Run) -> dict[str, Any]:
    """Train, and tell how it went."""
    sampler.uses_own_loop = lambda model: False  # as for a model that the loop cannot take
    return step_opdlab.train(run)
