"""``step_opdlab.py`` with sampling by transformers' own loop, to measure the gain of opdlab's decoding loop."""

from typing import Any

import step_opdlab
from step_common import Run

from opdlab.policies import transformers_sampler


def train(run: Run) -> dict[str, Any]:
    """Train, and return the measured run."""
    transformers_sampler.uses_own_loop = lambda model: False  # as for a model that opdlab's loop does not support
    return step_opdlab.train(run)
