"""Options of ``opdlab fit | validate | test`` that follow from others where the user gave none: folders and seeds."""

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from opdlab.run_folder import RunFolder, fit_samples_folder, samples_folder_for
from opdlab.seeds import evaluation_seed

_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def fill_evaluation(config: Namespace, root: Path) -> None:
    """Set the options of ``opdlab validate | test``: checkpoints, samples and seed of the evaluation.

    Args:
        config: is changed.
        root: ``trainer.default_root_dir``.
    """
    evaluation = config.model.evaluation
    config.trainer.logger = False if config.trainer.logger is None else config.trainer.logger
    if config.ckpt_path is not None and config.checkpoint.dirpath is None:
        config.checkpoint.dirpath = str(Path(config.ckpt_path).absolute().parent)
    evaluation.seed = evaluation_seed(evaluation.seed, config.ckpt_path)
    if evaluation.samples is None:
        student = config.get("model.student.init_args.path") or "student"
        evaluation.samples = samples_folder_for(student, config.ckpt_path, root)
    if not evaluation.reverse_kl:
        # Avoids reading the teacher's weights.
        config.model.teacher = {"class_path": "opdlab.evaluation.NoTeacher"}


def fill_fit(config: Namespace, root: Path, folder: RunFolder) -> None:
    """Set the options of ``opdlab fit`` that name places in the run's folder: samples, checkpoints, loggers.

    Args:
        config: is changed.
        root: ``trainer.default_root_dir``.
        folder: of the run.
    """
    config.model.evaluation.samples = str(fit_samples_folder(config.model.evaluation.samples, folder.path))
    if not config.data.benchmarks:
        config.trainer.limit_val_batches = 0  # otherwise Lightning warns that the list of loaders is empty
    if config.checkpoint.dirpath is None:
        config.checkpoint.dirpath = str(folder.checkpoints.absolute())
    if config.trainer.logger in (None, True):
        arguments = {"save_dir": str(root), "name": "", "version": folder.path.name}
        config.trainer.logger = {"class_path": _TENSORBOARD, "init_args": arguments}
    for logger in config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]:
        _keep_in(folder, logger)


def _keep_in(folder: RunFolder, logger: Any) -> None:
    """Let a logger write into the run's folder unless the user gave it a folder: fill in an unset ``save_dir``."""
    if not isinstance(logger, dict | Namespace) or "class_path" not in logger:
        return
    module, _, name = logger["class_path"].rpartition(".")
    default = signature(getattr(import_module(module), name)).parameters.get("save_dir")
    arguments = logger.get("init_args") or {}
    if default is not None and default.default is not default.empty and arguments.get("save_dir") == default.default:
        arguments["save_dir"] = str(folder.path / Path(default.default or "."))
        logger["init_args"] = arguments
