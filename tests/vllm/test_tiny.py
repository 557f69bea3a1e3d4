"""The real vLLM with tiny models: samples, weights and scores are those of the code here."""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.errors import UsageError
from opdlab.policies import (
    EngineSampler,
    LanguageModel,
    LocalTeacher,
    ServedTeacher,
    TeacherRequest,
    TransformersSampler,
    VLLMSampler,
    VLLMServerSampler,
)
from opdlab.policies.engines import weights
from opdlab.policies.engines.requests import EngineRequest
from tests.policies.test_sampler import chi_square, next_token_probabilities
from tests.vllm.engines import server, taken, tiny

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 12, 3]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with server(tiny(folder / "model", seed=8), folder / "log", "--max-model-len", "128", "--enforce-eager") as started:
        yield started


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(str(tiny(tmp_path_factory.mktemp("student"), seed=3))).eval()


@pytest.fixture(scope="module", params=["vllm", "vllm_server"])
def sampler(
    request: pytest.FixtureRequest, student: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> EngineSampler:
    made: EngineSampler
    if request.param == "vllm":
        made = VLLMSampler(max_model_len=128, enforce_eager=True)
    else:
        folder = tmp_path_factory.mktemp("weights")
        made = VLLMServerSampler(request.getfixturevalue("url"), folder=str(folder), timeout=120.0)
    made.setup(student)
    return made


def changed(model: LanguageModel, by: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


def test_the_likeliest_tokens_are_those_of_the_loop_here(sampler: EngineSampler, student: LanguageModel) -> None:
    temperature = 0.01
    options: dict[str, Any] = {"num_samples": 2, "temperature": temperature, "max_new_tokens": 24}
    ours = taken(TransformersSampler(), student, PROMPTS, **options)
    theirs = taken(sampler, student, PROMPTS, **options)
    same = 0
    for row in range(len(ours.tokens)):
        mine, other = (rollouts.tokens[row][rollouts.mask[row]].tolist() for rollouts in (ours, theirs))
        first = next((place for place, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if first is None:
            assert mine == other
            assert ours.stop_reasons[row] == theirs.stop_reasons[row]
            same += 1
            continue
        # Two tokens that are nearly as likely as each other: at this temperature either may be drawn.
        chances = next_token_probabilities(student, PROMPTS[row // 2] + mine[:first], 1.0).log()
        assert abs(chances[mine[first]] - chances[other[first]]) < 10 * temperature
    assert same >= 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_models_probabilities(
    sampler: EngineSampler, student: LanguageModel, temperature: float
) -> None:
    options: dict[str, Any] = {"num_samples": 800, "max_new_tokens": 1, "temperature": temperature}
    counts = taken(sampler, student, [PROMPTS[0]], **options).tokens[:, 0].bincount(minlength=38).double()
    assert chi_square(counts, next_token_probabilities(student, PROMPTS[0], temperature)) < 2
    assert chi_square(counts, torch.full((38,), 1 / 38, dtype=torch.float64)) > 4


def test_a_stream_gives_the_same_response_in_any_batch(sampler: EngineSampler, student: LanguageModel) -> None:
    options: dict[str, Any] = {"num_samples": 6, "max_new_tokens": 32}
    whole = taken(sampler, student, PROMPTS, **options)
    again = taken(sampler, student, PROMPTS, **options)
    few = taken(sampler, student, PROMPTS, refresh=False, **{**options, "num_samples": 2})
    assert torch.equal(again.tokens, whole.tokens)
    kept = torch.tensor([0, 1, 6, 7, 12, 13])
    width = few.tokens.shape[1]
    assert torch.equal(few.tokens, whole.tokens[kept, :width])
    assert len({tuple(row) for row in whole.tokens.tolist()}) > 12


def test_each_refresh_brings_new_weights(sampler: EngineSampler, student: LanguageModel) -> None:
    for step in range(3):
        changed(student, 0.02)
        rollouts = taken(sampler, student, PROMPTS, seed=step, num_samples=4, max_new_tokens=16)
        assert rollouts.sampler_logprobs is not None
        assert float((rollouts.sampler_logprobs - rollouts.behavior_logprobs).abs().max()) < 1e-3


def test_log_probabilities_at_another_temperature(sampler: EngineSampler, student: LanguageModel) -> None:
    rollouts = taken(sampler, student, PROMPTS, num_samples=4, max_new_tokens=16, temperature=0.6)
    if isinstance(sampler, VLLMServerSampler):  # raw log-probabilities are vLLM's default
        assert rollouts.sampler_logprobs is None
        return
    assert rollouts.sampler_logprobs is not None
    assert float((rollouts.sampler_logprobs - rollouts.behavior_logprobs).abs().max()) < 1e-3


def test_a_reload_without_the_output_layer_is_found(
    sampler: EngineSampler, student: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.refresh(student, 0)
    changed(student, 0.05)

    def forgetful(model: LanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, value) for name, value in whole(model) if name != "lm_head.weight")

    def without_head(model: LanguageModel, folder: Path) -> bool:
        model.save(folder)
        return True

    whole = weights.named_weights
    monkeypatch.setattr("opdlab.policies.engines.vllm_sampler.named_weights", forgetful)
    monkeypatch.setattr("opdlab.policies.engines.server_sampler.write_weights", without_head)
    with pytest.raises(UsageError, match="gives the tokens of a probe other log-probabilities"):
        sampler.refresh(student, 1)
    monkeypatch.undo()
    changed(student, 0.01)
    sampler.refresh(student, 2)


def test_a_served_teacher_is_the_local_one(tmp_path: Path, student: LanguageModel) -> None:
    folder = tiny(tmp_path / "teacher", seed=5, hidden_size=96)
    rollouts = taken(TransformersSampler(), student, PROMPTS, num_samples=2, max_new_tokens=16)
    request = TeacherRequest(top_k=8, tail=True)
    with server(folder, tmp_path / "log", "--max-model-len", "128", "--enforce-eager") as url:
        served = ServedTeacher(url, timeout=120.0)
        served.bind(student)
        ours = served.score(rollouts, request)
    theirs = LocalTeacher(str(folder)).score(rollouts, request)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-3, rtol=1e-3)
    assert ours.support_ids is not None
    assert theirs.support_ids is not None
    assert torch.equal(ours.support_ids.long(), theirs.support_ids.long())


def test_what_is_called_of_vllm_is_there() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    names = set(EngineRequest((5, 9), 4, 7, excluded=(1,), prompt_logprobs=True).options())
    assert names | {"detokenize"} <= set(inspect.signature(vllm.SamplingParams).parameters)
    assert names | {"prompt", "return_token_ids"} <= set(CompletionRequest.model_fields)
    for method in ("enqueue", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up"):
        assert callable(getattr(vllm.LLM, method))
    assert callable(vllm.LLMEngine.step)
    assert "internal" in inspect.signature(vllm.LLMEngine.abort_request).parameters
    options = {"seed", "logprobs_mode", "generation_config", "enable_sleep_mode", "distributed_executor_backend"}
    options |= {"gpu_memory_utilization", "max_model_len", "dtype", "enforce_eager"}
    assert options <= {field.name for field in dataclasses.fields(EngineArgs)}
