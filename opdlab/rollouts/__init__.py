"""Rollouts, and the loader that reuses them."""

from opdlab.rollouts.batch import Minibatch, Rollouts, StopReason, Targets
from opdlab.rollouts.loader import Pool, RolloutLoader

__all__ = ["Minibatch", "Pool", "RolloutLoader", "Rollouts", "StopReason", "Targets"]
