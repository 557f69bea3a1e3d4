"""``opdlab fit | validate | test``: a LightningCLI with run folders, and an evaluation before and after training."""

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from opdlab.callbacks import CollapseGuard, EvaluationTable, LabProgressBar, RunFiles, SampleLogger, StopCheckpoint
from opdlab.checkpoints import check_checkpoint, small_parts
from opdlab.cli.building import build, with_seeds
from opdlab.cli.checks import check_files, check_resume, check_trainer, warn_of_idle_recorder
from opdlab.cli.derived_options import fill_evaluation, fill_fit
from opdlab.cli.ending import run_to_end
from opdlab.cli.estimate import refuse_oversized
from opdlab.cli.hparams import log_hyperparameters
from opdlab.cli.parsing import RUN_KEYS, check_length, fit_parser, parse_fit
from opdlab.cli.sharding_checks import check_launcher
from opdlab.data import PromptDataModule
from opdlab.errors import UsageError, first_line
from opdlab.evaluation.benchmark_metrics import TEACHER
from opdlab.files import full_disk
from opdlab.module import OPDModule
from opdlab.policies import LanguageModel
from opdlab.records import RESULTS
from opdlab.run_folder import RunFolder
from opdlab.training.run_trainer import MetricsFile, RunTrainer
from opdlab.training.shared_folder import check_shared_folder

EXIT_COLLAPSED = 3
_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def fit(arguments: Sequence[str]) -> int:
    """Run ``opdlab fit``, and return the exit code."""
    with ExitStack() as held:
        return OPDCLI("fit", arguments, held).fit()


def validate(arguments: Sequence[str]) -> int:
    """Run ``opdlab validate``, and return the exit code."""
    with ExitStack() as held:
        return OPDCLI("validate", arguments, held).evaluate()


def test(arguments: Sequence[str]) -> int:
    """Run ``opdlab test``, and return the exit code."""
    with ExitStack() as held:
        return OPDCLI("test", arguments, held).evaluate()


