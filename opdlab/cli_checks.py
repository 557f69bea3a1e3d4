"""What of a resolved configuration can be checked without a model, so before anything takes long."""

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.cli import instantiate_class
from lightning.pytorch.utilities import rank_zero_warn

from opdlab.callbacks import BehaviorRefresh, GateMonitor, HFExport, PoolRecorder, SampleLogger
from opdlab.data import PromptDataModule
from opdlab.data.cleaning import CleaningConfig
from opdlab.errors import UsageError
from opdlab.evaluation.config import EvaluationConfig
from opdlab.policies import SamplingConfig
from opdlab.rollouts import ReuseConfig
from opdlab.training.checks import check_token_bound

# Each has its own section of the configuration.
CALLBACKS: Mapping[str, type[Callback]] = {
    "behavior_refresh": BehaviorRefresh,
    "gate_monitor": GateMonitor,
    "sample_logger": SampleLogger,
    "pool_recorder": PoolRecorder,
    "export": HFExport,
}


def check_config(config: Mapping[str, Any]) -> None:
    """Build what is cheap to build of a run, and refuse values that the models would be loaded for in vain.

    Args:
        config: what ``opdlab fit`` parses, as plain values.

    Raises:
        UsageError: a value is out of range, or some do not fit together.
    """
    model, data = config["model"], config["data"]
    sampling, reuse = SamplingConfig(**model["sampling"]), ReuseConfig(**data["reuse"])
    EvaluationConfig(**model["evaluation"]).check(SamplingConfig(**model["eval_sampling"]))
    reuse.check(sampling.num_samples, config["trainer"]["accumulate_grad_batches"])
    check_token_bound(model["max_tokens_per_pass"])
    # Its sources, which may read files, are left as they are written.
    PromptDataModule(**{**data, "reuse": reuse, "clean": CleaningConfig(**data["clean"])})
    for section, cls in CALLBACKS.items():
        cls(**config[section])
    for part in ("gate", "objective"):
        try:
            build_plugin(model[part])
        except UsageError:
            raise
        except (TypeError, ValueError, AttributeError):  # one with options of types that only the parser makes
            continue


def build_plugin(written: Any) -> Any:
    """Build what is written as ``class_path`` and ``init_args``, and what stands so in its options.

    Example:
        >>> tau = {"class_path": "opdlab.tau.LinearTau", "init_args": {"end": 2.0}}
        >>> build_plugin({"class_path": "opdlab.strategies.TokenGate", "init_args": {"tau": tau}}).tau
        LinearTau(start=0.0, end=2.0, num_steps=100)
    """
    if isinstance(written, list):
        return [build_plugin(each) for each in written]
    if not isinstance(written, dict):
        return written
    if "class_path" not in written:
        return {key: build_plugin(value) for key, value in written.items()}
    options = {**(written.get("init_args") or {}), **(written.get("dict_kwargs") or {})}
    return instantiate_class((), {"class_path": written["class_path"], "init_args": build_plugin(options)})


def warn_of_idle_recorder(config: Mapping[str, Any]) -> None:
    """Say that options of the recorder are set, and nothing is recorded.

    Args:
        config: what ``opdlab fit`` parses, as plain values.
    """
    defaults = inspect.signature(PoolRecorder).parameters
    options = {key: value for key, value in config["pool_recorder"].items() if key != "enabled"}
    idle = [f"pool_recorder.{key} is {value}" for key, value in options.items() if value != defaults[key].default]
    if idle and not config["save_pools"]:
        rank_zero_warn(
            f"{' and '.join(idle)}, but save_pools is false, so nothing is recorded: give --save_pools true too"
        )
