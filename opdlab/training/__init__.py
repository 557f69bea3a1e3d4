"""The LightningModule that trains the student, and the parts of its training step."""

from opdlab.training.accumulation import ScoredBatch, gate_inputs, join_gate_inputs, score_batch, split_gates
from opdlab.training.checks import NonFiniteLossError
from opdlab.training.module import OPDModule

__all__ = [
    "NonFiniteLossError",
    "OPDModule",
    "ScoredBatch",
    "gate_inputs",
    "join_gate_inputs",
    "score_batch",
    "split_gates",
]
