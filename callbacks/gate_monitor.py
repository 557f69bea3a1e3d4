"""Metrics, histograms and plots of a gate's effect."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from opdlab.callbacks.step_callback import StepCallback
from opdlab.collectives import sum_over_processes
from opdlab.diagnostics import StepTrace
from opdlab.diagnostics.gate_metrics import gate_tensors, read_gates
from opdlab.diagnostics.positions import position_tensors, read_positions
from opdlab.diagnostics.run_history import BlockHistory, add_to_age_table, age_scalars, new_age_table, read_ages
from opdlab.diagnostics.trace import GateTrace, gather_traces, to_host
from opdlab.errors import require
from opdlab.loggers import log_layout, log_media, log_scalars, media_writer
from opdlab.module import OPDModule


class DrawingTime:
    """Says when the plots of a run may be drawn again.

    Drawing may take 0.5% of the run's time, and a plot is drawn again only when the run is longer by 5%: it covers the
    whole run, so that the next would hardly differ, and each stays in the logger's files.

    Args:
        clock: function that returns seconds.

    Example:
        >>> time = DrawingTime(clock=iter([0.0, 100.0, 300.0, 300.0, 302.0, 310.0]).__next__)
        >>> time.may_draw(), time.may_draw()
        (False, True)
        >>> with time.drawing():
        ...     pass
        >>> time.may_draw()
        False
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = self._drawn_at = clock()
        self._spent = 0.0
        self._next = 1.0  # expected seconds of the first drawing, including the import of matplotlib

    def may_draw(self) -> bool:
        """True if another drawing keeps to the share of the time."""
        now = self._clock()
        elapsed = now - self._started
        return self._spent + self._next < 0.005 * elapsed and elapsed > 1.05 * (self._drawn_at - self._started)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Count the time of the block; the next drawing is expected to take as long."""
        began = self._clock()
        yield
        self._drawn_at = self._clock()
        self._next = self._drawn_at - began
        self._spent += self._next


class GateMonitor(StepCallback):
    """Logs the effect of the gate after every n-th optimizer step. ``docs/metrics.md`` explains each name.

    - Histograms: of the weights in each segment (block, span, …) by its index in the response, ``gate/block/000``,
      ``001``, …; of all weights and drifts: ``gate/weights``, ``gate/token_drift``, ``gate/segment_drift``.
    - Scalars: the gated step's loss and gradient against the ungated ones (``gate/loss_ratio``,
      ``gate/gradient_cosine``, …), correlations of the weights (``gate/correlation/…``), and, over all steps since the
      last logged one, drift and weights by the age of the rollouts (``age/…``, ``reuse_epoch/…``).
    - Curves along the response, in 32 bins: the divergence from the teacher, entropy, teacher gap and weight
      (``position/divergence/00`` to ``31``, …), and the share of the gradient in the first tenth.
    - The overlap of the teacher's support with the student's most likely tokens, ``train/support_overlap``.
    - Plots of the whole run: ``gate/heat_map/weight``, ``gate/heat_map/drift``, ``gate/by_age``; and of the last logged
      step, ``position/curves``. They are drawn when
      training ends or is stopped, and before that as long as drawing takes less than 0.5% of the run's time, first
      after about three minutes. The clock affects only when they are drawn, not their content.
    - A page of TensorBoard ("Custom scalars") that groups related scalars.

    Metrics and histograms cover the whole optimizer batch, independent of its micro-batches and processes; the first
    process writes them. Between logged steps only sums by age are kept, on the device; at a logged step everything is
    copied to the host at once. Every logger gets the scalars, and what else it takes (:mod:`opdlab.loggers`).

    Args:
        every_n_steps: n, at least 1.
        max_blocks: segments with a larger index are left out of histograms and heat maps by index.

    Raises:
        UsageError: a value is below 1.
    """

    def __init__(self, every_n_steps: int = 10, max_blocks: int = 64) -> None:
        super().__init__(every_n_steps)
        require(max_blocks >= 1, f"max_blocks is {max_blocks}, but must be at least 1")
        self.max_blocks = max_blocks
        self._time = DrawingTime()
        self._history = BlockHistory(max_blocks)
        self._ages = new_age_table()  # of all steps up to the last logged one, on the host
        self._recent_ages = new_age_table()  # of the steps since then, on the device
        self._step_ages: Tensor | None = None  # of the current step, on the device
        self._positions: dict[str, float] = {}  # of the last logged step

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the data of an earlier run; a checkpoint's state is loaded after this."""
        if trainer.global_step == 0:
            self._history, self._ages = BlockHistory(self.max_blocks), new_age_table()
            self._recent_ages, self._positions = new_age_table(), {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and set up TensorBoard's page."""
        self._time, self._step_ages = DrawingTime(), None
        if trainer.is_global_zero:
            log_layout(trainer.loggers)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Request gradient norms for a step that will be logged.

        Every process requests them, because with a sharded head they need a collective operation.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert isinstance(pl_module, OPDModule)
        if self.wants(trainer.global_step + 1) and trainer.loggers:
            pl_module.request_gradient_norms()

    def on_trace(self, trainer: pl.Trainer, trace: StepTrace, is_last: bool) -> None:
        """Add the micro-batch to the sums by age; those that a checkpoint holds are of whole steps."""
        if trainer.loggers:
            self._recent_ages = self._recent_ages.to(trace.gates.weights.device)  # moves only once
            ages = torch.zeros_like(self._recent_ages) if self._step_ages is None else self._step_ages
            add_to_age_table(ages, trace)
            self._step_ages = None if is_last else ages
            if is_last:  # at each step, because a checkpoint has the sums of the first process only
                self._recent_ages += ages if trainer.world_size == 1 else sum_over_processes(ages)

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        """Log the step."""
        if not trainer.loggers:
            return
        whole: Sequence[StepTrace | GateTrace] = traces if trainer.world_size == 1 else gather_traces(traces)
        overlap = _overlap(traces)
        if trainer.world_size > 1:
            overlap = sum_over_processes(overlap)
        if not trainer.is_global_zero:
            self._recent_ages.zero_()
            return
        tensors = {**gate_tensors(whole, self.max_blocks), **position_tensors(whole), "ages": self._recent_ages}
        tensors["support_overlap"] = overlap
        found = to_host(tensors)
        metrics, recent, self._positions = read_gates(found), found["ages"], read_positions(found)
        self._recent_ages.zero_()
        self._ages += recent
        self._history.add(trainer.global_step, metrics.block_weights, metrics.block_drift)
        scalars = {**metrics.scalars, **self._positions, **age_scalars(recent)}
        total, count = found["support_overlap"].tolist()
        if count:
            scalars["train/support_overlap"] = total / count
        log_scalars(trainer.loggers, scalars, trainer.global_step)
        log_media(trainer.loggers, trainer.global_step, histograms=metrics.histograms)
        if self._time.may_draw():
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the plots of the whole run."""
        if trainer.is_global_zero:
            self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw the plots of a run that is stopped, since it may not be resumed."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self._draw(trainer)

    # -- plots ---------------------------------------------------------------------------------------------------

    def _draw(self, trainer: pl.Trainer) -> None:
        if not any("images" in media_writer(logger).takes for logger in trainer.loggers):
            return
        with self._time.drawing():
            # Imported here: matplotlib takes a third of a second to load.
            from opdlab.diagnostics.gate_plots import block_heat_map, by_age, position_curves, render

            figures = {}
            if self._history.steps:
                weights, drift = self._history.values
                figures["gate/heat_map/weight"] = block_heat_map(self._history.steps, weights, "weight")
                figures["gate/heat_map/drift"] = block_heat_map(self._history.steps, drift, "drift")
            ages = read_ages(self._ages + self._recent_ages.cpu())["age"]
            if ages.ages:
                figures["gate/by_age"] = by_age(ages)
            if self._positions:
                figures["position/curves"] = position_curves(self._positions)
            images = {tag: render(figure) for tag, figure in figures.items()}
            log_media(trainer.loggers, trainer.global_step, images=images)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the data of the plots, and the sums since the last logged step."""
        ages, recent = self._ages.clone(), self._recent_ages.cpu().clone()
        return {"history": self._history.state_dict(), "ages": ages, "recent_ages": recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the data of a run's plots."""
        self._history.load_state_dict(state_dict["history"])
        self._ages, self._recent_ages = (state_dict[name].cpu().clone() for name in ("ages", "recent_ages"))


def _overlap(traces: Sequence[StepTrace]) -> Tensor:
    """Return the sum of the overlaps of supports and their number, [2]."""
    device = traces[0].inputs.mask.device
    values = torch.cat([torch.zeros(0, device=device), *(t.overlap for t in traces if t.overlap is not None)])
    return torch.stack([values.sum(), torch.tensor(float(len(values)), device=device)])
