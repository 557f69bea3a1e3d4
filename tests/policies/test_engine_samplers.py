"""Samplers with an engine of their own, against a fake server of vLLM: right samples, or one line."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from opdlab.cli import main
from opdlab.errors import Stopped, UsageError
from opdlab.policies import (
    AdapterConfig,
    BehaviorPolicy,
    LanguageModel,
    Samples,
    SamplingConfig,
    TransformersSampler,
    VLLMServerSampler,
)
from opdlab.policies.decoding import NonFiniteLogitsError
from opdlab.policies.engines.server_sampler import TOKEN_VARIABLE
from opdlab.policies.engines.weights import write_weights
from opdlab.progress import SilentProgress
from opdlab.seeds import derive_streams
from tests.policies.fake_vllm import FakeVLLM
from tests.policies.test_sampler import PROMPTS, chi_square, next_token_probabilities, random_model
from tests.toy_run import STUDENT, Run

CONFIG = SamplingConfig(num_samples=3, max_new_tokens=10)
STREAMS = derive_streams("rollouts", 0, keys=range(3), num_samples=3)
SERVED = Path(__file__).parents[2] / "opdlab/toy/models/student"


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    # Other weights than the server's at its start, with an output layer that is the embedding.
    return random_model(tmp_path / "model", spread=0.15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    random_model(folder, spread=0.3)
    return folder


@contextmanager
def servers(folder: Path, *options: dict[str, Any]) -> Iterator[list[FakeVLLM]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeVLLM(folder, **each)) for each in options]


def made(tmp_path: Path, *given: FakeVLLM, **options: Any) -> VLLMServerSampler:
    options = {"retry_seconds": 0.01, "timeout": 20.0, "folder": str(tmp_path / "weights"), **options}
    return VLLMServerSampler([server.url for server in given], **options)


def ready(tmp_path: Path, model: LanguageModel, *given: FakeVLLM, **options: Any) -> VLLMServerSampler:
    sampler = made(tmp_path, *given, **options)
    sampler.setup(model)
    sampler.refresh(model, 0)
    for server in given:
        server.counts = True
    return sampler


def sample(
    sampler: Any, prompts: Sequence[Sequence[int]] = PROMPTS, streams: Tensor = STREAMS, **options: Any
) -> Samples:
    config = SamplingConfig(**{"max_new_tokens": 10, **options})
    samples: Samples = sampler.sample(prompts, streams, config, SilentProgress())
    return samples


def rows(samples: Samples) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(samples.tokens, samples.mask, strict=True)]


# -- what is sampled --------------------------------------------------------------------------------------------------


def test_the_likeliest_tokens_are_those_of_the_loop_here(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    here = TransformersSampler()
    here.refresh(model, 0)
    model.stop_ids = [1, rows(sample(here, temperature=0.01))[0][4]]
    with servers(folder, {}) as (server,):
        theirs = sample(ready(tmp_path, model, server), temperature=0.01)
    ours = rows(sample(here, temperature=0.01))
    assert rows(theirs) == ours
    assert min(map(len, ours)) < max(map(len, ours))


def test_stops_marks_and_log_probabilities(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    model.stop_ids = [1, *range(10, 20)]
    with servers(folder, {}) as (server,):
        behavior = BehaviorPolicy(model, CONFIG, sampler=made(tmp_path, server))
        rollouts = behavior.sample(PROMPTS * 4, list(range(12)), seed=0)
    stopped = torch.isin(rollouts.tokens, torch.tensor(model.stop_ids)) & rollouts.mask
    assert torch.equal(stopped.any(1), rollouts.stop_reasons == 0)
    assert set(stopped.any(1).tolist()) == {False, True}
    assert int(stopped.sum(1).max()) == 1
    assert rollouts.sampler_logprobs is not None
    torch.testing.assert_close(rollouts.sampler_logprobs, rollouts.behavior_logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5)])
def test_first_tokens_follow_the_models_probabilities(
    model: LanguageModel, folder: Path, tmp_path: Path, temperature: float, top_p: float
) -> None:
    streams = derive_streams("rollouts", 1, keys=[0], num_samples=800)
    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server)
        samples = sample(sampler, [[5, 9, 3]], streams, max_new_tokens=1, temperature=temperature, top_p=top_p)
    counts = samples.tokens[:, 0].bincount(minlength=38).double()
    probabilities = next_token_probabilities(model, [5, 9, 3], temperature)
    ranked = probabilities.sort(descending=True)
    outside = ranked.indices[ranked.values.cumsum(0) - ranked.values >= top_p]
    probabilities = probabilities.index_fill(0, outside, 0.0)
    assert chi_square(counts, probabilities / probabilities.sum()) < 2
    assert chi_square(counts, torch.full((38,), 1 / 38, dtype=torch.float64)) > 4


def test_a_stream_gives_the_same_response_in_any_batch(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with servers(folder, {}, {}) as both:
        sampler = ready(tmp_path, model, *both, concurrency=4)
        whole = rows(sample(sampler))
        assert 1 < max(server.most for server in both) <= 4
        turned = rows(sample(sampler, PROMPTS[::-1], STREAMS.flip(0)))
        assert turned == whole[6:] + whole[3:6] + whole[:3]
        alone = ready(tmp_path, model, both[0], concurrency=1)
        assert [rows(sample(alone, [PROMPTS[1]], STREAMS[1:2, 2:]))[0]] == [whole[5]]
        assert len({tuple(row) for row in whole}) > 5


def test_tokens_that_the_student_lacks_are_never_sampled(tmp_path: Path) -> None:
    flat = random_model(tmp_path / "model", spread=0.01, vocab_size=64)
    assert flat.vocab_size == 38
    streams = derive_streams("rollouts", 1, keys=[0], num_samples=300)
    with servers(tmp_path / "model", {}) as (server,):
        samples = sample(ready(tmp_path, flat, server), [[5]], streams, max_new_tokens=1)
    assert int(samples.tokens.max()) < 38


@pytest.mark.parametrize(
    ("processed", "temperature", "top_p", "known"),
    [
        (False, 1.0, 0.9, True),
        (False, 0.7, 1.0, False),
        (True, 0.7, 1.0, True),
        (True, 1.0, 1.0, True),
        (True, 1.0, 0.9, False),
    ],
)
def test_log_probabilities_are_at_the_temperature_and_before_top_p_or_none(
    folder: Path, tmp_path: Path, processed: bool, temperature: float, top_p: float, known: bool
) -> None:
    model = random_model(tmp_path / "model", spread=0.15)
    config = SamplingConfig(2, temperature, top_p, 8)
    with servers(folder, {"processed": processed}) as (server,):
        behavior = BehaviorPolicy(model, config, sampler=made(tmp_path, server))
        rollouts = behavior.sample(PROMPTS, [0, 1, 2], seed=0)
    assert (rollouts.sampler_logprobs is not None) == known
    if rollouts.sampler_logprobs is not None:
        torch.testing.assert_close(rollouts.sampler_logprobs, rollouts.behavior_logprobs, atol=2e-5, rtol=1e-5)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("peft_pair")
def test_weights_are_written_with_the_output_layer_and_merged(tmp_path: Path) -> None:
    tied = LanguageModel(STUDENT)
    assert write_weights(tied, tmp_path / "tied")
    adapted = LanguageModel(STUDENT, adapter=AdapterConfig(r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    with servers(SERVED, {}) as (server,):
        ready(tmp_path, adapted, server)
        assert server.loaded == [str(tmp_path / "weights/weights")]
    for folder in (tmp_path / "tied", tmp_path / "weights/weights"):
        names: set[str] = set()
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                names |= set(file.keys())
        assert {"lm_head.weight", "model.embed_tokens.weight"} < names
        assert not [name for name in names if "lora" in name]


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ({"forgets": "head"}, "lm_head.weight of tied embeddings"),
        ({"forgets": "all"}, "it still has the weights of the last refresh"),
        ({"keeps_cache": True}, "its cache of prompts is of earlier weights"),
    ],
)
def test_a_reload_that_leaves_something_out_is_found(
    model: LanguageModel, folder: Path, tmp_path: Path, trouble: dict[str, Any], cause: str
) -> None:
    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server)
        sampler.refresh(model, 0)
        for name, value in trouble.items():
            setattr(server, name, value)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
        with pytest.raises(UsageError, match=f"after the refresh at step 8, the server http.*; likely: .*{cause}"):
            sampler.refresh(model, 8)


def test_the_probe_finds_small_changes_that_are_missing(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server)
        server.forgets = "head"
        with torch.no_grad():
            model.model.lm_head.weight.add_(0.05 * torch.randn(38, 32, generator=torch.Generator().manual_seed(0)))
        with pytest.raises(UsageError, match="after the refresh at step 1"):
            sampler.refresh(model, 1)


def test_equal_weights_are_loaded_once_and_again_after_a_restart(
    model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    with servers(folder, {}, {}) as both:
        sampler, other = ready(tmp_path, model, *both), ready(tmp_path, model, *both)
        assert [len(server.loaded) for server in both] == [1, 1]
        both[0].restart()
        other.refresh(model, 0)
        assert [len(server.loaded) for server in both] == [2, 2]
        assert rows(sample(sampler)) == rows(sample(other))


def test_processes_that_refresh_at_once_write_and_load_once(folder: Path, tmp_path: Path) -> None:
    models = [random_model(tmp_path / f"model{number}", spread=0.15) for number in range(2)]
    with servers(folder, {}) as (server,), ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda model: ready(tmp_path, model, server), models))
        assert len(server.loaded) == 1
        assert rows(sample(made[0])) == rows(sample(made[1]))


def test_each_process_may_have_its_own_server(
    model: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 2
    fake = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: count, get_rank=lambda: 1)
    monkeypatch.setattr("opdlab.policies.engines.server_sampler.distributed", fake)
    with servers(folder, {}, {}) as both:
        sample(ready(tmp_path, model, *both, per_process=True))
        assert [len(server.loaded) for server in both] == [0, 1]
        assert [len(server.asked) for server in both] == [0, 9 + 1]
        count = 3
        with pytest.raises(
            UsageError, match="url names 2 servers and per_process is true, but the run has 3 processes"
        ):
            ready(tmp_path, model, *both, per_process=True)


def test_weights_that_change_while_sampling_are_found(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with servers(folder, {"troubles": {3: "restart"}}) as (server,):
        sampler = ready(tmp_path, model, server)
        with pytest.raises(UsageError, match="its weights have changed while it sampled: it was started anew"):
            sample(sampler)


def test_weights_that_are_no_numbers_are_not_handed_over(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server)
        with torch.no_grad():
            model.model.lm_head.weight.fill_(math.nan)
        with pytest.raises(NonFiniteLogitsError, match="at step 4"):
            sampler.refresh(model, 4)
        assert len(server.loaded) == 1


# -- troubles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["error", "cut", "short", "few", "stop", "slow"])
def test_only_what_failed_is_asked_again(model: LanguageModel, folder: Path, tmp_path: Path, trouble: str) -> None:
    model.stop_ids = [1, *range(10, 24)]
    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server, concurrency=2, timeout=2.0 if trouble == "slow" else 20.0)
        whole = rows(sample(sampler))
        server.troubles, server.asked, server.slow = {2: trouble, 4: trouble}, [], 3.0
        assert rows(sample(sampler)) == whole
    assert len(server.asked) == 9 + 2 + 1  # and the probe


def test_another_server_takes_over(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with servers(folder, {}, {}) as (good, bad):
        sampler = ready(tmp_path, model, good, bad, retries=3)
        whole = rows(sample(sampler))
        bad.troubles, bad.asked = {1: "die"}, []
        assert rows(sample(sampler)) == whole
        model.model.lm_head.weight.data.mul_(1.1)
        with pytest.raises(UsageError, match=f"the sampler's server {bad.url} does not answer"):
            sampler.refresh(model, 1)


def test_a_server_that_dies_in_a_buffer_is_one_line_and_nothing_is_lost(
    model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    with servers(folder, {}, {"troubles": {4: "die"}}) as (good, bad):
        expected = rows(sample(ready(tmp_path, model, good)))
        sampler = ready(tmp_path / "other", model, bad, concurrency=1, retries=1)
        with pytest.raises(
            UsageError, match=r"the sampler's server .* does not answer .* goes on with --ckpt_path las"
        ):
            sample(sampler)
        assert len(bad.answered) == 4
        sampler._servers = ready(tmp_path, model, good)._servers  # the server is back
        good.asked = []
        assert rows(sample(sampler)) == expected
        assert len(good.asked) == 5 + 1


def test_a_stop_ends_the_sampling(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    class Stopping(SilentProgress):
        @contextmanager
        def task(self, name: str, total: int) -> Iterator[Any]:
            assert (name, total) == ("sampling", 90)
            yield self.advance

        def advance(self, units: int) -> None:
            if units:
                raise Stopped

    with servers(folder, {}) as (server,):
        sampler = ready(tmp_path, model, server, concurrency=1)
        with suppress(Stopped):
            sampler.sample(PROMPTS, STREAMS, CONFIG, Stopping())
        assert len(server.answered) < 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dev": False}, r"refuses a request \(404: Not Found\); start vLLM with VLLM_SERVER_DEV_MODE=1"),
        ({"token": "secret"}, f"Unauthorized.*; give its token in {TOKEN_VARIABLE}"),
    ],
)
def test_a_server_that_cannot_refresh_is_refused_at_the_start(
    model: LanguageModel, folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with servers(folder, options) as (server,), pytest.raises(UsageError, match=message):
        BehaviorPolicy(model, CONFIG, sampler=made(tmp_path, server, retries=0))


def test_the_token_is_sent(model: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with servers(folder, {"token": "secret"}) as (server,):
        assert len(rows(sample(ready(tmp_path, model, server)))) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.001}, "temperature is 0.001, but vLLM samples at 0.01 or above"),
        (
            {"max_new_tokens": 300},
            "may have 305 tokens, but the server .* takes 256: start vLLM with max_model_len 305",
        ),
    ],
)
def test_what_vllm_cannot_sample_is_refused(
    model: LanguageModel, folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with servers(folder, {}) as (server,), pytest.raises(UsageError, match=message):
        sample(ready(tmp_path, model, server), **options)


def test_a_folder_that_cannot_be_written_is_one_line(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with servers(folder, {}) as (server,), pytest.raises(UsageError, match="model.sampler.folder is '.*/file/weights'"):
        ready(tmp_path, model, server, folder=str(tmp_path / "file/weights"))
    for folder_, said in (("", "folder is empty"), ("~no one/x", "folder is '~no one/x', but its home folder")):
        with pytest.raises(UsageError, match=said):
            VLLMServerSampler("http://localhost:1", folder=folder_)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_samples_and_evaluates_with_the_server(make_run: Any, tmp_path: Path) -> None:
    with servers(SERVED, {}) as (server,):
        run: Run = make_run(sampler=made(tmp_path, server), max_new_tokens=8, sampler_correction="tis")
        trainer = run.fit(5, limit_val_batches=1.0, val_check_interval=4, num_sanity_val_steps=0)
        assert len(server.loaded) == 3  # the start; step 4 is evaluated; the snapshot of step 3 samples the next buffer
    assert run.recorder.steps[1]["train/drift/max"] < 1e-5
    assert run.recorder.steps[1]["train/sampler_gap_max"] < 1e-4
    assert run.recorder.steps[5]["train/sampler_correction"] == pytest.approx(1.0, abs=1e-3)
    assert "val/toy/pass@1" in trainer.callback_metrics


def test_the_command_line_builds_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with servers(SERVED, {}) as (server,):
        options = ["--model.sampler", "vllm_server", "--model.sampler.url", server.url, "--trainer.max_steps", "1"]
        options += ["--model.sampler.folder", str(tmp_path / "weights"), "--trainer.limit_val_batches", "0"]
        options += ["--model.sampling.max_new_tokens", "8", "--data.reuse.prompts_per_pool", "8"]
        options += ["--data.reuse.batch_size", "8", "--trainer.enable_progress_bar", "false"]
        assert main(["fit", "-c", "quickstart", *options]) == 0, capsys.readouterr().err
        assert server.loaded
    saved = next(tmp_path.glob("runs/*/version_0/config.yaml")).read_text()
    assert "VLLMServerSampler" in saved
    assert server.url in saved
    assert main(["fit", "-c", "quickstart", "--model.sampler", "vllm_server"]) == 2
    assert "url" in capsys.readouterr().err
