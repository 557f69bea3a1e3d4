"""Checks of the strategy in a resolved configuration, before models are loaded."""

import os
import warnings

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import StrategyRegistry

from opdlab.cli.configured_models import (
    configured_engine,
    configured_teacher,
    has_adapter,
    is_own_teacher,
    plugin_options,
)
from opdlab.devices import devices_per_node
from opdlab.errors import UsageError, require
from opdlab.policies.engines.weights import check_merging
from opdlab.registry import suggestion
from opdlab.training.checks import BY_SHARDING, check_overlap, check_sharded, refuse_kept_teacher
from opdlab.training.sharded_strategy import NAME, ShardedStrategy, check_strategy


def num_processes(config: Namespace) -> int | None:
    """Return the number of processes of a run; None if it depends on the machine, or ``trainer.devices`` is wrong."""
    devices = devices_per_node(config.trainer.devices)
    return None if devices is None else devices * int(config.trainer.num_nodes) or None


def check_launcher(config: Namespace) -> None:
    """Refuse a run of one process that torchrun or SLURM has started several times, or of another number of processes.

    Raises:
        UsageError: naming the options that make the numbers equal.
    """
    launched, processes = _launched(), num_processes(config)
    if launched is None or processes in (None, launched[1]):
        return
    name, count, each = launched
    raise UsageError(
        f"trainer.devices is {config.trainer.devices} and trainer.num_nodes is {config.trainer.num_nodes}, but {name} "
        f"has started {count} processes, {each} on a machine: give --trainer.devices {each} and --trainer.num_nodes "
        f"{count // each}"
    )


def _launched() -> tuple[str, int, int] | None:
    """Return what has started the processes of the run, their number, and that of a machine; None if it is not known.

    A script that sbatch has started, and no srun, is one process, whatever number of tasks the job has.
    """
    given = os.environ
    if TorchElasticEnvironment.detect():
        count = int(given.get("WORLD_SIZE", "1"))
        return "torchrun", count, int(given.get("LOCAL_WORLD_SIZE", count))
    with warnings.catch_warnings():  # Lightning's own trainer gives them again
        warnings.simplefilter("ignore")
        if not SLURMEnvironment.detect():
            return None
    of_job = given["SLURM_NTASKS"] if given.get("SLURM_PROCID", "0") != "0" else ""
    count = int(given.get("SLURM_STEP_NUM_TASKS") or of_job or 0)
    machines = int(given.get("SLURM_STEP_NUM_NODES") or given.get("SLURM_NNODES") or 1)
    return ("srun", count, -(-count // machines)) if count else None


def shards_weights(config: Namespace) -> bool:
    """True if the strategy shards the weights over the processes."""
    name = _name_of(config)
    return name == NAME or name.endswith(f".{ShardedStrategy.__name__}")


def copies_gradients(config: Namespace) -> bool:
    """True if the strategy of several processes keeps a copy of all gradients, in the buckets that it averages."""
    strategy = config.trainer.strategy
    given = {} if isinstance(strategy, str) else strategy.as_dict()
    options = {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}
    return not shards_weights(config) and not options.get("gradient_as_bucket_view")


def _name_of(config: Namespace) -> str:
    return str(getattr(config.trainer.strategy, "class_path", config.trainer.strategy))


def check_sharding(config: Namespace) -> None:
    """Refuse a strategy that is not supported, and options that do not go with sharded weights or with overlap.

    Raises:
        UsageError: naming the key, and what to take instead.
    """
    check_strategy(_name_of(config))
    given, known = config.trainer.strategy, ("auto", *StrategyRegistry.available_strategies())
    if isinstance(given, str) and "." not in given:
        mend = suggestion(given, ("auto", "ddp", NAME)) or ";"
        require(given in known, f"trainer.strategy is {given}, which does not exist{mend} give auto, ddp or {NAME}")
    processes = num_processes(config) or 1
    require(
        processes == 1 or given != "single_device",
        f"trainer.strategy is single_device, but trainer.devices and trainer.num_nodes make {processes} processes: use "
        "auto or ddp, or one device",
    )
    if config.data.reuse.overlap:
        compiles = bool(plugin_options(config.model.student).get("compile"))
        check_overlap(sharded=shards_weights(config), compiles=compiles)
    if not shards_weights(config):
        return
    model = config.model
    options = {"max_tokens_per_pass": model.max_tokens_per_pass, "behavior.offload": model.behavior.offload}
    for role, section in (("student", model.student), ("teacher", configured_teacher(config))):
        options |= {f"{role}.{name}": value for name, value in plugin_options(section).items()}
    check_sharded(options, config.trainer.precision)
    require(
        not config.get("save_pools"),
        f"save_pools is true, but {BY_SHARDING}, and none has whole ones to record: set it to false, or take the "
        "strategy ddp",
    )
    if configured_engine(config) is not None:
        check_merging(adapter=has_adapter(config), sharded=True)
    if is_own_teacher(config):
        refuse_kept_teacher("SelfTeacher")
