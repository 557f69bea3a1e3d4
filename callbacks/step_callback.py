"""Base class of callbacks for whole optimizer steps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from opdlab.diagnostics import StepTrace
from opdlab.errors import require


class StepCallback(pl.Callback):
    """Collects the traces of an optimizer step's micro-batches and passes them on when the step is taken.

    Override :meth:`on_step`. It is called after optimizer step n, 2n, …. A callback that needs every step also
    overrides :meth:`on_trace`. A run that resumes inside an accumulation window repeats it, so the state of a callback
    must hold whole steps only.

    Attributes:
        keeps_targets: True if :meth:`on_step` reads :attr:`StepTrace.targets`. They are large: those of all
            micro-batches would stay on the device until the step ends.

    Args:
        every_n_steps: n, at least 1.

    Raises:
        UsageError: n is below 1.
    """

    keeps_targets = False

    def __init__(self, every_n_steps: int) -> None:
        require(every_n_steps >= 1, f"every_n_steps is {every_n_steps}, but must be at least 1")
        self.every_n_steps = every_n_steps
        self._traces: list[StepTrace] = []

    def wants(self, step: int) -> bool:
        """True if the callback uses the optimizer step of this number, counted from 1."""
        return step % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Drop the traces of the last step."""
        if batch.position == 0:
            self._traces = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the trace; pass on all of them at the step's last micro-batch."""
        trace: StepTrace = outputs["trace"]
        is_last = batch.position + 1 == len(batch.micro_batches)
        self.on_trace(trainer, trace, is_last)
        if self.wants(trace.step + 1):  # number of steps before the optimizer moved on, if it did
            self._traces.append(trace if self.keeps_targets else replace(trace, targets=None))
            if is_last:
                traces, self._traces = self._traces, []
                self.on_step(trainer, pl_module, traces)

    def on_trace(self, trainer: pl.Trainer, trace: StepTrace, is_last: bool) -> None:
        """Process one micro-batch, at every step: this must be fast and must not wait for the device.

        Args:
            trainer: the trainer.
            trace: of the micro-batch.
            is_last: True for the last micro-batch of the step.
        """

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        """Process a step that has just been taken.

        Args:
            trainer: ``global_step`` counts the step.
            pl_module: the module.
            traces: of the step's micro-batches, in order.
        """
        raise NotImplementedError
