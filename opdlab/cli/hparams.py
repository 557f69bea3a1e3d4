"""Hyperparameters of a run, for TensorBoard's HParams tab and for other loggers."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.api_pb2 import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.metadata import create_summary_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from opdlab.gating import DriftGate, GateStrategy, gate_registry
from opdlab.module import OPDModule
from opdlab.objectives.base import objective_registry
from opdlab.policies import AdapterConfig
from opdlab.registry import Registry

Value = int | float | str
_SCHEDULE = "tau_schedule"
# Columns shown by default; the user can select others in the tab.
_SHOWN = ("gate", "gate.tau", "objective", "lr", "reuse.epochs")


def log_hyperparameters(
    trainer: Trainer, module: OPDModule, config: Mapping[str, Any], benchmarks: Iterable[str]
) -> None:
    """Write the hyperparameters of a run before anything else is logged.

    TensorBoard shows them in its HParams tab, one row per run folder, next to the newest logged pass@k. For a resumed
    run it keeps the values that were written first.

    Args:
        trainer: trainer with the loggers.
        module: the trained module.
        config: configuration of ``fit``, as plain values.
        benchmarks: names of the benchmarks.
    """
    if not trainer.is_global_zero:
        return
    values = hyperparameters(module, config)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            experiment, start, _ = hparams(values, {})  # type: ignore[no-untyped-call]
            declared = HParamsPluginData(experiment=_experiment(values, metric_tags(module, benchmarks)))
            experiment.value[0].metadata.plugin_data.content = create_summary_metadata(declared).plugin_data.content
            for summary in (experiment, start):  # no end, because the outcome of the run is not known yet
                logger.experiment._get_file_writer().add_summary(summary)
        else:
            logger.log_hyperparams(values)


def metric_tags(module: OPDModule, benchmarks: Iterable[str]) -> list[str]:
    """Return the tags of the main metrics: pass@k for the largest k and for 1, the mean over the benchmarks first."""
    pass_at = module.evaluator.config.pass_at
    ks = sorted({max(pass_at), min(pass_at)}, reverse=True)
    return [f"val/{name}/pass@{k}" for name in ("mean", *benchmarks) for k in ks]


def hyperparameters(module: OPDModule, config: Mapping[str, Any]) -> dict[str, Value]:
    """Return a flat dict of hyperparameters; options that are not set are left out.

    Args:
        module: the trained module.
        config: configuration of ``fit``, as plain values.
    """
    model, trainer, data = config["model"], config["trainer"], config["data"]
    optimizer = _options(model["optimizer"])
    values: dict[str, Any] = {
        "gate": _name(gate_registry(), module.gate),
        **_prefixed("gate", _gate_options(module.gate, model["gate"])),
        "objective": _name(objective_registry(), module.objective),
        **_prefixed("objective", _options(model["objective"])),
        "lr": optimizer.pop("lr", None),
        "optimizer": _class_name(model["optimizer"]),
        # Omit the many switches of torch's optimizers that are off.
        **_prefixed("optimizer", {key: value for key, value in optimizer.items() if value is not False}),
        "lr_scheduler": _class_name(model["lr_scheduler"]),
        **_prefixed("reuse", data["reuse"]),
        "refresh.every_n_steps": config["behavior_refresh"]["every_n_steps"],
        **_prefixed("sampling", model["sampling"]),
        "reduction": model["reduction"],
        "max_steps": trainer["max_steps"],
        "accumulate": trainer["accumulate_grad_batches"],
        "clip": trainer["gradient_clip_val"],
        "precision": trainer["precision"] or "32-true",
        "student": _options(model["student"]).get("path"),
        **_prefixed("adapter", _options(model["student"]).get("adapter")),
        "teacher": _options(model["teacher"]).get("path") or _class_name(model["teacher"]),
        "seed": config["seed_everything"],
        "data.seed": data["seed"],
        "evaluation.seed": model["evaluation"]["seed"],
    }
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _prefixed(prefix: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in (options or {}).items()}


def _plain(value: Any) -> Value:
    return value if isinstance(value, int | float | str) else str(value)


def _name(registry: Registry[Any], instance: object) -> str:
    return registry.name_of(type(instance)) or type(instance).__name__


def _class_name(config: Any) -> str | None:
    return str(config["class_path"]).rpartition(".")[2] if isinstance(config, Mapping) else None


def _options(config: Any) -> dict[str, Any]:
    return dict(config.get("init_args") or {}) if isinstance(config, Mapping) else {}


def _gate_options(gate: GateStrategy, config: Any) -> dict[str, Any]:
    """Return the options that have an effect; a schedule of tau gets its own column."""
    options = {**_options(config), "normalization": gate.normalization.name}
    options = {name: value for name, value in options.items() if name not in gate.unused_options}
    if (name := _class_name(options.get("tau"))) is not None:
        settings = ", ".join(f"{key}={value}" for key, value in _options(options.pop("tau")).items())
        options[_SCHEDULE] = f"{name}({settings})"
    return options


def _experiment(values: Mapping[str, Value], tags: Iterable[str]) -> Experiment:
    """Return the columns of the tab.

    TensorBoard takes the columns from the first run that it reads in a folder, so all runs must declare the same ones:
    the options of adapters and of every registered gate and objective, not only those of the run.
    """
    types = _known_options() | {name: _type(value) for name, value in values.items()}
    # TensorBoard shows the first five columns that are declared to differ.
    columns = [HParamInfo(name=name, type=kind, differs=name in _SHOWN) for name, kind in types.items()]
    return Experiment(hparam_infos=columns, metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in tags])


def _known_options() -> dict[str, Any]:
    gates, objectives = gate_registry(), objective_registry()
    classes: list[tuple[str, type]] = [("gate", GateStrategy), ("gate", DriftGate), ("adapter", AdapterConfig)]
    classes += [("gate", gates.get(name)) for name in gates.names()]
    classes += [("objective", objectives.get(name)) for name in objectives.names()]
    return {f"gate.{_SCHEDULE}": DATA_TYPE_STRING} | {
        f"{prefix}.{option.name}": _type(option.default)
        for prefix, cls in classes
        for option in inspect.signature(cls).parameters.values()
        if option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
    }


def _type(value: Any) -> Any:
    return DATA_TYPE_FLOAT64 if isinstance(value, int | float) else DATA_TYPE_STRING
