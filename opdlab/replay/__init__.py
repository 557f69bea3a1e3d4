"""Replay of recorded optimizer steps: the effect of any gate on a step, without training again."""

from opdlab.replay.comparison import ReplayedStep
from opdlab.replay.gate_summary import GateSummary, summarise
from opdlab.replay.record import RecordedStep, read_record, record_folders
from opdlab.replay.steps import ReplayConfig, Replayer
from opdlab.replay.variants import Grid, Variant, expand

__all__ = [
    "GateSummary",
    "Grid",
    "RecordedStep",
    "ReplayConfig",
    "ReplayedStep",
    "Replayer",
    "Variant",
    "expand",
    "read_record",
    "record_folders",
    "summarise",
]
