"""Checkpoints when training stops, by a signal or at the end."""

import os
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info

from opdlab.checkpoints import CheckpointFiles, set_aside_later
from opdlab.errors import Stopped, UsageError, first_line
from opdlab.evaluation import EvaluationModule
from opdlab.files import remove_partial_files
from opdlab.out_of_memory import out_of_memory
from opdlab.processes import STOP, StopAt


class StopCheckpoint(Checkpoint):
    """Writes a checkpoint when training stops: after the last step, or on a signal, which finishes the step.

    A checkpoint taken in the middle of a step would hold half an update, so a signal waits for the end of the step.
    While rollouts or answers are sampled or scored, no step is under way, and the signal stops training there. Signals
    are Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2; one that was ignored stays ignored. A second one, at least a
    second later, stops at once, without a checkpoint. Several processes agree at the end of each step whether one of
    them was signalled. Where Lightning queues a SLURM job again on a signal, it does so once the checkpoint is written.

    Checkpoints are written by :class:`opdlab.checkpoints.CheckpointFiles`, unless the trainer has another plugin. The
    class is a ``Checkpoint``, so that Lightning calls it after all other callbacks; list it after other checkpoints,
    so that their files exist.

    Args:
        dirpath: folder for ``interrupted.ckpt`` and ``final.ckpt``; ``checkpoints`` in the run's folder by default.
            Neither is written if a ``ModelCheckpoint`` has just saved the step.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        """Path of the last checkpoint that was written, or found written, when training stopped."""
        self.reason: str | None = None
        """Why training ended before its last step; None otherwise, and for signals."""
        self._folder = Path()
        self._saved_step: int | None = None
        self._training = False
        self._in_step = False
        self._common_batches: list[int] = []  # batches of each benchmark that all processes have
        self._step_end: dict[str, Any] = {}  # progress of Lightning's loops when the last step ended
        self._validating = self._after_validation = self._saving = False
        self._listening = ExitStack()

    # -- signals -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen to signals instead of Lightning, and have checkpoints written so that none is lost."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        self._listening.enter_context(STOP.listening())
        # Lightning's handlers exchange a flag, though only one process may have been signalled.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._listening.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let signals stop an evaluation alone at once, and one inside training when all processes agree."""
        if not self._training:
            self._at_once(trainer)
            return
        self._validating = True
        if trainer.world_size > 1:  # a process may have one batch more than another
            own = [int(count) if count < float("inf") else 0 for count in trainer.num_val_batches]
            fewest = trainer.strategy.reduce(torch.tensor(own, device=trainer.strategy.root_device), reduce_op="min")
            self._common_batches = fewest.tolist()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See :meth:`on_validation_start`."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop together with the other processes after a batch, during a validation inside training."""
        if self._training and trainer.world_size > 1 and batch_idx < self._common_batches[dataloader_idx]:
            self._stop_if_agreed(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the validation has all its answers."""
        self._validating, self._after_validation = False, self._training

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the validation is over; other checkpoints of it have been written before."""
        self._after_validation = False

    def _at_once(self, trainer: pl.Trainer) -> None:
        STOP.when = StopAt.ONCE
        environment = trainer._accelerator_connector.cluster_environment
        if STOP.forward_to is None and trainer.local_rank != 0 and isinstance(environment, LightningEnvironment):
            STOP.forward_to = os.getppid()  # the first process, which ends the others

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let signals wait for the end of a step."""
        self._between_steps(trainer)
        self._training, self._validating, self.reason, self.path, self._saved_step = True, False, None, None, None
        if trainer.ckpt_path is not None:  # until the next step, nothing has happened that it lacks
            self.path, self._saved_step = Path(trainer.ckpt_path), trainer.global_step
        self._folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        if trainer.is_global_zero:
            remove_partial_files(self._folder)
            if trainer.ckpt_path is not None:
                set_aside_later(self._folder, trainer.global_step)
        self._step_end = _progress(trainer)

    def _between_steps(self, trainer: pl.Trainer) -> None:
        # With several processes, one that stopped while sampling would leave the others waiting for it.
        self._in_step, STOP.when = False, StopAt.SAFE_POINT if trainer.world_size == 1 else StopAt.STEP_END

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let signals wait for the end of this step."""
        self._in_step, STOP.when = True, StopAt.STEP_END

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the last step or after a signal, then stop."""
        self._step_end = _progress(trainer)
        self._stop_if_agreed(trainer)
        # Not in on_train_end: by then Lightning has closed the epoch, and a longer run could not continue inside it.
        if _is_last_step(trainer):
            self._save(trainer, "final.ckpt")
        self._between_steps(trainer)

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        """Save and stop if one of the processes was signalled."""
        if (signum := _agreed(trainer, STOP.signum)) is None:
            return
        self._save(trainer, "interrupted.ckpt")
        if self._in_step:  # Lightning logs the step after this hook, and a stop would skip that
            trainer._logger_connector.update_train_step_metrics()
        if signum == _requeue_signal(trainer):
            trainer._signal_connector._slurm_sigusr_handler_fn(signum, None)  # type: ignore[arg-type]
        self._in_step = False
        raise Stopped(signum)

    # -- the end -------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if something has ended training after its step, such as an evaluation, and say why it ended."""
        self.reason = _why_stopped(trainer)
        if self._saved_step != trainer.global_step:
            self._save(trainer, "final.ckpt", anew=True)
        if self.reason is not None:
            rank_zero_info(f"training ended at step {trainer.global_step}: {self.reason}; saved {self.path}")
        agreed = _agreed(trainer, STOP.signum)
        self._training = False
        self._at_once(trainer)
        if agreed is not None:
            raise Stopped(agreed)
        STOP.check()  # a signal after the others were asked

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save if a signal has stopped training between two steps; restore the signal handlers.

        Raises:
            UsageError: the error came while a checkpoint was restored.
        """
        _explain_restoring(trainer, exception)
        stopped, between = isinstance(exception, Stopped), self._training and not self._in_step
        self._training = False
        if stopped:
            let_others_end()
        try:
            if stopped and between and trainer.world_size == 1 and self._saved_step != trainer.global_step:
                self._save(trainer, "interrupted.ckpt")
        finally:
            STOP.when = StopAt.ONCE
            if stopped:  # saving may take longer
                STOP.end_soon()
            self._listening.close()
            if isinstance(pl_module, EvaluationModule):
                if stopped:
                    with torch.inference_mode():  # as in the evaluation
                        pl_module.evaluator.finish()  # keep the batch whose answers the verifier is checking
                with suppress(OSError):  # a full disk, which is the error
                    pl_module.evaluator.close()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the progress of Lightning's loops as it was when the last step ended.

        Lightning cannot continue inside an epoch that it has closed early, nor inside a validation: it starts one that
        is noted as begun from its first batch, which takes up the answers on disk.
        """
        loops = checkpoint["loops"]["fit_loop"]
        if self._saving and self._validating:
            begun = dict.fromkeys(("ready", "started"), 1) | dict.fromkeys(("processed", "completed"), 0)
            progress = {"total": begun, "current": dict(begun), "is_last_batch": False}
            loops["epoch_loop.val_loop.batch_progress"] = progress
        elif self._saving or self._after_validation:
            loops.update(self._step_end)

    def _save(self, trainer: pl.Trainer, name: str, *, anew: bool = False) -> None:
        self._saved_step = trainer.global_step
        for each in trainer.checkpoint_callbacks if not anew else ():
            if not isinstance(each, ModelCheckpoint) or each.save_weights_only:
                continue
            if each._last_checkpoint_saved and each._last_global_step_saved == trainer.global_step:
                self.path = Path(each._last_checkpoint_saved)
                return
        self._saving = True
        try:
            trainer.save_checkpoint(self._folder / name, weights_only=False)
        finally:
            self._saving = False
        self.path = self._folder / name


def let_others_end() -> None:
    """Stop Lightning's watch over the processes that it has started: it kills this one when another is killed."""
    for thread in threading.enumerate():
        if hasattr(thread, "_child_processes"):
            thread._child_processes = []


def _explain_restoring(trainer: pl.Trainer, error: BaseException) -> None:
    """Raise a UsageError if Lightning could not restore a checkpoint, whatever part of it is at fault."""
    restoring = bool(trainer._checkpoint_connector._loaded_checkpoint)  # emptied when all is restored
    unexpected = isinstance(error, LookupError | TypeError | AttributeError | ValueError | RuntimeError)
    if restoring and unexpected and not isinstance(error, UsageError) and out_of_memory(error) is None:
        raise UsageError(
            f"ckpt_path '{trainer.ckpt_path}' cannot be restored ({type(error).__name__}: {first_line(error)[:200]}): "
            "resume with the configuration and the version of opdlab that wrote it, or give another checkpoint"
        ) from error


def _requeue_signal(trainer: pl.Trainer) -> int | None:
    """Return the signal on which Lightning queues a SLURM job again; None elsewhere, and where submitit does it."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return None if "SUBMITIT_EXECUTOR" in os.environ else environment.requeue_signal
    return None


def _progress(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the progress of the training loops, without the loader's state, in the form of a checkpoint."""
    loop = trainer.fit_loop
    state: dict[str, Any] = {"epoch_progress": loop.epoch_progress.state_dict()}
    loop.epoch_loop.state_dict(state, "epoch_loop.")
    return state


def _agreed(trainer: pl.Trainer, signum: int | None) -> int | None:
    """Return the signal that one of the processes has received; None without one. All processes call it together."""
    if trainer.world_size > 1:
        own = torch.tensor(signum or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(own, reduce_op="max"))
    return signum or None


def _is_last_step(trainer: pl.Trainer) -> bool:
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _why_stopped(trainer: pl.Trainer) -> str | None:
    """Return why training has ended before the configured steps or epochs; None if it has not."""
    if not trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return None
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message.partition(' Signaling')[0]}"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "trainer.max_time has passed"
    return "a callback has set trainer.should_stop"
