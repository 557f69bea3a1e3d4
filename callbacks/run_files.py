"""The results of a run, and curves that go on where a resumed run goes on."""

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from opdlab.callbacks.collapse_guard import CollapseGuard
from opdlab.callbacks.evaluation_table import EvaluationTable
from opdlab.errors import FullDiskError
from opdlab.evaluation import EvaluationModule
from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX, TEACHER
from opdlab.records import RESULTS, package_versions, write_json
from opdlab.training.run_trainer import MetricsFile
from opdlab.types import Minibatch

FINISHED, STOPPED, COLLAPSED, FAILED = "finished", "stopped", "collapsed", "failed"


class RunFiles(pl.Callback):
    """Writes ``results.json`` into the run's folder when training ends or stops, and continues curves after a resume.

    ``results.json`` holds the evaluations ``before`` and ``after`` training and of the ``teacher``, or of each as
    ``teacher-NAME`` (``value`` and ``standard_error`` of each metric), the ``best`` one if ``checkpoint.monitor`` is
    given, optimizer ``steps``, response ``tokens`` that
    all processes have trained on, ``seconds`` of training over all attempts, ``seeds``, ``versions``, ``warnings``, and
    the ``state``: ``finished``, ``stopped`` by a signal, ``collapsed`` if the collapse guard found a sign or stopped
    it, ``failed`` with an error.

    A resumed run logs the steps after its checkpoint again: their points are removed from ``metrics.csv`` and hidden
    from TensorBoard. An evaluation at the step of the checkpoint follows it, and is made up for if it may be missing:
    of that step, only what a logger lacks is logged.

    Args:
        table: holds the evaluations.
    """

    def __init__(self, table: EvaluationTable) -> None:
        self.table = table
        self.state: str | None = None
        """State of the run; None until training has ended or stopped."""
        self._tokens, self._seconds = 0, 0.0
        self._since: float | None = None
        self._folder: Path | None = None
        self._resumed = False

    # -- curves --------------------------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue the curves when all else has been restored."""
        self._resumed = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; for a resumed run, also continue the curves at its step."""
        self._since, self.state = time.monotonic(), None
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._continue_curves(trainer, pl_module)

    def _continue_curves(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed, self._resumed = self._resumed, False
        if not resumed:
            return
        assert isinstance(pl_module, EvaluationModule)
        step = trainer.global_step
        for logger in trainer.loggers:
            pl_module.logged[logger, step] = set()
            if trainer.is_global_zero:
                _drop_after(logger, step)
                pl_module.logged[logger, step] = _logged(logger, step)

    # -- results -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tokens and seconds so far."""
        return {"tokens": self._tokens, "seconds": self._trained_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens of an optimizer step, in all processes."""
        if isinstance(batch, Minibatch) and batch.position + 1 == len(batch.micro_batches):
            self._tokens += outputs["num_tokens"]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the results of a run that has ended, also of one that resumes at its last step and has no start."""
        self._continue_curves(trainer, pl_module)
        self._end(trainer, pl_module, COLLAPSED if any(guard.messages for guard in _guards(trainer)) else FINISHED)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the results again after an evaluation that follows the training."""
        if self.state is not None:
            self._end(trainer, pl_module, self.state)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the results of a run that an error or a signal has ended."""
        if self._folder is None and trainer.ckpt_path is not None:
            return  # a resume that was refused: the results of the run stay
        with suppress(OSError, FullDiskError):  # the exception says more; and other callbacks have to clean up
            self._end(trainer, pl_module, STOPPED if isinstance(exception, KeyboardInterrupt) else FAILED)

    def _trained_seconds(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: str) -> None:
        folder = self._folder or getattr(trainer, "run_folder", None)
        if folder is None:  # an evaluation alone
            return
        self._seconds, self._since, self.state = self._trained_seconds(), None, state
        if not trainer.is_global_zero:
            return
        table, data = self.table, getattr(trainer, "datamodule", None)
        evaluated = {"before": table.before, "after": table.after, TEACHER: {}, **table.teachers}
        if table.best_step is not None:
            evaluated["best"] = table.best
        seeds = {
            "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "data.seed": getattr(data, "seed", None),
            "model.evaluation.seed": pl_module.evaluator.config.seed,  # type: ignore[union-attr]
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / RESULTS,
            {
                **{name: _with_errors(metrics) for name, metrics in evaluated.items()},
                "after_step": table.after_step,
                **({} if table.best_step is None else {"best_step": table.best_step}),
                "steps": trainer.global_step,
                "tokens": self._tokens,
                "seconds": round(self._seconds, 3),
                "seeds": seeds,
                "versions": {"python": platform.python_version(), **package_versions()},
                "warnings": [message for guard in _guards(trainer) for message in guard.messages],
                "state": state,
            },
        )


def _guards(trainer: pl.Trainer) -> list[CollapseGuard]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
    return [callback for callback in callbacks if isinstance(callback, CollapseGuard)]


def _with_errors(metrics: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    return {
        name: {"value": value, "standard_error": metrics.get(name + ERROR_SUFFIX)}
        for name, value in metrics.items()
        if not name.endswith(ERROR_SUFFIX)
    }


def _drop_after(logger: Logger, step: int) -> None:
    if isinstance(logger, MetricsFile):
        logger.drop_after(step)
    elif isinstance(logger, TensorBoardLogger):
        # What SummaryWriter does for `purge_step`, which it takes only before the checkpoint has been restored.
        session = SessionLog(status=SessionLog.START)
        logger.experiment._get_file_writer().add_event(Event(step=step + 1, session_log=session))


def _logged(logger: Logger, step: int) -> set[str]:
    """Return the names that a logger's files have at a step; none for loggers whose files are not known.

    A ``MetricsFile`` has one row a step, so it may get a value again.
    """
    if not isinstance(logger, TensorBoardLogger):
        return set()
    return {
        value.tag
        for file in Path(logger.log_dir).glob("events.out.tfevents.*")
        for event in EventFileLoader(str(file)).Load()
        if event.step == step
        for value in event.summary.value
    }
