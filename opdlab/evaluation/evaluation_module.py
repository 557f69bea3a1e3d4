"""The evaluation part of the LightningModule."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from opdlab.data.datamodule import PromptDataModule
from opdlab.errors import require
from opdlab.evaluation.config import EvaluationConfig
from opdlab.evaluation.evaluator import Evaluator
from opdlab.evaluation.folder import sample_folder
from opdlab.policies import LanguageModel, NoTeacher, SamplingConfig, Teacher, TeacherHolder
from opdlab.progress import Progress, SilentProgress
from opdlab.records import package_versions
from opdlab.types import EvaluationBatch


@dataclass(frozen=True)
class _Evaluated:
    name: str
    model: LanguageModel
    subfolder: str = ""


class EvaluationModule(pl.LightningModule):
    """LightningModule that samples answers to the data module's benchmarks and logs metrics.

    Args:
        student: the model that is evaluated.
        teacher: reference of the reverse KL, if that is measured; never a submodule.
        evaluation: see :class:`EvaluationConfig`.
        sampling: sampling options of the answers.
    """

    def __init__(
        self, student: LanguageModel, teacher: Teacher, evaluation: EvaluationConfig, sampling: SamplingConfig
    ) -> None:
        super().__init__()
        evaluation.check(sampling)
        require(
            not (isinstance(teacher, NoTeacher) and evaluation.reverse_kl),
            "model.evaluation.reverse_kl is true, but model.teacher is NoTeacher: give a teacher",
        )
        self.student = student
        self._held = TeacherHolder(teacher)
        self.evaluator = Evaluator(evaluation, sampling, [])
        self._evaluated: _Evaluated | None = None  # evaluated instead of the student

    @property
    def teacher(self) -> Teacher:
        """Return the teacher, which is not a submodule."""
        return self._held.teacher

    @property
    def data(self) -> PromptDataModule | None:
        """Return the trainer's data module; None if it is not a :class:`PromptDataModule`."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, PromptDataModule) else None

    @property
    def progress(self) -> Progress:
        """Return the trainer's progress callback, or a silent one."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        return next((each for each in callbacks if isinstance(each, Progress)), SilentProgress())

    def setup(self, stage: str) -> None:
        """Create the metrics of the data module's benchmarks."""
        names = self.data.benchmarks if self.data is not None else {}
        if list(self.evaluator.metrics) != list(names):
            self.evaluator = Evaluator(self.evaluator.config, self.evaluator.sampler.config, names).to(self.device)

    @contextmanager
    def evaluating(self, name: str, model: LanguageModel, subfolder: str = "") -> Iterator[None]:
        """Evaluate ``model`` instead of the student.

        Args:
            name: prefix of the logged metrics, instead of ``val``.
            model: moved to this module's device when the evaluation starts, because Lightning may keep this module on
                the host until then.
            subfolder: subfolder of ``model.evaluation.samples`` if that holds several evaluations; samples of other
                settings in it are replaced.
        """
        before, self._evaluated = self._evaluated, _Evaluated(name, model, subfolder)
        try:
            yield
        finally:
            self._evaluated = before

    def validation_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample answers to a batch of problems and submit them to the verifier."""
        teacher = self.teacher if self.evaluator.config.reverse_kl else None
        if teacher is not None:
            teacher.to(self.device)
        model = self._current.model
        self.evaluator.evaluate(model, batch, (batch_idx, self.trainer.global_rank), self.progress, teacher)

    @property
    def _current(self) -> _Evaluated:
        return self._evaluated or _Evaluated("val", self.student)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and open the folder of the samples."""
        current = self._current
        if self._evaluated is not None:
            current.model.to(self.device)
        self.evaluator.close()  # a failed earlier evaluation may have the same files open
        folder = None
        if self.data is not None:
            folder = sample_folder(
                self, self.teacher, self.data, self.evaluator, current.model, current.name, current.subfolder
            )
        self.evaluator.start(folder)

    def on_validation_epoch_end(self) -> None:
        """Log every benchmark's metrics and their mean, and write them to the folder of the samples."""
        self.evaluator.finish()
        figures = self.evaluator.compute()
        named = {f"{self._current.name}/{key}": value for key, value in figures.items()}
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.log_dict(named, sync_dist=True, logger=False if fitting else None)
        if fitting and not self.trainer.sanity_checking:  # Lightning would log them one step too early
            self.write_metrics({**named, "epoch": self.current_epoch}, self.global_step)
        if (folder := self.evaluator.folder) is not None:
            self.evaluator.close()
            values = {key: float(value) for key, value in figures.items()}
            folder.write_results({"figures": values, "settings": folder.settings, "versions": package_versions()})

    def write_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write metrics to all loggers at once; :meth:`log` writes when the callbacks of a step are done.

        Args:
            metrics: scalars by name, the same in all processes.
            step: optimizer steps taken.
        """
        if self.loggers and self.trainer.is_global_zero:
            values = {name: float(value) for name, value in metrics.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=step)
                logger.save()

    # Testing runs the same hooks as validation.
    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end
