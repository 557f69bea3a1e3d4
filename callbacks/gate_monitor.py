"""Histograms of gates and drift for TensorBoard."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from opdlab.callbacks.step_callback import StepCallback
from opdlab.diagnostics import StepTrace
from opdlab.errors import require
from opdlab.gating import GateInputs, Gates


class GateMonitor(StepCallback):
    """Writes a histogram of the weights in each segment (block, span, …) by its place in the response.

    ``gate/block/000`` holds the weights of every rollout's first segment, ``001`` of the second, and so on;
    ``gate/weights`` all weights; ``gate/token_drift`` and ``gate/segment_drift`` the signed drift, nats. With
    accumulation they show the last micro-batch of the step.

    Args:
        every_n_steps: optimizer steps between histograms, at least 1.
        max_blocks: segments beyond so many are left out of the histograms by place.

    Raises:
        UsageError: a value is below 1.
    """

    def __init__(self, every_n_steps: int = 10, max_blocks: int = 64) -> None:
        super().__init__(every_n_steps, "gate_monitor")
        require(max_blocks >= 1, f"gate_monitor.max_blocks is {max_blocks}, but must be at least 1")
        self.max_blocks = max_blocks

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        """Write the histograms."""
        trace = traces[-1]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, values in gate_histograms(trace.gates, trace.inputs, self.max_blocks).items():
                    logger.experiment.add_histogram(name, values, trainer.global_step)


def gate_histograms(gates: Gates, inputs: GateInputs, max_blocks: int) -> dict[str, Tensor]:
    """Values to draw, by the name under which they are drawn; each [N], on the host.

    Args:
        gates: what the gate returned.
        inputs: what it saw.
        max_blocks: segments with a higher number are left out of ``gate/block/…``.
    """
    mask = inputs.mask.bool()
    # One copy to the host for everything.
    tensors = (gates.segment_ids, gates.weights, inputs.drift, gates.segment_drift)
    ids, weights, drift, segment_drift = torch.stack([tensor[mask].float() for tensor in tensors]).cpu()
    histograms = {"gate/weights": weights, "gate/token_drift": drift, "gate/segment_drift": segment_drift}
    num_segments = min(int(ids.max()) + 1, max_blocks) if ids.numel() else 0
    for segment in range(num_segments):
        histograms[f"gate/block/{segment:03d}"] = weights[ids == segment]
    return histograms
