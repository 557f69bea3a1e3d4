"""Periodic checkpoints of a run, and beside them the one with the best evaluation."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from opdlab.checkpoint_choice import best_step
from opdlab.errors import UsageError, require
from opdlab.evaluation import EvaluationModule
from opdlab.evaluation.benchmark_metrics import ERROR_SUFFIX
from opdlab.registry import suggestion

EVALUATED = "val/"
"""Prefix of the metrics of evaluations."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best evaluation so far.

    Args:
        name: of the file in the folder of the checkpoints.
        step: optimizer steps taken.
        score: value of the monitored metric.
    """

    name: str
    step: int
    score: float


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` that keeps the newest checkpoint, and with ``monitor`` the best one beside it.

    A checkpoint is scored only by an evaluation of its own step: one that is saved between two evaluations has no
    score. An evaluation that is better than all before it saves the step if that is not saved yet. Of equal scores the
    earlier one stays.

    Args:
        monitor: metric of the evaluations, such as ``val/mean/pass@1``; null keeps no best checkpoint.
        mode: ``max`` or ``min``: which value of ``monitor`` is best.
        **options: of ``ModelCheckpoint``. With ``save_top_k`` -1 all checkpoints stay.

    Raises:
        UsageError: ``mode`` is missing, or ``monitor`` is no metric of the evaluations.

    Example:
        >>> RunCheckpoint(monitor="val/mean/pass@1", mode="max", every_n_train_steps=10).best is None
        True
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] | None = None, **options: Any) -> None:
        super().__init__(**options)  # without the metric, by which Lightning would judge what is saved between two
        require(
            monitor is None or mode is not None,
            f"monitor is '{monitor}', but mode is null: give max if a larger value is better, or min",
        )
        require(
            monitor is None or monitor.startswith(EVALUATED),
            f"monitor is '{monitor}', but must be a metric of the evaluations, such as {EVALUATED}mean/pass@1",
        )
        require(
            monitor is None or self.save_top_k != 0, "save_top_k is 0, which saves nothing, but monitor is given: use 1"
        )
        self.metric, self.direction = monitor, mode
        self.best: Best | None = None
        """The best checkpoint; None before the first evaluation, and without ``monitor``."""

    def check_metric(self, logged: Iterable[str]) -> None:
        """Check that an evaluation logs the monitored metric.

        Args:
            logged: names of the metrics of an evaluation.

        Raises:
            UsageError: it does not.
        """
        names = sorted(logged)
        if self.metric is None or self.metric in names:
            return
        hint = suggestion(self.metric, names) or ";"
        choices = ", ".join(name for name in names if not name.endswith(ERROR_SUFFIX)) or "data.benchmarks at least one"
        raise UsageError(
            f"checkpoint.monitor is '{self.metric}', which no evaluation logs{hint} give "
            f"{'one of ' * bool(names)}{choices}"
        )

    @property
    def state_key(self) -> str:
        """Return the key of Lightning's class, so that its checkpoints resume."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if ``mode`` has no metric, and note that a run which resumes from its checkpoint has its step saved."""
        super().on_train_start(trainer, pl_module)
        if self.direction is not None and self.metric is None:
            rank_zero_info(
                f"checkpoint.mode is {self.direction}, but checkpoint.monitor is null, so no best checkpoint is kept: "
                f"give a metric such as {EVALUATED}mean/pass@1"
            )
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == Path(self.best_model_path).resolve():
            self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, self.best_model_path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the checkpoint of this step if it is the best one so far."""
        super().on_validation_end(trainer, pl_module)
        evaluated = {name for name in trainer.callback_metrics if name.startswith(EVALUATED)}
        if self.metric is None or trainer.sanity_checking or not evaluated:
            return
        possible = pl_module.evaluator.metric_names() if isinstance(pl_module, EvaluationModule) else set()
        self.check_metric(evaluated | {f"{EVALUATED}{name}" for name in possible})
        if self.metric not in evaluated:
            return  # such as a vote without answers, so that this evaluation has no score
        if trainer.state.fn != TrainerFn.FITTING or getattr(trainer, "fast_dev_run", False):
            return  # of the untrained student, or of the last step, whose checkpoint stays
        assert self.direction is not None
        step, score, before = trainer.global_step, float(trainer.callback_metrics[self.metric]), self.best
        if best_step({**({before.step: before.score} if before else {}), step: score}, self.direction) != step:
            return
        if self._last_global_step_saved != step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self.best = Best(Path(self.best_model_path).name, step, score)  # Lightning's name for the newest one
        if before is not None and self.save_top_k == 1:
            older = str(Path(self.dirpath or "") / before.name)
            if self._should_remove_checkpoint(trainer, older, self.best_model_path):
                self._remove_checkpoint(trainer, older)

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        kept = self.best is not None and Path(previous).name == self.best.name
        return not kept and super()._should_remove_checkpoint(trainer, previous, current)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state and the best checkpoint."""
        return {**super().state_dict(), "best": None if self.best is None else asdict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the folder may have been moved or copied since."""
        super().load_state_dict(self._here(state_dict))
        best = state_dict.get("best")
        self.best = Best(Path(best["name"]).name, best["step"], best["score"]) if best else None

    def _here(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return Lightning's state with the paths of the checkpoints that are in this folder now.

        Of another folder than the saved one Lightning forgets the paths, with a warning. It would then take a
        ``last.ckpt`` for someone else's and write ``last-v1.ckpt`` beside it.
        """
        if self.dirpath is None or state.get("dirpath", self.dirpath) == self.dirpath:
            return state
        folder = Path(self.dirpath)

        def moved(path: str) -> str:
            return str(folder / Path(path).name) if path and (folder / Path(path).name).exists() else path

        paths = {name: moved(path) for name, path in state.items() if name.endswith("model_path")}
        scores = {moved(path): score for path, score in state.get("best_k_models", {}).items()}
        return {**state, **paths, "best_k_models": scores, "dirpath": self.dirpath}
