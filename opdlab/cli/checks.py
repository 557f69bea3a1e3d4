"""Checks of a resolved configuration that need no model, to fail before long work."""

import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from opdlab.callbacks import (
    BehaviorRefresh,
    CollapseGuard,
    GateMonitor,
    HFExport,
    PoolRecorder,
    RunCheckpoint,
    SampleLogger,
)
from opdlab.callbacks.run_checkpoint import EVALUATED
from opdlab.cli.building import build, sections, under, with_seeds
from opdlab.cli.configured_models import configured_engine, configured_teacher
from opdlab.cli.sharding_checks import check_sharding, num_processes
from opdlab.data import PromptDataModule
from opdlab.data.cleaning import CleaningConfig
from opdlab.devices import devices_per_node
from opdlab.errors import UsageError, first_line, require, user_line
from opdlab.evaluation.benchmark_metrics import metric_names
from opdlab.evaluation.config import EvaluationConfig
from opdlab.files import below, expanded
from opdlab.module import OPDModule
from opdlab.parser_messages import types_in_words
from opdlab.policies import SamplingConfig, TransformersSampler
from opdlab.policies.engines.requests import check_temperature
from opdlab.policies.loading import resolve
from opdlab.rollouts import DemonstrationConfig, ReuseConfig
from opdlab.training.checks import check_token_bound, check_verdicts
from opdlab.training.resume import check_before_models, plain_settings
from opdlab.training.sampler_gap import check_correction

# Each callback has its own section of the configuration.
CALLBACKS: Mapping[str, type[Callback]] = {
    "behavior_refresh": BehaviorRefresh,
    "gate_monitor": GateMonitor,
    "sample_logger": SampleLogger,
    "pool_recorder": PoolRecorder,
    "collapse_guard": CollapseGuard,
    "export": HFExport,
}


# Built from plain values, so they need no model.
_SECTIONS: Mapping[str, Any] = {
    "model.sampling": SamplingConfig,
    "model.eval_sampling": SamplingConfig,
    "model.evaluation": EvaluationConfig,
    "data.reuse": ReuseConfig,
    "data.demonstrations": DemonstrationConfig,
    "data.clean": CleaningConfig,
    **CALLBACKS,
    "checkpoint": RunCheckpoint,
}

# Classes that the configuration names and that load nothing when they are built.
_PLUGINS = tuple(f"model.{name}" for name in ("gate", "objective", "sampler", "optimizer", "lr_scheduler"))

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
_MOST_DEVICES = 4096  # Lightning makes a list of them
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
    check_nulls(config)
    parts = {}
    for key, cls in _SECTIONS.items():
        options = config[key].as_dict()
        with under(key, options):
            try:
                parts[key] = cls(**options)
            except MisconfigurationException as error:
                raise UsageError(f"{key} cannot be built, change its keys: {first_line(error)}") from error
    parts["model.evaluation"].check(parts["model.eval_sampling"])
    if not config.trainer.callbacks:  # which may log metrics of their own
        names = metric_names(
            config.data.benchmarks or (), parts["model.evaluation"], parts["model.eval_sampling"].num_samples
        )
        parts["checkpoint"].check_metric(f"{EVALUATED}{name}" for name in names)
    reuse = parts["data.reuse"]
    sizes = parts["model.sampling"].num_samples, config.trainer.accumulate_grad_batches
    reuse.check(*sizes)
    with under("model", config.model):
        check_token_bound(config.model.max_tokens_per_pass)
    with under("data", config.data):
        # Sources are not built, because they may read files.
        made = {name: parts[f"data.{name}"] for name in ("reuse", "demonstrations", "clean")}
        PromptDataModule(**{**config.data.as_dict(), **made})
    made["demonstrations"].check(reuse.prompts_per_pool * parts["model.sampling"].num_samples)
    plugins = Namespace()  # type: ignore[no-untyped-call]
    for key in (*_PLUGINS, "data.train"):
        plugins[key] = config[key]
    if not plugins.data.train.class_path.startswith("opdlab."):
        del plugins["data"]  # the source of another package may read its files when it is built
    if str(configured_teacher(config).class_path).endswith(".ServedTeacher"):  # loads nothing before it is bound
        plugins["model.teacher"] = config.model.teacher
    built = build(parser, plugins, groups=False).model
    # Whether the problems have a verifier is known once they are read.
    check_verdicts(built.objective, True, sizes[0], made["demonstrations"].share, reuse.prompts_per_pool)
    with under("model", config.model):
        check_correction(config.model.sampler_correction, built.sampler or TransformersSampler())
    for key in ("model.sampling", "model.eval_sampling") if configured_engine(config) is not None else ():
        with under(key, config[key]):
            check_temperature(parts[key].temperature)
    check_optimizer(built.optimizer, built.lr_scheduler, config)
    check_trainer(config)
    reuse.check(*sizes, num_processes(config) or 1)


