"""Parts of ``gpu.py`` beside a run in one process: vLLM in this process, weights sharded by FSDP2, packed rows."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from common import REPOSITORY
from gpu_models import Plan
from gpu_phases import Trained, measure_student, phase_row, random_prompts, save_models, synchronize
from torch import distributed

sys.path.insert(0, str(REPOSITORY))

from opdlab.policies import LanguageModel, SamplingConfig, VLLMSampler
from opdlab.progress import SilentProgress
from opdlab.seeds import derive_streams

SHARDED_STUDENT = "Qwen3-1.7B"
_SHARE = 0.5  # of the GPU, for vLLM


def _missing(*modules: str) -> str | None:
    """Return that a package is not installed, or None."""
    return next((f"{name} is not installed" for name in modules if importlib.util.find_spec(name) is None), None)


# -- vLLM --------------------------------------------------------------------------------------------------------------


def measure_engine(plan: Plan, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure vLLM beside a student in this process: its start, sampling, sleep, and the hand-over of weights.

    A refresh hands the weights over and compares a probe; after a sleep it also wakes the engine.
    """
    if (reason := _missing("vllm")) is not None:
        return {"skipped": reason}
    rows, length = plan.engine_sampled
    model = LanguageModel(plan.engine.save(folder, torch.bfloat16, device), "bfloat16").to(device)
    sampler = VLLMSampler(_SHARE, max_model_len=plan.prompt + length + 32)
    sampler.setup(model)
    prompts = random_prompts(model, rows, plan.prompt)
    streams = derive_streams("rollouts", 0, keys=range(rows), num_samples=1)
    config, found = SamplingConfig(max_new_tokens=length), {}

    def seconds(work: Callable[[], Any]) -> float:
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - began

    def sample() -> int:
        return int(sampler.sample(prompts, streams, config, SilentProgress()).mask.sum())

    found["start_seconds"] = seconds(lambda: sampler.refresh(model, 0))
    tokens = sample()  # warms up
    found["sample_tokens_per_second"] = tokens / seconds(sample)
    found["refresh_seconds"] = seconds(lambda: sampler.refresh(model, 1))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    found["sleep_seconds"] = seconds(sampler.release)
    found["freed_bytes"] = torch.cuda.mem_get_info(device)[0] - free if device.type == "cuda" else 0
    found["wake_and_refresh_seconds"] = seconds(lambda: sampler.refresh(model, 2))
    return {"responses": rows, "tokens": tokens, **found}


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def measure_sharded(plan: Plan, folder: Path, device: torch.device, dtype: str) -> dict[str, Any]:
    """Measure the phases of a run whose weights are sharded over the processes that torch's variables name.

    Args:
        plan: shapes.
        folder: of all processes.
        device: cuda or cpu.
        dtype: of the student's weights.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=120))
    try:
        if distributed.get_rank() == 0:
            save_models(plan, SHARDED_STUDENT, folder, device, dtype)
        distributed.barrier()
        count = distributed.get_world_size()
        mesh = distributed.device_mesh.init_device_mesh(device.type, (count,))
        plan = replace(plan, lengths=plan.sharded_lengths)
        return {"processes": count, **measure_student(plan, SHARDED_STUDENT, folder, device, dtype, mesh)}
    finally:
        distributed.destroy_process_group()


# -- packing -----------------------------------------------------------------------------------------------------------


def measure_packing(plan: Plan, folder: Path, device: torch.device) -> dict[str, Any]:
    """Measure an update of a micro-batch of responses of different lengths: with padding, and packed end to end."""
    path = plan.engine.save(folder, torch.bfloat16, device)
    rows: dict[str, dict[str, Any]] = {}
    for attention in ("sdpa", "flash_attention_2"):
        if attention != "sdpa" and (reason := _no_flash(device)) is not None:
            rows[attention] = {"phase": attention, "tokens": sum(plan.packed), "skipped": reason}
            continue
        trained = Trained(plan, path, plan.engine.vocab_size, device, "bfloat16", attn_implementation=attention)
        rollouts = trained.response(*plan.packed).to(device)
        targets = trained.targets(rollouts)
        rows[attention] = phase_row(
            attention,
            sum(plan.packed),
            lambda trained=trained, rollouts=rollouts, targets=targets: trained.update(rollouts, targets),
            device,
        )
    return {"lengths": list(plan.packed), "rows": list(rows.values())}


def _no_flash(device: torch.device) -> str | None:
    """Return why rows cannot be packed, or None."""
    if (reason := _missing("flash_attn")) is not None:
        return f"{reason}, and sdpa would mask other rows, not skip them: rows are padded"
    return None if device.type == "cuda" else "flash attention needs a GPU"
