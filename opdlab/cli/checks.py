"""Checks of a resolved configuration that need no model, to fail before long work."""

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from opdlab.callbacks import BehaviorRefresh, CollapseGuard, GateMonitor, HFExport, PoolRecorder, SampleLogger
from opdlab.cli.building import build, under
from opdlab.data import PromptDataModule
from opdlab.data.cleaning import CleaningConfig
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
    "collapse_guard": CollapseGuard,
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
}


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
            parts[key] = cls(**options)
    parts["model.evaluation"].check(parts["model.eval_sampling"])
    reuse = parts["data.reuse"]
    reuse.check(parts["model.sampling"].num_samples, config.trainer.accumulate_grad_batches)
    with under("model", config.model):
        check_token_bound(config.model.max_tokens_per_pass)
    with under("data", config.data):
        # Sources are not built, because they may read files.
        PromptDataModule(**{**config.data.as_dict(), "reuse": reuse, "clean": parts["data.clean"]})
    plugins = Namespace()  # type: ignore[no-untyped-call]
    for key in ("model.gate", "model.objective"):
        plugins[key] = config[key]
    build(parser, plugins, groups=False)


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
