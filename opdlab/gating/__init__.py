r"""The gate interface: weights of the positions of reused rollouts.

Drift is the student's change since the rollout was sampled, ``d = logpi - logpi_b`` per position. A
:class:`DriftGate` groups the positions of a response into segments, reduces the drift of each segment to ``s >= 0``,
and gives its positions the raw weight ``exp(-tau * s)``. A :class:`RuleGate` computes the raw weight by another rule.
Raw weights are normalised to mean 1 over the valid positions of the batch and carry no gradient.

Reference: Zheng & Jiang, "Blockwise Policy-Drift Gating for On-Policy Distillation", arXiv 2606.24084.

Shapes: B rollouts, T response tokens. Log-probabilities are in nats.
"""

from opdlab.gating.base import DriftGate, GateInputs, Gates, GateStrategy, RuleGate
from opdlab.gating.normalization import Normalization, NormalizationName
from opdlab.gating.registry import build_gate, gate_names, gate_registry, register_gate
from opdlab.gating.segments import Statistic, dense_ids, segment_statistic

__all__ = [
    "DriftGate",
    "GateInputs",
    "GateStrategy",
    "Gates",
    "Normalization",
    "NormalizationName",
    "RuleGate",
    "Statistic",
    "build_gate",
    "dense_ids",
    "gate_names",
    "gate_registry",
    "register_gate",
    "segment_statistic",
]
