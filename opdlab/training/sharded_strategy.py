"""The strategy ``model_parallel``: Lightning's, with the weights sharded over all processes by FSDP2."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from opdlab.errors import require
from opdlab.policies.sharding import sharded_like, whole_state, whole_tree

NAME = "model_parallel"
"""The strategy's name."""


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` without tensor parallelism, with the checkpoints of one process.

    :meth:`opdlab.module.OPDModule.configure_model` shards the weights. A checkpoint is one file: the first process
    gathers weights and optimizer state in host memory and writes them, as a run on one process or with ``ddp`` does, so
    either can resume it, on any number of processes. Each process takes its parts of what it reads.

    Args:
        process_group_backend: torch's name of the library that connects the processes; null for the device's default.
        timeout: of an exchange between them.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Return False: the weights are sharded before, in ``configure_model``."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return True: optimizers are restored as with other strategies."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes, all of which share the weights."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, in the first process."""
        assert self.lightning_module is not None
        return whole_state(self.lightning_module, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state of an optimizer, in the first process."""
        state: dict[str, Any] = whole_tree(optimizer.state_dict(), keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint's content; each process reads the file."""
        content: dict[str, Any] = ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this process's parts of the weights into the module."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict(keep_vars=True)
        saved = checkpoint["state_dict"]
        parts = {name: sharded_like(value, own[name]) if name in own else value for name, value in saved.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer this process's parts of its state.

        Raises:
            UsageError: an optimizer has a state of another shape than its parameter.
        """
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _part(value, parameters[number], optimizer) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _part(value: Any, parameter: torch.Tensor, optimizer: Optimizer) -> Any:
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return value
    require(
        value.shape == parameter.shape,
        f"model.optimizer is {type(optimizer).__name__}, which keeps a state of shape {tuple(value.shape)} of a weight "
        f"of shape {tuple(parameter.shape)}: with trainer.strategy model_parallel such a run cannot be resumed; take "
        "another optimizer, for example torch.optim.AdamW, or the strategy ddp",
    )
    return sharded_like(value, parameter)


# Lightning 2.6 has no name for its own class.
StrategyRegistry.register(NAME, ShardedStrategy, "weights sharded over all processes by FSDP2", override=True)


def check_strategy(name: str) -> None:
    """Raise a UsageError if a strategy is not supported; the message names one that is.

    Args:
        name: of the strategy, its class or its class path.

    Example:
        >>> check_strategy("ddp")
        >>> check_strategy("deepspeed_stage_3")
        Traceback (most recent call last):
        opdlab.errors.UsageError: trainer.strategy is deepspeed_stage_3, which opdlab does not support: take ...
    """
    plain = name.rpartition(".")[2].lower()
    others = ("fsdp", "deepspeed", ModelParallelStrategy.__name__.lower())
    require(
        not plain.startswith(others),
        f"trainer.strategy is {name}, which opdlab does not support: take {NAME}, which shards weights, gradients and "
        "optimizer states over all processes with FSDP2, without tensor parallelism, or ddp",
    )
