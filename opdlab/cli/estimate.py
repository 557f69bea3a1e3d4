"""``opdlab estimate``: the memory of a run by part and by phase, compared with the device."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from opdlab.cli.configured_models import configured_models
from opdlab.cli.memory_parts import estimate, offloaded
from opdlab.cli.memory_table import DeviceMemory, gib
from opdlab.cli.parsing import parse_fit
from opdlab.errors import UsageError, require


def estimate_command(arguments: Sequence[str]) -> int:
    """Run ``opdlab estimate``: print the table, compare it with the device of ``opdlab fit``, return the exit code.

    Raises:
        UsageError: an argument is invalid, or a model's configuration cannot be read.
    """
    config = parse_fit(arguments, "estimate")
    models = dict(configured_models(config))
    result = estimate(config, models)
    Console().print(result.table())
    print("left out: the device's own context, fragmentation, short-lived results")
    accelerator = config.trainer.accelerator
    if (device := device_memory(accelerator)) is None:
        return 0
    if device.is_host:
        if options := list(offloaded(config, models)):
            line = f"{' and '.join(options)} {'have' if len(options) > 1 else 'has'} no effect on a CPU"
            if accelerator != "cpu":
                line += (
                    ": the table is for a GPU; this machine has none, so in what follows the weights are there in "
                    "every phase, as in the table with --trainer.accelerator cpu"
                )
            print(line)
        result = estimate(config, models, on_cpu=True)
    print(result.verdict(device))
    return 0


def refuse_oversized(config: Any) -> None:
    """Raise :class:`UsageError` if the weights cannot fit the device; an uncertain case passes.

    Raises:
        UsageError: a model's weights alone are larger than the device's memory.
    """
    device = device_memory(config.trainer.accelerator)
    if device is None or not str(config.trainer.strategy).startswith(("auto", "ddp", "single_device")):
        return
    try:
        models = dict(configured_models(config))
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            raise  # loading would wait for the hub again, and fail too
        return
    for role, model in models.items():
        require(
            model.bytes <= device.total,
            f"model.{role} '{model.path}' has {gib(model.bytes)} GiB of weights, and {device.name} has only "
            f"{gib(device.total)} GiB: choose a smaller model or a narrower dtype; `opdlab estimate` shows all parts, "
            "and --check_memory false tries anyway",
        )


def device_memory(accelerator: str) -> DeviceMemory | None:
    """Return the memory of the device selected by ``trainer.accelerator``; None if unknown."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(torch.cuda.get_device_name(), total, free)
    if accelerator not in ("auto", "cpu") or torch.backends.mps.is_available():
        return None
    meminfo = Path("/proc/meminfo")  # Linux only
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", meminfo.read_text(), re.MULTILINE)) if meminfo.is_file() else {}
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return None
    return DeviceMemory("this machine", int(sizes["MemTotal"]) << 10, int(sizes["MemAvailable"]) << 10, True)
