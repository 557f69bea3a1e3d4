"""Servers of the real vLLM for the tests, and the models that they serve."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlab.policies import LanguageModel, SamplingConfig, VLLMServerSampler, sample_rollouts
from opdlab.seeds import derive_streams
from opdlab.toy import chain_tokenizer
from opdlab.types import Rollouts

_START_SECONDS = 600  # compiling included


def tiny(folder: Path, seed: int, hidden_size: int = 64) -> Path:
    """Write a tiny Qwen3 whose output layer is its embedding; vLLM takes heads of 32 and more."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = Qwen3Config(
        vocab_size=38,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.15,
        **sizes,
        **heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    chain_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Start vLLM's server, in a group of processes that is killed at the end, and yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-logprobs", "64", *options]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, env={**os.environ, **settings}, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    ends = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text()[-4000:]
        with suppress(OSError), urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            assert json.loads(answer.read())["data"]
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def taken(
    sampler: Any, model: LanguageModel, prompts: list[list[int]], seed: int = 0, refresh: bool = True, **options: Any
) -> Rollouts:
    """Sample, and let the model score, as a behavior policy does."""
    config = SamplingConfig(**options)
    if refresh:
        sampler.refresh(model, seed)
    streams = derive_streams("rollouts", seed, keys=range(len(prompts)), num_samples=config.num_samples)
    rollouts = sample_rollouts(sampler, model, prompts, streams, config)
    for rows, scored in model.score_in_chunks(rollouts, 16):
        rollouts.behavior_logprobs[rows] = scored.padded(scored.statistics().logprobs)
    return rollouts


@contextmanager
def served(model: LanguageModel, path: Path, folder: Path, *options: str) -> Iterator[VLLMServerSampler]:
    with server(path, folder / "log", "--max-model-len", "512", *options) as url:
        sampler = VLLMServerSampler(url, folder=str(folder / "weights"), timeout=600.0)
        sampler.setup(model)
        yield sampler


def said(line: str) -> None:
    print(f"\nfigure: {line}")
