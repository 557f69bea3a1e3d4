"""The evaluation part of the LightningModule."""

from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn

from opdlab.data.datamodule import PromptDataModule
from opdlab.errors import require
from opdlab.evaluation.config import EvaluationConfig
from opdlab.evaluation.evaluator import Evaluator
from opdlab.evaluation.samples import SampleFolder
from opdlab.evaluation.settings import evaluation_settings
from opdlab.loggers import log_scalars, save_all
from opdlab.policies import LanguageModel, NoTeacher, Sampler, SamplingConfig, Teacher, TeacherHolder
from opdlab.policies.decoding import naming_step
from opdlab.progress import Progress, SilentProgress, StoppableProgress
from opdlab.records import package_versions
from opdlab.run_folder import samples_of_other_runs
from opdlab.seeds import EVALUATION_SEED_KEY
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
        sampler: samples the student's answers; None for transformers'. Other models are always sampled with that.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: Teacher,
        evaluation: EvaluationConfig,
        sampling: SamplingConfig,
        sampler: Sampler | None = None,
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
        self.sampler = sampler
        self._instead: _Evaluated | None = None  # evaluated instead of the student
        self._gathered = ExitStack()  # sharded weights, during an evaluation
        self.logged: dict[tuple[Logger, int], Set[str]] = {}
        """Names that a logger has at a step since before a resume."""

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
        """Return the trainer's progress callback, or a silent one; a signal stops work whose progress it shows."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        return StoppableProgress(next((each for each in callbacks if isinstance(each, Progress)), SilentProgress()))

    def setup(self, stage: str) -> None:
        """Create the metrics of the data module's benchmarks, and check the prompts' tokens."""
        if self.data is not None:
            self.data.check_tokens(self.student.tokenizer, self.student.vocab_size)
            models = [("model.student", self.student)]
            if self.evaluator.config.reverse_kl:
                models += [("model.teacher", each) for each in self.teacher.local_models()]
            for whose, model in models:
                self._check_context(whose, model)
        names = self.data.benchmarks if self.data is not None else {}
        if self.evaluator.benchmarks != list(names):
            self.evaluator = Evaluator(self.evaluator.config, self.evaluator.sampling, names).to(self.device)

    def _check_context(self, whose: str, model: LanguageModel) -> None:
        if self.data is not None:
            key, longest = "model.eval_sampling.max_new_tokens", self.evaluator.sampling.max_new_tokens
            self.data.check_context(model.context, whose, key, longest, training=False)

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
        self._instead = _Evaluated(name, model, subfolder)
        try:
            yield
        finally:
            self._instead = None

    @property
    def _evaluated(self) -> _Evaluated:
        return self._instead or _Evaluated("val", self.student)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the evaluation seed, so that a later evaluation of the checkpoint can use it too."""
        checkpoint[EVALUATION_SEED_KEY] = self.evaluator.config.seed

    def validation_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample answers to a batch of problems and submit them to the verifier."""
        teacher = self.teacher if self.evaluator.config.reverse_kl else None
        if teacher is not None:
            teacher.to(self.device)
        model, step = self._evaluated.model, self.global_step
        sampler = self.sampler if model is self.student else None  # an engine holds one model's shapes
        with naming_step(step):
            self.evaluator.evaluate(model, batch, self.progress, teacher, sampler=sampler, step=step)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and open the folder of the samples.

        Sharded weights are gathered for the whole evaluation, since processes may have different numbers of batches.
        """
        self._gathered.close()
        if self._instead is not None:
            self._check_context(f"model '{self._instead.model.path}'", self._instead.model)
            if self._instead.model.sharding is None:
                self._instead.model.to(self.device)
        compared = self.teacher.local_models() if self.evaluator.config.reverse_kl else ()
        for model in (self._evaluated.model, *compared):
            self._gathered.enter_context(model.whole())
        self.evaluator.close()  # a failed earlier evaluation may have the same files open
        self.evaluator.start(self._sample_folder())

    def on_validation_epoch_end(self) -> None:
        """Log every benchmark's metrics and their mean, and write them to the folder of the samples."""
        if self.sampler is not None:
            self.sampler.release()
        self.evaluator.finish()
        self._gathered.close()
        metrics = self.evaluator.compute()
        prefix = f"{self._evaluated.name}/"
        named = {f"{prefix}{key}": value for key, value in metrics.items()}
        # Lightning keeps what an earlier evaluation logged, such as a vote, if this one had no answers to vote on.
        for name in [name for name in self.trainer.callback_metrics if name.startswith(prefix)]:
            del self.trainer.callback_metrics[name]
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        # Lightning would log again what a logger has since before a resume.
        ours = fitting or any(step == self.global_step for _, step in self.logged)
        self.log_dict(named, sync_dist=True, logger=False if ours else None)
        if not ours:
            self.log("step", float(self.global_step))  # Lightning's own axis lags behind after a resume
        elif not self.trainer.sanity_checking:
            self.write_metrics(named, self.global_step)
        if (folder := self.evaluator.folder) is not None:
            self.evaluator.close()
            values = {key: float(value) for key, value in metrics.items()}
            folder.write_results({"figures": values, "settings": folder.settings, "versions": package_versions()})

    def write_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write metrics to all loggers at once; :meth:`log` writes when the callbacks of a step are done.

        Args:
            metrics: scalars by name, the same in all processes; names in :attr:`logged` are left out.
            step: optimizer steps taken.
        """
        if self.trainer.is_global_zero:
            log_scalars(self.trainer.loggers, metrics, step, self.logged)
            save_all(self.trainer.loggers)

    # Testing runs the same hooks as validation.
    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def _sample_folder(self) -> SampleFolder | None:
        """Return the folder into which the evaluation writes its samples; None if it writes none."""
        config, data, trainer = self.evaluator.config, self.data, self.trainer
        if config.samples is None or data is None or trainer.sanity_checking:
            return None
        evaluated = self._evaluated
        fitting = trainer.state.fn == TrainerFn.FITTING
        subfolder = f"{evaluated.name}-step-{self.global_step}" if fitting else evaluated.subfolder
        teacher = self.teacher if config.reverse_kl else None
        settings = evaluation_settings(evaluated.model, teacher, self.evaluator, data, trainer)
        compared = trainer.strategy.broadcast(settings)  # they name the folder of all processes
        checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        about = {"model": evaluated.model.path, "checkpoint": checkpoint, "step": self.global_step}
        samples = Path(trainer.strategy.broadcast(str(config.samples)))  # the first process knows the run's folder
        # An evaluation before training may have been stopped in another run, which has no checkpoint to resume from.
        others = samples_of_other_runs(samples) if subfolder and not fitting else []
        return SampleFolder(
            samples / subfolder,
            {**about, "compared": compared},
            take_over=[other / subfolder for other in others],
            rank=trainer.global_rank,
            replace=bool(subfolder),  # only this run uses a subfolder
            barrier=trainer.strategy.barrier,
        )