def check_nulls(config: Namespace) -> None:
    """Refuse null for options whose type has no null, which the parser takes for all; and NaN for all options.

    Raises:
        UsageError: an option is null or NaN.
    """
    plain = config.as_dict()
    for key in ("check_memory", "save_pools"):
        require(plain[key] is not None, f"{key} is null, but must be true or false")
    known = {"trainer": Trainer, "model": OPDModule, "data": PromptDataModule, **_SECTIONS}
    for key, section in sections(plain):
        cls, options = known.get(key), section
        if "class_path" in section:
            module, _, name = section["class_path"].rpartition(".")
            cls, options = getattr(sys.modules.get(module), name, None), section.get("init_args") or {}
        for name, value in options.items():
            kind = _type_without_null(cls, name) if value is None and isinstance(cls, type) else None
            require(kind is None, f"{key}.{name} is null, but must be {kind}")
            require(value == value, f"{key}.{name} is nan, but must be a number")  # NaN equals nothing


@functools.cache
def _type_without_null(cls: type, name: str) -> str | None:
    """Return what belongs to an option of a class, in words; None if it may be null, or its type is unknown."""
    for base in cls.__mro__:
        made = inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}  # type: ignore[misc]
        if name not in made:
            continue
        with suppress(NameError, TypeError):
            kind = get_type_hints(base.__init__).get(name, Any)  # type: ignore[misc]
            kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            if made[name].default is not None and not {Any, object, type(None)} & set(kinds):
                return types_in_words(", ".join(map(repr, kinds)))
        return None
    return None


def check_resume(parser: ArgumentParser, config: Namespace, checkpoint: Mapping[str, Any]) -> None:
    """Refuse settings that differ from a checkpoint's and may not, as far as no model is needed to know it.

    Args:
        parser: parser of ``opdlab fit``.
        config: its parsed configuration.
        checkpoint: what the checkpoint says of its run; it is only compared, nothing is built from it.

    Raises:
        UsageError: a setting differs that may not change there, or the run ends before the checkpoint.
    """
    described = Namespace()  # type: ignore[no-untyped-call]
    for key in ("model.objective", "model.optimizer", "model.lr_scheduler"):
        described[key] = config[key]
    built = build(parser, described, groups=False).model
    made = check_optimizer(built.optimizer, built.lr_scheduler, config)
    settings = plain_settings(
        SamplingConfig(**config.model.sampling.as_dict()), config.model.mask_first, built.objective, *made
    )
    settings["run"]["data.seed"] = with_seeds(config).data.seed
    settings["run"]["data.max_prompt_tokens"] = config.data.max_prompt_tokens
    settings["buffer"]["data.reuse.prompts_per_pool"] = config.data.reuse.prompts_per_pool
    trainer = config.trainer
    check_before_models(checkpoint, settings, config.data.reuse.batch_size, (trainer.max_steps, trainer.max_epochs))


def check_optimizer(
    optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None, config: Namespace
) -> tuple[torch.optim.Optimizer, Any | None]:
    """Return an optimizer and a schedule for one parameter, to refuse their options before models are loaded."""
    key = "model.optimizer"
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
        key = "model.lr_scheduler"
        return made, None if lr_scheduler is None else lr_scheduler(made)
    except Exception as error:  # of a library, or of the user's own class
        keys = f"init_args ({', '.join(config[key].as_dict().get('init_args') or {})})"
        where = f" or {line}" if (line := user_line(error)) is not None else ""
        raise UsageError(f"{key} cannot be built, change its {keys}{where}: {first_line(error)}") from error


