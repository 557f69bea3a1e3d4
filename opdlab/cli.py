"""The command line: ``opdlab fit | validate | test`` (a LightningCLI), ``opdlab gates | estimate | study``.

Everything a user can get wrong ends in one line on standard error and exit code 2.
"""

import json
import logging
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus

from opdlab.callbacks import EvaluationTable, LabProgressBar, SampleLogger, StopCheckpoint
from opdlab.cli_checks import CALLBACKS, check_config, warn_of_idle_recorder
from opdlab.cli_config import CONFIG_MODE, expand_arguments
from opdlab.cli_errors import explain, root_usage_error
from opdlab.cli_estimate import print_estimate, refuse_oversized
from opdlab.cli_hparams import log_hyperparameters
from opdlab.cli_replay import replay
from opdlab.cli_study import study_command
from opdlab.data import PromptDataModule
from opdlab.errors import Stopped, UsageError, exit_code
from opdlab.gating import gate_registry
from opdlab.module import OPDModule
from opdlab.packages import package_trouble
from opdlab.policies import LanguageModel, LocalTeacher
from opdlab.records import RESULTS
from opdlab.run_folder import check_checkpoint, find_checkpoint, fit_samples_folder, run_folder_for, samples_folder_for

EXIT_USAGE = 2
_ABOUT = (
    "Gated on-policy distillation of language models. Besides the subcommands below: `opdlab gates` lists the gates, "
    "`opdlab estimate` takes what fit takes and says what it needs in memory, `opdlab study` compares variants, "
    "`opdlab replay RUN` compares gates on recorded steps."
)


