"""Metrics."""

from opdlab.metrics.pass_at_k import PassAtK

__all__ = ["PassAtK"]
