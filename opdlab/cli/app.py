"""``opdlab fit | validate | test``: a LightningCLI with run folders, and an evaluation before and after training."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus

from opdlab.callbacks import EvaluationTable, LabProgressBar, SampleLogger, StopCheckpoint
from opdlab.cli.building import build
from opdlab.cli.checks import check_files, check_trainer, warn_of_idle_recorder
from opdlab.cli.estimate import refuse_oversized
from opdlab.cli.hparams import log_hyperparameters
from opdlab.cli.parsing import RUN_KEYS, fit_parser, parse_fit
from opdlab.data import PromptDataModule
from opdlab.errors import exit_code
from opdlab.module import OPDModule
from opdlab.policies import LanguageModel, LocalTeacher
from opdlab.records import RESULTS
from opdlab.run_folder import check_checkpoint, fit_samples_folder, run_folder_for, samples_folder_for


def fit(arguments: Sequence[str]) -> int:
    """Run ``opdlab fit``, and return the exit code."""
    return OPDCLI("fit", arguments).fit()


def validate(arguments: Sequence[str]) -> int:
    """Run ``opdlab validate``, and return the exit code."""
    return OPDCLI("validate", arguments).evaluate()


def test(arguments: Sequence[str]) -> int:
    """Run ``opdlab test``, and return the exit code."""
    return OPDCLI("test", arguments).evaluate()


class _SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder; only ``fit`` has one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class OPDCLI(LightningCLI):
    """LightningCLI with opdlab's callbacks, run folders, and an evaluation before and after training."""

    datamodule: PromptDataModule
    model: OPDModule

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.table = EvaluationTable()
        self.resumed_step = 0
        self.stop = StopCheckpoint()
        super().__init__(
            OPDModule,
            PromptDataModule,
            save_config_callback=_SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [self.table]},
            args=list(arguments),
            run=False,  # the command is known; Lightning's subcommands would build a parser for each
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def setup_parser(self, add_subcommands: bool, main_kwargs: Any, subparser_kwargs: Any) -> None:
        """Use the parser that the other commands share."""
        self.parser = fit_parser(self.command)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse and check the arguments, and the checkpoint to resume from."""
        self.config = parse_fit(args, self.command)
        if self.config.ckpt_path is not None:
            self.resumed_step = check_checkpoint(Path(self.config.ckpt_path))

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint: Lightning merges its hyperparameters, class paths included."""

    def instantiate_classes(self) -> None:
        """Build all objects, after a check that the models' weights fit the device."""
        check_trainer(self.config, here=True)
        check_files(self.config)
        if self.command == "fit":
            warn_of_idle_recorder(self.config)
            if self.config.check_memory:
                refuse_oversized(self.config)
        self.config_init = build(self.parser, self.config)
        self.model, self.datamodule = self.config_init.model, self.config_init.data
        self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Check that buffers can be split into batches, to fail before the first evaluation."""
        self.trainer.callbacks.append(self.stop)  # type: ignore[attr-defined] # last: reads files of the others
        self.datamodule.check_reuse(self.model.sampling.num_samples, self.trainer.accumulate_grad_batches)

    # -- the run's folder ----------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Set the run's folder: ``ROOT/version_N`` holds its events, configuration, checkpoints and student."""
        config = self.config
        root = Path(config.trainer.default_root_dir)
        if config.weights_only is None:
            config.weights_only = True  # checkpoints hold only tensors and plain values
        if config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(LabProgressBar())
        evaluation = config.model.evaluation
        if self.command != "fit":
            config.trainer.logger = False if config.trainer.logger is None else config.trainer.logger
            if config.ckpt_path is not None and config.checkpoint.dirpath is None:
                config.checkpoint.dirpath = str(Path(config.ckpt_path).absolute().parent)
            if evaluation.samples is None:
                student = config.get("model.student.init_args.path") or "student"
                evaluation.samples = samples_folder_for(student, config.ckpt_path, root)
            if not evaluation.reverse_kl:
                # Avoids reading the teacher's weights.
                config.model.teacher = {"class_path": "opdlab.evaluation.NoTeacher"}
            return
        folder = run_folder_for(config.ckpt_path, root)
        if evaluation.samples is not None:
            evaluation.samples = str(fit_samples_folder(evaluation.samples, folder))
        if config.trainer.logger in (None, True):
            config.trainer.logger = self._logger(root, folder.name, resumed=config.ckpt_path is not None)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str((folder / "checkpoints").absolute())

    def _logger(self, root: Path, version: str, *, resumed: bool) -> dict[str, Any]:
        # A resumed run logs the steps after its checkpoint again. Keep the metrics of the checkpoint's own step: some
        # were logged before the checkpoint was written, and are not logged again.
        purge = {"dict_kwargs": {"purge_step": self.resumed_step + 1}} if resumed else {}
        arguments = {"save_dir": str(root), "name": "", "version": version}
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": arguments, **purge}

    # -- running -------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train, and return the exit code. Lightning exits on Ctrl-C; this also prints how to resume."""
        self.before_fit()
        if self.config.ckpt_path is not None:  # a resumed run uses its own folder on purpose
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, **self._run_arguments)
        except SystemExit as error:
            if self.stop.path is None:
                raise
            stopped = f"stopped at step {self.trainer.global_step}, saved {self.stop.path}"
            return _interrupted(stopped, " with --ckpt_path last", error)
        self.after_fit()
        return 0

    def evaluate(self) -> int:
        """Evaluate, and return the exit code. After Ctrl-C or a kill, the same command resumes."""
        run = self.trainer.test if self.command == "test" else self.trainer.validate
        try:
            run(self.model, datamodule=self.datamodule, verbose=False, **self._run_arguments)
        except SystemExit as error:
            folder = self.model.evaluator.folder
            if self.trainer.state.status != TrainerStatus.INTERRUPTED or folder is None:
                raise
            return _interrupted(f"stopped, the samples so far are in {folder.path}", "", error)
        if self.trainer.is_global_zero:
            self.table.print(trained=False)
            if (folder := self.model.evaluator.folder) is not None:
                print(f"samples and {RESULTS}: {folder.path}")
        return 0

    @property
    def _run_arguments(self) -> dict[str, Any]:
        return {key: self.config_init[key] for key in RUN_KEYS}

    # -- before and after ----------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Evaluate the untrained student, unless the run resumes from a checkpoint, which holds these results."""
        # Report invalid training problems before an evaluation that may take long.
        self.datamodule.prepare(self.model.student.tokenizer, training=True)
        self.datamodule.reuse.check_prompts(len(self.datamodule.train_prompts or ()), self.trainer.world_size)
        log_hyperparameters(self.trainer, self.model, self.config.as_dict(), self.datamodule.benchmark_sources)
        if self.config.ckpt_path is None and self._has_benchmarks:
            self._evaluate("val", self.model.student)

    def after_fit(self) -> None:
        """Evaluate the trained student and the teacher, print the table and the next commands."""
        if self._has_benchmarks:
            if self.table.after_step != self.trainer.global_step:
                self._evaluate("val", self.model.student)
            teacher = self.model.teacher
            if isinstance(teacher, LocalTeacher) and self.model.evaluator.config.teacher and not self.table.teacher:
                self._evaluate("teacher", teacher.model)
        run_folder = self.trainer.log_dir  # a collective call, so outside the branch below
        if self.trainer.is_global_zero:
            self.table.print()
            print(f"run folder: {run_folder}")
            if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
                print(f"look closer: tensorboard --logdir {self.trainer.default_root_dir}")
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleLogger) and callback.index.exists():
                    print(f"read the rollouts: {callback.index}")

    def _evaluate(self, name: str, model: LanguageModel) -> None:
        with self.model.evaluating(name, model, f"{name}-step-{self.trainer.global_step}"):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    @property
    def _has_benchmarks(self) -> bool:
        return bool(self.datamodule.benchmark_sources)


def _interrupted(kept: str, needs: str, stop: SystemExit) -> int:
    """Print what is on disk and how to resume, and return the exit code of the signal that caused ``stop``."""
    print(f"opdlab: {kept}; to go on, run the same command{needs}", file=sys.stderr)
    return exit_code(stop.__context__)