def check_trainer(config: Namespace, *, here: bool = False) -> None:
    """Build a trainer from the plain options, to refuse them before models are loaded.

    Args:
        config: configuration of ``opdlab fit``.
        here: also refuse devices that this machine lacks. A study may be checked on a machine other than those that run
            it, and an estimate is for any device.

    Raises:
        UsageError: an option is invalid.
    """
    check_sharding(config)
    options = {key: value for key, value in config.trainer.as_dict().items() if not isinstance(value, dict)}
    for key, (least, fix) in _LEAST.items():
        value = options[key]
        require(value is None or value >= least, f"trainer.{key} is {value}, but must be at least {least}: {fix}")
    devices = str(options["devices"])
    most = f"must be at most {_MOST_DEVICES}: give the number of devices of each node"
    require(not devices.isdigit() or int(devices) <= _MOST_DEVICES, f"trainer.devices is {devices}, but {most}")
    kinds = "must be a number from 1 on, a list of devices, -1 for all, or auto"
    known = devices in ("auto", "-1") or devices_per_node(options["devices"]) is not None
    require(known, f"trainer.devices is {devices}, but {kinds}")
    interval = options["val_check_interval"]
    require(interval != 0, "trainer.val_check_interval is 0, but must be above 0: leave it out to validate at the end")
    error = _trainer_error(options)
    if isinstance(error, MisconfigurationException | ImportError) and not here:
        error = _trainer_error(options | _ANY_MACHINE)  # the device or its package may be missing here alone
    if error is None:
        return
    text = " ".join(str(error).split())[:200].rstrip(".")
    places = {key: match.start() for key in options if (match := re.search(rf"\b{key}\b", text))}
    written = text.replace("-", "_")
    by_value = (key for key, v in options.items() if isinstance(v, str) and v.replace("-", "_") in written)
    key = min(places, key=places.__getitem__, default=next(by_value, "accelerator"))
    said = f"trainer.{key} is {options[key]}: {text}; `opdlab fit --help` lists what it takes"
    raise UsageError(said) from error


def _trainer_error(options: Mapping[str, Any]) -> Exception | None:
    """Return why Lightning refuses the options of a trainer, or None. Nothing is printed, and no file is made."""
    quiet = {"logger": False, "callbacks": None, "plugins": None, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "enable_checkpointing": False}
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # the run's own trainer names the devices
    rank_zero.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(**{**options, **quiet})
    except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        return error
    finally:
        rank_zero.disabled = False
    return None


def check_files(config: Mapping[str, Any]) -> None:
    """Refuse problems whose file is missing on this machine, before models are loaded.

    Args:
        config: of ``opdlab fit``, as plain values.

    Raises:
        UsageError: a file does not exist, or is a folder where only a file can be read.
    """
    kinds = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
    for key, section in sections(config):
        path = (section.get("init_args") or {}).get("path")
        if isinstance(path, str) and str(section.get("class_path")).startswith("opdlab.data."):
            lines = "Jsonl" in section["class_path"]
            local = path.startswith((".", "/", "~")) or path.endswith(kinds) or lines
            file = expanded(path, f"{key}.path")
            place = f"this file does not exist{below(file)}"
            require(not local or file.exists(), f"{key}.path is {path}, but {place}: give the path of one that does")
            folder = lines and file.is_dir()
            require(not folder, f"{key}.path is {path}, which is a folder: give the path of a JSON Lines file")


def check_model_folders(config: Mapping[str, Any]) -> None:
    """Refuse models whose folder is missing on this machine, where none is about to be loaded.

    Args:
        config: of ``opdlab fit``, as plain values.

    Raises:
        UsageError: a folder does not exist.
    """
    for _, section in sections(config):
        path = (section.get("init_args") or {}).get("path")
        if isinstance(path, str) and str(section.get("class_path")).endswith((".LanguageModel", ".LocalTeacher")):
            resolve(path, with_config=False)


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
