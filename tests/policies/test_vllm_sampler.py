"""The sampler with vLLM in this process, with a stand-in for vLLM; `make test-vllm` runs it with the real one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.cli import EXIT_USAGE, main
from opdlab.errors import Stopped, UsageError
from opdlab.policies import (
    AdapterConfig,
    BehaviorPolicy,
    LanguageModel,
    SamplingConfig,
    TransformersSampler,
    VLLMSampler,
)
from opdlab.progress import SilentProgress
from tests.policies.fake_llm import FakeLLM, install
from tests.policies.test_engine_samplers import CONFIG, STREAMS, rows, sample
from tests.policies.test_sampler import PROMPTS, random_model
from tests.toy_run import STUDENT


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the sampler sets variables
    install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    return random_model(tmp_path, spread=0.15)


def ready(model: LanguageModel, **options: Any) -> VLLMSampler:
    sampler = VLLMSampler(**options)
    sampler.setup(model)
    sampler.refresh(model, 0)
    return sampler


def test_the_likeliest_tokens_are_those_of_the_loop_here(model: LanguageModel) -> None:
    here = TransformersSampler()
    here.refresh(model, 0)
    model.stop_ids = [1, rows(sample(here, temperature=0.01))[0][4]]
    state = torch.get_rng_state()
    theirs = sample(ready(model), temperature=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert rows(theirs) == rows(sample(here, temperature=0.01))


def test_a_stream_gives_the_same_response_in_any_batch(model: LanguageModel) -> None:
    sampler = ready(model)
    whole = rows(sample(sampler))
    assert rows(sample(sampler, PROMPTS[::-1], STREAMS.flip(0))) == whole[6:] + whole[3:6] + whole[:3]
    assert rows(sample(sampler, [PROMPTS[1]], STREAMS[1:2, 2:])) == [whole[5]]


def test_options_reach_the_engine(model: LanguageModel) -> None:
    ready(model, gpu_memory_utilization=0.4, dtype="bfloat16", options={"max_num_seqs": 8})
    given = FakeLLM.made[0].options
    assert (given["gpu_memory_utilization"], given["dtype"], given["max_num_seqs"]) == (0.4, "bfloat16", 8)
    assert (given["logprobs_mode"], given["enable_sleep_mode"]) == ("processed_logprobs", False)
    ready(model)
    assert FakeLLM.made[1].options["dtype"] == "float32"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2)])
def test_weights_are_handed_over_after_each_refresh(adapter: AdapterConfig | None) -> None:
    student = LanguageModel(STUDENT, adapter=adapter)
    behavior = BehaviorPolicy(student, SamplingConfig(2, 0.7, 1.0, 8), sampler=VLLMSampler())
    for step in (0, 3):
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and (adapter is None or "lora_B" in name):
                parameter.data.add_(0.02 * step)
        behavior.refresh(student, step)
        rollouts = behavior.sample(PROMPTS, [0, 1, 2], seed=step)
        assert rollouts.sampler_logprobs is not None
        torch.testing.assert_close(rollouts.sampler_logprobs, rollouts.behavior_logprobs, atol=2e-5, rtol=1e-5)
    (engine,) = FakeLLM.made
    assert engine.calls == ["reload", "reload"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} < engine.names[1]
    assert not [name for name in engine.names[1] if "lora" in name]


def test_a_reload_that_leaves_something_out_is_found(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ready(model)
    FakeLLM.made[0].fake.forgets = "head"
    with torch.no_grad():
        model.model.lm_head.weight.add_(0.1)
        model.model.lm_head.weight[::2].mul_(2)
    with pytest.raises(UsageError, match="after the refresh at step 2, vLLM in this process gives .*lm_head.weight"):
        sampler.refresh(model, 2)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, ["reload"]),
        (1, ["reload", "sleep 1", "wake", "sleep 1"]),
        (2, ["reload", "sleep 2", "wake", "reload", "sleep 2"]),
    ],
)
def test_the_engine_sleeps_between_buffers_on_a_gpu(model: LanguageModel, level: int, expected: list[str]) -> None:
    sampler = VLLMSampler(sleep_level=level)
    behavior = BehaviorPolicy(model, SamplingConfig(max_new_tokens=4), sampler=sampler)
    behavior.sample(PROMPTS, [0, 1, 2], seed=0)
    sampler._sleeps = level > 0  # as on a GPU
    sampler.release()
    sampler.release()
    behavior.sample(PROMPTS, [0, 1, 2], seed=1)
    assert FakeLLM.made[0].calls == expected


def test_a_stop_leaves_no_request_in_the_engine(model: LanguageModel) -> None:
    class Stopping(SilentProgress):
        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Any]:
            yield self.advance

        def advance(self, units: int) -> None:
            if units == CONFIG.max_new_tokens:
                raise Stopped

    sampler = ready(model)
    with pytest.raises(Stopped):
        sampler.sample(PROMPTS, STREAMS, CONFIG, Stopping())
    assert not FakeLLM.made[0].waiting
    assert FakeLLM.made[0].calls == ["reload", "abort"]
    expected = rows(sample(ready(model)))
    assert rows(sample(sampler)) == expected


def test_an_engine_that_does_not_start_is_one_line(model: LanguageModel) -> None:
    with pytest.raises(
        UsageError, match=r"vLLM cannot start with this model \(the cache is too small\): change"
    ) as error:
        ready(model, max_model_len=7)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_too_long_is_refused(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="may have 45 tokens, but vLLM in this process takes 40: start vLLM with"):
        sample(ready(model, max_model_len=40), max_new_tokens=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0, but must be above 0"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"sleep_level": 3}, "sleep_level is 3, but must be 0, 1 or 2"),
        ({"options": {"seed": 1}}, "options has 'seed', which opdlab sets itself"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VLLMSampler(**options)


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opdlab.packages.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    assert main(["fit", "-c", "quickstart", "--model.sampler", "vllm", "--trainer.max_steps", "1"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "model.sampler needs vllm, which is not installed: pip install 'opdlab[vllm]'" in said
    assert "Traceback" not in said
