"""What ``opdlab estimate`` counts for a sampler with an engine of its own."""

import os
from typing import Any

import torch

from opdlab.cli.configured_models import configured_engine, plugin_options
from opdlab.cli.memory_table import Estimate, Share
from opdlab.estimate import ModelSize
from opdlab.policies import VLLMServerSampler

_SHARE, _MERGED = "vLLM's share", "merged weights for vLLM"


def add_engine(result: Estimate, config: Any, student: ModelSize, on_cpu: bool) -> list[str] | None:
    """Add what an engine keeps in all phases, and return the parts it has while it samples; None without an engine.

    Args:
        result: with the parts of all phases.
        config: parsed configuration.
        student: its size.
        on_cpu: the run uses a CPU, where vLLM takes a cache of ``VLLM_CPU_KVCACHE_SPACE`` and never sleeps.
    """
    if (kind := configured_engine(config)) is None:
        return None
    parts = []
    if student.has_adapter:
        size = student.parameters * student.widths.weights
        result.parts[_MERGED] = size, f"{student.widths.weights} bytes each, while they are handed over"
        parts.append(_MERGED)
    if kind is VLLMServerSampler:
        return parts
    options = plugin_options(config.model.sampler)
    dtype, share = options["dtype"], float(options["gpu_memory_utilization"])
    width = student.widths.weights if dtype == "auto" else getattr(torch, dtype).itemsize
    weights = student.parameters * width, f"{width} bytes each"
    if on_cpu:
        space = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
        own = {"vLLM's weights": weights, "vLLM's cache": (space << 30, "VLLM_CPU_KVCACHE_SPACE")}
        result.parts |= own
        result.resident += own
        return parts
    said, option = "gpu_memory_utilization: its weights and its cache", "model.sampler.gpu_memory_utilization"
    result.shares[_SHARE] = Share(share, said, weights[0], option)
    if not options["sleep_level"]:
        result.resident.append(_SHARE)
    elif options["sleep_level"] == 1:
        result.host["vLLM's weights"] = weights[0], f"{weights[1]}, while it sleeps"
    return [*parts, _SHARE]