class OPDCLI(LightningCLI):
    """LightningCLI with opdlab's callbacks, run folders, and an evaluation before and after training.

    Args:
        command: fit, validate or test.
        arguments: after the name of the command.
        held: closed by the caller when the command has ended; holds the lock of the run's folder.
    """

    datamodule: PromptDataModule
    model: OPDModule
    trainer: RunTrainer

    def __init__(self, command: str, arguments: Sequence[str], held: ExitStack) -> None:
        self.command = command
        self.held = held
        self.table = EvaluationTable()
        self.stop = StopCheckpoint()
        self.folder: RunFolder | None = None
        self.resumes = self.accepted = self.shared = False
        super().__init__(
            OPDModule,
            PromptDataModule,
            save_config_callback=None,  # see `_save_config`
            trainer_class=RunTrainer,
            # Before Lightning's checkpoints, which then hold the tokens of their own step.
            trainer_defaults={"callbacks": [self.table, RunFiles(self.table)]},
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
        if self.command == "fit":
            check_length(self.config)
        if self.config.ckpt_path is not None:
            path = Path(self.config.ckpt_path)
            check_checkpoint(path, resume=self.command == "fit")
            if self.command == "fit":
                check_resume(parser, self.config, small_parts(path))

    def _parse_ckpt_path(self) -> None:
        """Take nothing from the checkpoint: Lightning merges its hyperparameters, class paths included."""

    def instantiate_classes(self) -> None:
        """Build all objects, after a check that the models' weights fit the device."""
        check_launcher(self.config)
        check_trainer(self.config, here=True)
        check_files(self.config.as_dict())
        if self.command == "fit":
            warn_of_idle_recorder(self.config)
            if self.config.check_memory:
                refuse_oversized(self.config)
        self.config_init = build(self.parser, self.filled)
        self.model, self.datamodule = self.config_init.model, self.config_init.data
        self.trainer = self.instantiate_trainer()  # type: ignore[assignment] # of `trainer_class`

    def after_instantiate_classes(self) -> None:
        """Check that buffers can be split into batches, to fail before the first evaluation."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.folder is not None:
            self.trainer.run_folder = self.folder.path
            self.trainer.loggers = [*self.trainer.loggers, MetricsFile(self.folder.metrics)]
            if self.resumes:  # once the checkpoint is accepted: a refused one must not cost the run its configuration
                callbacks.append(LambdaCallback(on_train_start=lambda *_: self._save_config()))
        callbacks.insert(0, LambdaCallback(setup=lambda *_, **__: self._check_shared_folder()))
        callbacks.append(self.stop)  # last: reads files of the others
        self.datamodule.reuse.check(self.model.sampling.num_samples, self.trainer.accumulate_grad_batches)

    # -- the run's folder ----------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Make the folder of the run, and fill in what depends on it; ``config.yaml`` stays as the user wrote it."""
        root = Path(self.config.trainer.default_root_dir)
        if self.config.weights_only is None:
            self.config.weights_only = True  # checkpoints hold only tensors and plain values
        if self.config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(LabProgressBar())
        self.filled = config = self.config.clone()
        if self.command == "fit":
            self.folder = self._run_folder(root)
            fill_fit(config, root, self.folder)
        else:
            fill_evaluation(config, root)

    def _run_folder(self, root: Path) -> RunFolder:
        """Return the folder of the resumed run, or a new one; the first process makes it, and others learn of it later.

        The folder belongs to this process until it ends.
        """
        folder = None
        if self.config.ckpt_path is not None:
            folder = RunFolder.of_checkpoint(Path(self.config.ckpt_path), root)
            self.resumes = folder is not None
        # Set by Lightning from the environment, which does not look at the number of the machine.
        first = rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # type: ignore[attr-defined]
        if not first:
            return folder or RunFolder(root / "of-the-first-process")
        if folder is None:
            folder = RunFolder.create(root)
            self.held.callback(lambda: None if self.accepted else folder.discard())
        self.held.enter_context(folder.in_use())
        return folder

    def _check_shared_folder(self) -> None:
        """Check once, as soon as the processes are connected, that they share the folder; a refused run leaves none."""
        if not self.shared:
            try:
                check_shared_folder(self.trainer, None if self.folder is None else self.folder.path)
            except UsageError:
                self.accepted = False
                raise
            self.shared = True

    def _save_config(self) -> None:
        if self.folder is not None and self.trainer.is_global_zero:
            self.parser.save(self.config, str(self.folder.config), skip_none=False, overwrite=True)

    # -- running -------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train, and return the exit code."""
        assert self.folder is not None
        if self.config.ckpt_path is not None:  # a resumed run uses its own folder on purpose
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        code = run_to_end(self._fit, self.trainer, self.folder.path, self._how_to_go_on)
        # Of the first process: Lightning kills it if another one ends with a code.
        return EXIT_COLLAPSED if code == 0 and self._collapsed and self.trainer.is_global_zero else code

    @property
    def _collapsed(self) -> bool:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, CollapseGuard) and callback.stopped for callback in callbacks)

    def _fit(self) -> None:
        assert self.folder is not None
        self.before_fit()
        self.trainer.fit(self.model, datamodule=self.datamodule, **self._run_arguments)
        if not self._collapsed:
            self.after_fit()
        elif self.trainer.is_global_zero:
            print(f"opdlab: training has collapsed and was stopped; see {self.folder.results}", file=sys.stderr)

    def _how_to_go_on(self) -> str:
        folder = self.model.evaluator.folder
        samples = "" if folder is None else f", the samples so far are in {folder.path}"
        if self.stop.path is not None and self.command == "fit":
            ended = "" if self.trainer.state.fn == TrainerFn.FITTING else " in the evaluation after training"
            saved = f"{ended} at step {self.trainer.global_step}, saved {self.stop.path}"
            given = self.config.ckpt_path is not None and self.stop.path == Path(self.config.ckpt_path)
            return f"{saved}; to go on, run the same command{'' if given else ' with --ckpt_path last'}"
        return f"{samples}; to go on, run the same command"

    def evaluate(self) -> int:
        """Evaluate, and return the exit code. After a signal or a kill, the same command takes up the samples."""
        root = Path(self.config.trainer.default_root_dir)
        return run_to_end(self._evaluate_alone, self.trainer, root, self._how_to_go_on)

    def _evaluate_alone(self) -> None:
        run = self.trainer.test if self.command == "test" else self.trainer.validate
        run(self.model, datamodule=self.datamodule, verbose=False, **self._run_arguments)
        if self.trainer.is_global_zero:
            self.table.print(trained=False)
            if (folder := self.model.evaluator.folder) is not None:
                print(f"samples and {RESULTS}: {folder.path}")

    @property
    def _run_arguments(self) -> dict[str, Any]:
        return {key: self.config_init[key] for key in RUN_KEYS}

    # -- before and after ----------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Evaluate the untrained student, unless the run resumes from a checkpoint, which holds these results."""
        # Report invalid training problems before an evaluation that may take long.
        self.datamodule.prepare(self.model.student.tokenizer, training=True)
        reuse, trainer = self.datamodule.reuse, self.trainer
        reuse.check_prompts(len(self.datamodule.train_prompts or ()))
        reuse.check(self.model.sampling.num_samples, trainer.accumulate_grad_batches, trainer.world_size)
        self.model.check_context(self.datamodule)
        self.accepted = True
        if not self.resumes:
            self._save_config()
        config = with_seeds(self.config).as_dict()
        try:  # a logger makes its folder only now
            log_hyperparameters(self.trainer, self.model, config, self.datamodule.benchmark_sources)
        except OSError as error:
            if full_disk(error) is not None:
                raise
            raise UsageError(f"trainer.logger cannot write, give another save_dir: {first_line(error)}") from error
        if self.config.ckpt_path is None and self._has_benchmarks:
            self._evaluate("val", self.model.student)

    def after_fit(self) -> None:
        """Evaluate the trained student and the teacher, print the table and the next commands."""
        if self._has_benchmarks:
            if not self.table.is_new or self.table.after_step != self.trainer.global_step:
                self._evaluate("val", self.model.student)
            if self.model.evaluator.config.teacher:
                for name, model in self.model.teacher.models():
                    column = f"{TEACHER}-{name}" if name else TEACHER
                    if column not in self.table.teachers:
                        self._evaluate(column, model)
        if self.trainer.is_global_zero and self.folder is not None:
            self.table.print()
            print(f"run folder: {self.folder.path}")
            if any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers):
                print(f"look closer: tensorboard --logdir {shlex.quote(self.trainer.default_root_dir)}")
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SampleLogger) and callback.index.exists():
                    print(f"read the rollouts: {callback.index}")

    def _evaluate(self, name: str, model: LanguageModel) -> None:
        with self.model.evaluating(name, model, f"{name}-step-{self.trainer.global_step}"):
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    @property
    def _has_benchmarks(self) -> bool:
        return bool(self.datamodule.benchmark_sources)
