"""Checks of a resolved configuration that need no model, to fail before long work."""

import inspect
import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from opdlab.callbacks import BehaviorRefresh, GateMonitor, HFExport, PoolRecorder, SampleLogger
from opdlab.cli.building import build, under
from opdlab.data import PromptDataModule
from opdlab.data.cleaning import CleaningConfig
from opdlab.errors import UsageError, first_line, require, user_line
from opdlab.evaluation.config import EvaluationConfig
from opdlab.policies import SamplingConfig
from opdlab.rollouts import ReuseConfig
from opdlab.training.checks import check_token_bound

# Each callback has its own section of the configuration.
CALLBACKS: Mapping[str, type[Callback]] = {
    "behavior_refresh": BehaviorRefresh,
    "gate_monitor": GateMonitor,
    "sample_logger": SampleLogger,
    "pool_recorder": PoolRecorder,
    "export": HFExport,
}


# Built from plain values, so they need no model.
_SECTIONS: Mapping[str, Any] = {
    "model.sampling": SamplingConfig,
    "model.eval_sampling": SamplingConfig,
    "model.evaluation": EvaluationConfig,
    "data.reuse": ReuseConfig,
    "data.clean": CleaningConfig,
    **CALLBACKS,
    "checkpoint": ModelCheckpoint,
}

# Options of the trainer whose values Lightning takes, though it fails on them later: the smallest one, and the fix.
_LEAST = {
    "min_steps": (0, "leave it out"),
    "check_val_every_n_epoch": (1, "use null to count micro-batches through the whole run"),
    "num_sanity_val_steps": (-1, "use 0 for none"),
    "log_every_n_steps": (1, "use a larger number to log less"),
    "gradient_clip_val": (0, "use null for no clipping"),
    "accumulate_grad_batches": (1, "use 1 for none"),
    "limit_train_batches": (0, "leave it out for all"),
}
# The hardware that every machine has.
_ANY_MACHINE = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "num_nodes": 1, "precision": None}


def check_config(parser: ArgumentParser, config: Namespace) -> None:
    """Build the cheap parts of a run, to fail before models are loaded.

    Args:
        parser: parser of ``opdlab fit``.
        config: its parsed configuration.

    Raises:
        UsageError: a value is out of range, or values are inconsistent.
    """
    parts = {}
    for key, cls in _SECTIONS.items():
        options = config[key].as_dict()
        with under(key, options):
            try:
                parts[key] = cls(**options)
            except MisconfigurationException as error:
                raise UsageError(f"{key} cannot be built, change its keys: {first_line(error)}") from error
    parts["model.evaluation"].check(parts["model.eval_sampling"])
    reuse = parts["data.reuse"]
    reuse.check(parts["model.sampling"].num_samples, config.trainer.accumulate_grad_batches)
    with under("model", config.model):
        check_token_bound(config.model.max_tokens_per_pass)
    with under("data", config.data):
        # Sources are not built, because they may read files.
        PromptDataModule(**{**config.data.as_dict(), "reuse": reuse, "clean": parts["data.clean"]})
    plugins = Namespace()  # type: ignore[no-untyped-call]
    for key in ("model.gate", "model.objective", "model.optimizer", "model.lr_scheduler"):
        plugins[key] = config[key]
    require(config.model.optimizer is not None, "model.optimizer is null, but must be the path of a class")
    built = build(parser, plugins, groups=False).model
    check_optimizer(built.optimizer, built.lr_scheduler)
    seed = config.seed_everything
    require(
        isinstance(seed, bool) or 0 <= seed < 1 << 32,
        f"seed_everything is {seed}, but must lie between 0 and {(1 << 32) - 1}",
    )
    check_trainer(config)


def check_optimizer(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Build an optimizer and a schedule for one parameter, to refuse their options before models are loaded."""
    key = "model.optimizer"
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
        key = "model.lr_scheduler"
        if lr_scheduler is not None:
            lr_scheduler(made)
    except Exception as error:  # of a library, or of the user's own class
        where = f" or {line}" if (line := user_line(error)) is not None else ""
        raise UsageError(f"{key} cannot be built, change its init_args{where}: {first_line(error)}") from error


def check_trainer(config: Namespace, *, here: bool = False) -> None:
    """Build a trainer from the plain options, to refuse them before models are loaded.

    Args:
        config: configuration of ``opdlab fit``.
        here: also refuse devices that this machine lacks. A study may be checked on a machine other than those that run
            it, and an estimate is for any device.

    Raises:
        UsageError: an option is invalid.
    """
    options = {key: value for key, value in config.trainer.as_dict().items() if not isinstance(value, dict)}
    for key, (least, fix) in _LEAST.items():
        value = options[key]
        require(value is None or value >= least, f"trainer.{key} is {value}, but must be at least {least}: {fix}")
    interval = options["val_check_interval"]
    require(interval != 0, "trainer.val_check_interval is 0, but must be above 0: leave it out to validate at the end")
    options |= {"logger": False, "callbacks": None, "plugins": None, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "enable_checkpointing": False}
    devices = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    refused: Exception | None = None
    for attempt in [options] if here else [options, options | _ANY_MACHINE]:
        devices.disabled = True  # the run's own trainer names the devices
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Trainer(**attempt)
            return
        except (MisconfigurationException, ImportError) as error:
            refused = error  # the device or its package may be missing here alone
        except (ValueError, TypeError, RuntimeError) as error:
            refused = error
            break
        finally:
            devices.disabled = False
    text = " ".join(str(refused).split())[:200].rstrip(".")
    places = {key: match.start() for key in options if (match := re.search(rf"\b{key}\b", text))}
    by_value = (key for key, value in options.items() if isinstance(value, str) and f"'{value}'" in text)
    key = min(places, key=places.__getitem__, default=next(by_value, "accelerator"))
    said = f"trainer.{key} is {options[key]}: {text}; `opdlab fit --help` lists what it takes"
    raise UsageError(said) from refused


def warn_of_idle_recorder(config: Namespace) -> None:
    """Warn if options of the recorder are set but recording is off.

    Args:
        config: configuration of ``opdlab fit``.
    """
    defaults = inspect.signature(PoolRecorder).parameters
    options = {key: value for key, value in config.pool_recorder.as_dict().items() if key != "enabled"}
    idle = [f"pool_recorder.{key} is {value}" for key, value in options.items() if value != defaults[key].default]
    if idle and not config.save_pools:
        rank_zero_warn(
            f"{' and '.join(idle)}, but save_pools is false, so nothing is recorded: give --save_pools true too"
        )
