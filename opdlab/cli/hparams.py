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

from opdlab.aliases import nested
from opdlab.gating import DriftGate, GateStrategy, gate_registry
from opdlab.module import OPDModule
from opdlab.objectives.base import objective_registry
from opdlab.policies import AdapterConfig

Value = int | float | str
_SCHEDULE = "gate.tau_schedule"
# Columns shown by default; the user can select others in the tab.
_SHOWN = ("gate", "gate.tau", "objective", "lr", "reuse.epochs")
# Keys of the configuration, by the name of their column.
_KEYS = {
    "optimizer": "model.optimizer.class_path",
    "lr_scheduler": "model.lr_scheduler.class_path",
    "refresh.every_n_steps": "behavior_refresh.every_n_steps",
    "reduction": "model.reduction",
    "max_steps": "trainer.max_steps",
    "accumulate": "trainer.accumulate_grad_batches",
    "clip": "trainer.gradient_clip_val",
    "precision": "trainer.precision",
    "student": "model.student.init_args.path",
    "teacher": "model.teacher.init_args.path",
    "seed": "seed_everything",
    "data.seed": "data.seed",
    "evaluation.seed": "model.evaluation.seed",
}
# Sections all of whose keys are columns, by the prefix of their names.
_SECTIONS = {
    "gate": "model.gate.init_args",
    "objective": "model.objective.init_args",
    "optimizer": "model.optimizer.init_args",
    "reuse": "data.reuse",
    "sampling": "model.sampling",
    "adapter": "model.student.init_args.adapter",
}


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
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(values)
            continue
        # TensorBoard takes the columns from the first run that it reads in a folder, so all runs must declare the same
        # ones: the options of adapters and of every registered gate and objective, not only those of the run.
        types = _known_options() | {name: _type(value) for name, value in values.items()}
        # TensorBoard shows the first five columns that are declared to differ.
        columns = [HParamInfo(name=name, type=kind, differs=name in _SHOWN) for name, kind in types.items()]
        metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in metric_tags(module, benchmarks)]
        declared = HParamsPluginData(experiment=Experiment(hparam_infos=columns, metric_infos=metrics))
        experiment, start, _ = hparams(values, {})  # type: ignore[no-untyped-call]
        experiment.value[0].metadata.plugin_data.content = create_summary_metadata(declared).plugin_data.content
        for summary in (experiment, start):  # no end, because the outcome of the run is not known yet
            logger.experiment._get_file_writer().add_summary(summary)


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
    gate, objective = module.gate, module.objective
    values: dict[str, Any] = {
        "gate": gate_registry().name_of(type(gate)) or type(gate).__name__,
        "objective": objective_registry().name_of(type(objective)) or type(objective).__name__,
    }
    for column, key in _KEYS.items():
        section, last = nested(config, key)
        value = section.get(last)
        values[column] = value.rpartition(".")[2] if last == "class_path" and value else value
    for prefix, key in _SECTIONS.items():
        section, last = nested(config, key)
        values |= {f"{prefix}.{name}": value for name, value in (section.get(last) or {}).items()}
    values["lr"] = values.pop("optimizer.lr", None)
    values["precision"] = values["precision"] or "32-true"
    values["teacher"] = values["teacher"] or type(module.teacher).__name__
    values["gate.normalization"] = gate.normalization.name
    if isinstance(tau := values.get("gate.tau"), Mapping):
        settings = ", ".join(f"{name}={value}" for name, value in (tau.get("init_args") or {}).items())
        values |= {"gate.tau": None, _SCHEDULE: f"{tau['class_path'].rpartition('.')[2]}({settings})"}
    for prefix, unused in (("gate", gate.unused_options), ("objective", objective.unused_options)):
        for name in unused:
            values.pop(f"{prefix}.{name}", None)
    return {
        name: value if isinstance(value, int | float | str) else str(value)
        for name, value in values.items()
        # Omit the many switches of torch's optimizers that are off.
        if value is not None and not (value is False and name.startswith("optimizer."))
    }


def _known_options() -> dict[str, Any]:
    """Return the types of the options of adapters and of every registered gate and objective, by column."""
    gates, objectives = gate_registry(), objective_registry()
    classes: list[tuple[str, type]] = [("gate", GateStrategy), ("gate", DriftGate), ("adapter", AdapterConfig)]
    classes += [("gate", gates.get(name)) for name in gates.names()]
    classes += [("objective", objectives.get(name)) for name in objectives.names()]
    return {_SCHEDULE: DATA_TYPE_STRING} | {
        f"{prefix}.{option.name}": _type(option.default)
        for prefix, cls in classes
        for option in inspect.signature(cls).parameters.values()
        if option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
    }


def _type(value: Any) -> Any:
    return DATA_TYPE_FLOAT64 if isinstance(value, int | float) else DATA_TYPE_STRING
