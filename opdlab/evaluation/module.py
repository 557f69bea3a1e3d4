"""The part of the LightningModule that evaluates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from opdlab.data.datamodule import EvaluationBatch, PromptDataModule
from opdlab.errors import UsageError
from opdlab.evaluation.evaluator import Evaluator
from opdlab.evaluation.samples import SampleFolder
from opdlab.evaluation.settings import evaluation_settings
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import LocalTeacher, Teacher, TeacherRequest
from opdlab.progress import Progress, SilentProgress
from opdlab.records import package_versions
from opdlab.rollouts.batch import Rollouts, Targets


class NoTeacher(Teacher):
    """Stands where a teacher is not needed, so that none is loaded: a model that is evaluated and not trained."""

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Refuse."""
        raise UsageError("model.teacher is NoTeacher, which scores nothing: give a teacher")


@dataclass(frozen=True)
class _Evaluated:
    name: str = "val"
    model: LanguageModel | None = None
    subfolder: str = ""


class EvaluationModule(pl.LightningModule):
    """Samples answers to the data module's benchmarks, and logs what came out."""

    student: LanguageModel
    teacher: Teacher
    evaluator: Evaluator

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress = SilentProgress()
        self._evaluated = _Evaluated()

    def setup(self, stage: str) -> None:
        """Make the metrics of the data module's benchmarks."""
        names = self._data.benchmarks if isinstance(self._data, PromptDataModule) else []
        if list(self.evaluator.metrics) != list(names):
            self.evaluator = Evaluator(self.evaluator.config, self.evaluator.sampler.config, names).to(self.device)

    @property
    def _data(self) -> object:
        return getattr(self.trainer, "datamodule", None)

    @contextmanager
    def evaluating(self, name: str, model: LanguageModel, subfolder: str = "") -> Iterator[None]:
        """Evaluate ``model`` instead of the student.

        Args:
            name: figures are logged under it instead of ``val``.
            model: moved to this module's device when the evaluation starts; before, Lightning may have this module
                on the host.
            subfolder: of ``model.evaluation.samples``, where there are several evaluations in it; samples of other
                settings in there are replaced.
        """
        before, self._evaluated = self._evaluated, _Evaluated(name, model, subfolder)
        try:
            yield
        finally:
            self._evaluated = before

    @property
    def _model(self) -> LanguageModel:
        return self._evaluated.model or self.student

    def validation_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample answers to a batch of problems, and have them checked."""
        teacher = self.teacher if self.evaluator.config.reverse_kl else None
        if teacher is not None:
            teacher.to(self.device)
        self.evaluator.evaluate(self._model, batch, (batch_idx, self.trainer.global_rank), self.progress, teacher)

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        if self._evaluated.model is not None:
            self._evaluated.model.to(self.device)
        self.evaluator.close()  # an earlier evaluation that failed may hold the same files
        self.evaluator.start(self._sample_folder())

    def on_validation_epoch_end(self) -> None:
        """Log every benchmark's figures and their mean, and keep them beside the samples."""
        self.evaluator.finish()
        figures = self.evaluator.compute()
        self.log_dict({f"{self._evaluated.name}/{key}": value for key, value in figures.items()}, sync_dist=True)
        if (folder := self.evaluator.folder) is not None:
            self.evaluator.close()
            values = {key: float(value) for key, value in figures.items()}
            folder.write_results({"figures": values, "settings": folder.settings, "versions": package_versions()})

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same as :meth:`validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_start(self) -> None:
        """The same as :meth:`on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """The same as :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    # -- samples on disk -----------------------------------------------------------------------------------------

    def _sample_folder(self) -> SampleFolder | None:
        root, trainer = self.evaluator.config.samples, self.trainer
        if root is None or trainer.sanity_checking or not isinstance(self._data, PromptDataModule):
            return None
        fitting = trainer.state.fn == TrainerFn.FITTING
        subfolder = f"{self._evaluated.name}-step-{self.global_step}" if fitting else self._evaluated.subfolder
        return SampleFolder(
            Path(root) / subfolder,
            self._settings(self._data),
            rank=trainer.global_rank,
            replace=bool(subfolder),  # within a run, the run is what its folder tells of
            barrier=trainer.strategy.barrier,
        )

    def _settings(self, data: PromptDataModule) -> dict[str, Any]:
        config = self.evaluator.config
        teacher = self.teacher.model if config.reverse_kl and isinstance(self.teacher, LocalTeacher) else None
        checkpoint = str(self.trainer.ckpt_path) if self.trainer.ckpt_path is not None else None
        return evaluation_settings(
            self._model,
            self.evaluator.sampler.config,
            data.benchmarks,
            teacher=teacher,
            about={"checkpoint": checkpoint, "step": self.global_step},
            evaluation={"reverse_kl": config.reverse_kl, "seed": config.seed},
            eval_batch_size=data.eval_batch_size,
            trainer={
                "precision": str(self.trainer.precision),
                "devices": self.trainer.world_size,
                "accelerator": self.device.type,
            },
        )
