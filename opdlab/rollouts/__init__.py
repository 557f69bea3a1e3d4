"""Rollouts, the collector that samples and labels them, and the loader that reuses them."""

from opdlab.rollouts.collector import Collector
from opdlab.rollouts.demonstrations import DemonstrationConfig
from opdlab.rollouts.loader import RolloutLoader
from opdlab.rollouts.pool import Pool
from opdlab.rollouts.reuse import ReuseConfig
from opdlab.types import Minibatch, Rollouts, StopReason, Targets

__all__ = [
    "Collector",
    "DemonstrationConfig",
    "Minibatch",
    "Pool",
    "ReuseConfig",
    "RolloutLoader",
    "Rollouts",
    "StopReason",
    "Targets",
]