class _SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder; other subcommands have no such folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class OPDCLI(LightningCLI):
    """LightningCLI with the lab's callbacks, run folders, and an evaluation before and after training."""

    datamodule: PromptDataModule
    model: OPDModule

    def __init__(self) -> None:
        self.table = EvaluationTable()
        self.resumed_step = 0
        self.stop = StopCheckpoint()
        options = {"parser_mode": CONFIG_MODE, "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            OPDModule,
            PromptDataModule,
            seed_everything_default=0,
            save_config_callback=_SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs=dict.fromkeys(("fit", "validate", "test"), options) | options | {"description": _ABOUT},
            trainer_defaults={"callbacks": [self.table], "max_epochs": -1},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Predicting makes no sense here: samples are written by validation, which prints our table."""
        names = {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}
        return {name: skip if name == "fit" else skip | {"verbose"} for name, skip in names.items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Each callback has its own section of the configuration."""
        for section, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, section)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_argument(
            "--check_memory", type=bool, default=True, help="Refuse models whose weights alone exceed the device."
        )
        parser.add_argument("--save_pools", type=bool, default=False, help="Record steps for `opdlab replay`.")
        parser.link_arguments("save_pools", "pool_recorder.enabled")
        parser.set_defaults(
            {
                "checkpoint.every_n_train_steps": 50,
                "checkpoint.filename": "step-{step}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and say in one line what is wrong, with the nearest key."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            defaults = self._subcommand_parsers["fit"].get_defaults()
            raise UsageError(explain(error, defaults.keys(branches=True))) from error
        config = self.config[self.config.subcommand]
        config.trainer.default_root_dir = str(config.trainer.default_root_dir or "runs")
        if config.ckpt_path is not None:
            # Now, because LightningCLI looks into the checkpoint next.
            path = find_checkpoint(config.ckpt_path, Path(config.trainer.default_root_dir))
            self.resumed_step = check_checkpoint(path)
            config.ckpt_path = str(path)

    def instantiate_classes(self) -> None:
        """Build everything, but first see what can be refused at once, and whether the models' weights can fit.

        Say what a constructor refused, not that no type of a union accepts it, which is how jsonargparse puts it.
        """
        if self.subcommand == "fit":
            plain = self.config.fit.as_dict()
            check_config(plain)
            warn_of_idle_recorder(plain)
        if self.subcommand == "fit" and self.config.fit.check_memory:
            refuse_oversized(self.config.fit)
        try:
            super().instantiate_classes()
        except (ValueError, ImportError) as error:
            raise root_usage_error(error, self.config[self.subcommand].as_dict()) from error

    def after_instantiate_classes(self) -> None:
        """Find out now, not after the first evaluation, whether pools can be cut into batches."""
        self.trainer.callbacks.append(self.stop)  # type: ignore[attr-defined] # last: it looks at what others saved
        self.datamodule.check_reuse(self.model.sampling.num_samples, self.trainer.accumulate_grad_batches)

    # -- the run's folder ----------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Settle where the run lives: ``ROOT/version_N`` holds its events, configuration, checkpoints and student."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir)
        if config.weights_only is None:
            config.weights_only = True  # checkpoints hold only tensors and plain values
        if config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(LabProgressBar())
        evaluation = config.model.evaluation
        if self.subcommand != "fit":
            config.trainer.logger = False if config.trainer.logger is None else config.trainer.logger
            if config.ckpt_path is not None and config.checkpoint.dirpath is None:
                config.checkpoint.dirpath = str(Path(config.ckpt_path).absolute().parent)
            if evaluation.samples is None:
                student = config.get("model.student.init_args.path") or "student"
                evaluation.samples = samples_folder_for(student, config.ckpt_path, root)
            if not evaluation.reverse_kl:
                # So that the teacher's weights are not even read.
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
        # What a killed run logged after its checkpoint comes again. Of the checkpoint's own step there may be figures
        # which do not: those that were logged before it was written.
        purge = {"dict_kwargs": {"purge_step": self.resumed_step + 1}} if resumed else {}
        arguments = {"save_dir": str(root), "name": "", "version": version}
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": arguments, **purge}

    def fit(self, model: OPDModule, **kwargs: Any) -> None:
        """Train. Lightning turns Ctrl-C into an exit of its own; ours says how to go on."""
        if kwargs.get("ckpt_path"):  # a run goes on in its own folder on purpose
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            self.trainer.fit(model, **kwargs)
        except SystemExit as error:
            if self.stop.path is None:
                raise
            stopped = f"stopped at step {self.trainer.global_step}, saved {self.stop.path}"
            raise _InterruptedError(stopped, " with --ckpt_path last", exit_code(error.__context__)) from error

    # -- before and after ----------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Evaluate the untrained student, unless the run goes on from a checkpoint, which remembers."""
        # Whatever is wrong with the training problems is said before that, which may take long.
        self.datamodule.prepare(self.model.student.tokenizer, training=True)
        self.datamodule.reuse.check_prompts(len(self.datamodule.train_prompts or ()), self.trainer.world_size)
        log_hyperparameters(self.trainer, self.model, self.config.fit.as_dict(), self.datamodule.benchmark_sources)
        if self.config.fit.ckpt_path is None and self._has_benchmarks:
            self._evaluate("val", self.model.student)

    def after_fit(self) -> None:
        """Evaluate the trained student and the teacher, print the table, and say how to look closer."""
        if self._has_benchmarks:
            if self.table.after_step != self.trainer.global_step:
                self._evaluate("val", self.model.student)
            teacher = self.model.teacher
            if isinstance(teacher, LocalTeacher) and self.model.evaluator.config.teacher and not self.table.teacher:
                self._evaluate("teacher", teacher.model)
        run_folder = self.trainer.log_dir  # asks all processes, so outside the branch below
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

    def validate(self, model: OPDModule, **kwargs: Any) -> None:
        """Evaluate. After Ctrl-C as after a kill, the same command goes on."""
        try:
            getattr(self.trainer, str(self.subcommand))(model, verbose=False, **kwargs)
        except SystemExit as error:
            folder = model.evaluator.folder
            if self.trainer.state.status != TrainerStatus.INTERRUPTED or folder is None:
                raise
            kept = f"stopped, the samples so far are in {folder.path}"
            raise _InterruptedError(kept, "", exit_code(error.__context__)) from error

    test = validate

    def after_validate(self) -> None:
        """Print the table, and say where the samples are."""
        if self.trainer.is_global_zero:
            self.table.print(trained=False)
            if (folder := self.model.evaluator.folder) is not None:
                print(f"samples and {RESULTS}: {folder.path}")

    after_test = after_validate

    @property
    def _has_benchmarks(self) -> bool:
        return bool(self.datamodule.benchmark_sources)


class _EstimateCLI(OPDCLI):
    """Parses what ``fit`` takes, prints the estimate, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        check_config(self.config.fit.as_dict())
        print_estimate(self.config.fit)

    def instantiate_classes(self) -> None:
        """Nothing: models would be loaded."""

    def after_instantiate_classes(self) -> None:
        self.subcommand = None  # nothing is run


class _ParseCLI(OPDCLI):
    """Parses what ``fit`` takes, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing: no folder is made."""

    def instantiate_classes(self) -> None:
        """Nothing: models would be loaded."""

    def after_instantiate_classes(self) -> None:
        self.subcommand = None  # nothing is run


class FitParser:
    """The parser of ``opdlab fit``, for many configurations: it is made once, since that takes longer than to parse."""

    def __init__(self) -> None:
        self._cli: _ParseCLI | None = None

    def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the configuration that ``opdlab fit`` makes of ``arguments``, checked, as plain values."""
        before, arguments = sys.argv, ["fit", *expand_arguments(arguments)]
        try:
            sys.argv = [before[0], *([] if self._cli else arguments)]
            if self._cli is None:
                self._cli = _ParseCLI()
            else:
                self._cli.parse_arguments(self._cli.parser, arguments)
        finally:
            sys.argv = before
        config: dict[str, Any] = json.loads(json.dumps(self._cli.config.fit.as_dict(), default=str))
        check_config(config)
        return config


class _BuildCLI(OPDCLI):
    """Parses what ``fit`` takes and builds model and data, but no trainer."""

    def instantiate_classes(self) -> None:
        if self.config.fit.check_memory:
            refuse_oversized(self.config.fit)
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except (ValueError, ImportError) as error:
            raise root_usage_error(error, self.config.fit.as_dict()) from error
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def before_instantiate_classes(self) -> None:
        """Nothing: there is no run's folder to settle."""

    def after_instantiate_classes(self) -> None:
        self.subcommand = None  # nothing is run


def _build(arguments: Sequence[str]) -> tuple[Any, OPDModule, PromptDataModule]:
    sys.argv = [sys.argv[0], *expand_arguments(["fit", *arguments])]
    built = _BuildCLI()
    return built.config.fit, built.model, built.datamodule


def list_gates() -> None:
    """Print every registered gate with the first line of its documentation."""
    registry = gate_registry()
    width = max(map(len, registry.names()))
    for name in registry.names():
        lines = (registry.get(name).__doc__ or "").strip().splitlines()
        print(f"{name:{width}}  {lines[0] if lines else ''}")


def _run(arguments: Sequence[str]) -> int:
    if list(arguments[:1]) == ["gates"]:
        list_gates()
        return 0
    if list(arguments[:1]) == ["study"]:
        return study_command(arguments[1:], FitParser())
    if list(arguments[:1]) == ["replay"]:
        replay(arguments[1:], _build)
        return 0
    program, cli = sys.argv[0], OPDCLI
    if list(arguments[:1]) == ["estimate"]:
        cli, arguments = _EstimateCLI, ["fit", *arguments[1:]]
    # LightningCLI reads sys.argv; handing it arguments instead makes it warn.
    sys.argv = [program, *expand_arguments(arguments)]
    cli()
    return 0


class _InterruptedError(Exception):
    """A signal stopped something that can go on.

    Args:
        kept: what is on disk.
        needs: what the command needs to go on from there.
        code: of the exit.
    """

    def __init__(self, kept: str, needs: str, code: int) -> None:
        super().__init__(kept, needs, code)
        self.kept, self.needs, self.code = kept, needs, code


def _terminate(signum: int, frame: FrameType | None) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return  # Lightning tells the other processes, and all end together
    raise Stopped(signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; those of the process by default.
    """
    # A gate of one's own in the current folder is found by class_path, as it is with `python -m`.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    # Under SLURM Lightning lets SIGTERM pass, and queues the job again.
    ours = threading.current_thread() is threading.main_thread() and not SLURMEnvironment.detect()
    # Lightning calls this besides its own, which only takes a note that no evaluation looks at.
    before = signal.signal(signal.SIGTERM, _terminate) if ours else None
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except (UsageError, MisconfigurationException, ArgumentError) as error:
        print(f"opdlab: error: {explain(error)}", file=sys.stderr)
        return EXIT_USAGE
    except ImportError as error:
        if (trouble := package_trouble(error)) is None:
            raise
        print(f"opdlab: error: opdlab {trouble}", file=sys.stderr)
        return EXIT_USAGE
    except _InterruptedError as stop:
        print(f"opdlab: {stop.kept}; to go on, run the same command{stop.needs}", file=sys.stderr)
        return stop.code
    except (KeyboardInterrupt, SystemExit) as stop:
        signalled = stop if isinstance(stop, KeyboardInterrupt) else stop.__context__
        if not isinstance(signalled, KeyboardInterrupt):  # `--help`
            raise
        print("opdlab: stopped", file=sys.stderr)
        return exit_code(signalled)
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def console() -> None:
    """Entry point of the ``opdlab`` command."""
    # Lightning warns that the behavior snapshot is in eval mode, which it is on purpose, and uses a name that torch
    # has renamed; neither is the user's business. Nor is its advertisement of a logger.
    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    advert = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advert.addFilter(lambda record: "litlogger" not in record.getMessage())
    # Python's own form names a file and quotes a line of it.
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    raise SystemExit(main())


if __name__ == "__main__":
    raise SystemExit("run `opdlab` or `python -m opdlab`: as __main__, subclasses of third parties fail to match")
