"""Records of chosen optimizer steps on disk, for ``opdlab replay``."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from opdlab.callbacks.step_callback import StepCallback
from opdlab.collectives import gather_on_first
from opdlab.diagnostics import StepTrace
from opdlab.errors import require
from opdlab.files import naming_full_disk
from opdlab.module import OPDModule
from opdlab.objectives import reduce_losses
from opdlab.replay import record

_MIB = 1 << 20


class PoolRecorder(StepCallback):
    """Writes the data of chosen optimizer steps, on which ``opdlab replay`` compares gates afterwards.

    A record, ``pools/step-000016`` in the run's folder, holds the step's rollouts with the teacher's targets, its
    denominators, loss and gradient norm, and the student's weights from before the step (only the adapter's if
    the student has one). The behavior log-probabilities are those that the step has used, also if it filled them in
    itself. With several processes the first one records the step of all.

    Args:
        enabled: record steps; on the command line ``save_pools`` sets it.
        every_n_steps: optimizer steps between records, at least 1.
        steps: numbers of the optimizer steps to record, counted from 1, instead of every n-th; null records every n-th.
        keep_last: number of kept records; older ones are deleted. Null keeps all.

    Raises:
        UsageError: a value is below 1; or, when training starts, no process of the strategy has all weights.

    Example:
        >>> recorder = PoolRecorder(steps=[1, 4, 16])
        >>> [step for step in range(1, 20) if recorder.wants(step)]
        [1, 4, 16]
    """

    keeps_targets = True

    def __init__(
        self,
        enabled: bool = True,
        every_n_steps: int = 8,
        steps: list[int] | None = None,
        keep_last: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        require(
            steps is None or (bool(steps) and min(steps) >= 1),
            f"steps is {steps}, but must be numbers of optimizer steps from 1 on, or null",
        )
        require(
            keep_last is None or keep_last >= 1,
            f"keep_last is {keep_last}, but must be at least 1, or null to keep all",
        )
        self.enabled, self.steps, self.keep_last = enabled, steps, keep_last
        self.folder = Path()
        """The run's folder, set when training starts."""
        self._weights: dict[str, Tensor] = {}
        self._gradient_norm: float | None = None
        self._announced = False

    def wants(self, step: int) -> bool:
        """True if the step is recorded; see :meth:`StepCallback.wants`."""
        return self.enabled and (step in self.steps if self.steps is not None else super().wants(step))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the run's folder; Lightning exchanges it between all processes."""
        assert isinstance(pl_module, OPDModule)
        require(
            not self.enabled or pl_module.whole_weights,
            f"save_pools is true, but under trainer.strategy {type(trainer.strategy).__name__} no process has all "
            "weights to record: take a single device or ddp, or set save_pools to false",
        )
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            self._drop_after(trainer.global_step)
        left = range(trainer.global_step + 1, trainer.max_steps + 1)
        if self.enabled and left and not any(map(self.wants, left)):
            when = f"every_n_steps is {self.every_n_steps}" if self.steps is None else f"steps is {self.steps}"
            rank_zero_warn(
                f"save_pools is true, but nothing will be recorded: pool_recorder.{when}, and the last step is "
                f"{trainer.max_steps}: choose steps before it"
            )

    def _drop_after(self, step: int) -> None:
        """Delete the records of steps that the run took before it was resumed, and now takes another time."""
        later = {number: path for number, path in record.record_folders(self.folder).items() if number > step}
        for path in later.values():
            shutil.rmtree(path, ignore_errors=True)
        if later:
            numbers = ", ".join(map(str, later))
            rank_zero_info(f"{self.folder / record.FOLDER}: records after step {step} are deleted ({numbers})")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the weights from before the step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert isinstance(pl_module, OPDModule)
        if batch.position == 0:
            self._weights, self._gradient_norm = {}, None
            if trainer.is_global_zero and self.wants(trainer.global_step + 1):
                weights = record.trained_weights(pl_module.student)
                self._weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the gradient norm before Lightning clips the gradient."""
        if self._weights:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
            norm = float(torch.linalg.vector_norm(norms))
            self._gradient_norm = norm if norm < float("inf") else None  # JSON has no NaN

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, traces: Sequence[StepTrace]) -> None:
        """Write the record."""
        assert isinstance(pl_module, OPDModule)
        parts: list[tuple[float, record.RecordedBatch]] = []
        for trace in traces:
            assert trace.inputs.position_losses is not None
            assert trace.targets is not None
            # The same function of the same tensors as in the step, so the same bits.
            loss = float(reduce_losses(trace.inputs.position_losses, trace.gates.weights, trace.loss_shares))
            tensors = trace.rollouts.to("cpu"), trace.targets.to("cpu"), trace.loss_shares.cpu()
            parts.append((loss, record.RecordedBatch(*tensors)))
        if trainer.world_size > 1:
            # In the order of one process: the first micro-batch of each, then the second.
            parts = [part for of_all in zip(*gather_on_first(parts), strict=True) for part in of_all]
        if not self._weights:  # only the first process writes
            return
        losses, batches = [loss for loss, _ in parts], [batch for _, batch in parts]
        tau = traces[0].gates.tau
        facts = record.StepFacts(
            step=traces[0].step,
            reuse_epoch=traces[0].reuse_epoch,
            losses=losses,
            gradient_norm=self._gradient_norm,
            gate=repr(pl_module.gate),
            tau=None if tau is None else float(tau),
            num_processes=trainer.world_size,
            num_threads=torch.get_num_threads(),
            device=pl_module.device.type,
            precision=str(trainer.precision),
            torch_version=str(torch.__version__),
        )
        folder = record.record_folder(self.folder, facts.step + 1)
        try:
            with naming_full_disk(folder):
                sizes = record.write_record(folder, facts, batches, self._weights)
        except OSError as error:
            rank_zero_warn(
                f"{folder} cannot be written ({error.strerror or error}): the step is not recorded; training goes on"
            )
            return
        finally:
            self._weights = {}
        if not self._announced:
            self._announced = True
            self._announce(trainer, sizes)
        if self.keep_last is not None:
            for old in list(record.record_folders(self.folder).values())[: -self.keep_last]:
                shutil.rmtree(old, ignore_errors=True)

    def _announce(self, trainer: pl.Trainer, sizes: dict[str, int]) -> None:
        """Print where records are written, and their size."""
        size = sum(sizes.values())
        num_kept = self.keep_last
        if trainer.max_steps >= 0:
            num_written = sum(map(self.wants, range(trainer.global_step, trainer.max_steps + 1)))
            num_kept = min(num_written, self.keep_last or num_written)
        kept = "all are kept"
        if num_kept is not None:
            kept = f"{num_kept} records kept by the end, {num_kept * size / _MIB:.0f} MiB"
        rank_zero_info(
            f"recording in {self.folder / record.FOLDER}: {size / _MIB:.1f} MiB a step, of which weights "
            f"{sizes['weights'] / _MIB:.1f}; {kept}"
        )
        free = shutil.disk_usage(self.folder).free
        if num_kept is not None and (num_kept - 1) * size > free:
            rank_zero_warn(
                f"records will take {num_kept * size / _MIB:.0f} MiB, but {self.folder} has {free / _MIB:.0f} MiB "
                "free: raise pool_recorder.every_n_steps or set pool_recorder.keep_last"
            )
