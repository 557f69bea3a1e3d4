"""A stand-in for the package vllm, as far as the sampler in this process calls it, with the fake server's model."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.policies.fake_vllm import FakeVLLM


class FakeLLM:
    """``vllm.LLM``: answers two requests a step, the last one first."""

    made: list["FakeLLM"] = []  # noqa: RUF012 - emptied by install

    def __init__(self, model: str, **options: Any) -> None:
        if options.get("max_model_len") == 7:
            raise ValueError("the cache is too small\nfor the model")
        torch.manual_seed(int(options["seed"]))  # as vLLM does
        self.fake = FakeVLLM(Path(model), processed=options["logprobs_mode"] == "processed_logprobs")
        self.fake._server.server_close()
        self.options, self.model_config = options, SimpleNamespace(max_model_len=options.get("max_model_len") or 256)
        self.llm_engine, self.asleep, self.count = self, 0, 0
        self.waiting: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.names: list[set[str]] = []
        FakeLLM.made.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        assert not self.asleep
        self.calls.append("reload")
        if "weights_path" in kwargs:
            self.fake.reload(kwargs["weights_path"])
        else:
            given: dict[str, Tensor] = dict(kwargs["weights_iterator"])
            self.names.append(set(given))
            self.fake.take(given)
        return [None]

    def reset_prefix_cache(self) -> bool:
        self.fake.cache.clear()
        return not self.waiting

    def sleep(self, level: int) -> None:
        assert not self.waiting
        self.asleep = level
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        if self.asleep == 2:
            self.fake.restart()
        self.asleep = 0
        self.calls.append("wake")

    def enqueue(self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[str]:
        assert not self.asleep
        assert not use_tqdm
        names = []
        for prompt, each in zip(prompts, params, strict=True):
            self.count += 1
            self.waiting[str(self.count)] = {**vars(each), "prompt": prompt["prompt_token_ids"], "model": "toy"}
            names.append(f"{self.count}-{self.count:08x}")
        return names

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert internal
        self.calls.append("abort")
        for name in names:
            del self.waiting[name.partition("-")[0]]

    def step(self) -> list[Any]:
        return [self._output(name, self.waiting.pop(name)) for name in list(self.waiting)[:-3:-1]]

    def _output(self, name: str, asked: dict[str, Any]) -> Any:
        choice = self.fake.completion({**asked, "return_token_ids": True})["choices"][0]
        numbers = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in numbers]
        scored = [
            None
            if entry is None
            else {int(key): SimpleNamespace(logprob=each["logprob"]) for key, each in entry.items()}
            for entry in choice.get("prompt_logprobs") or []
        ]
        sampled = SimpleNamespace(token_ids=choice["token_ids"], logprobs=logprobs)
        return SimpleNamespace(
            request_id=name,
            finished=True,
            outputs=[sampled],
            prompt_token_ids=asked["prompt"],
            prompt_logprobs=scored or None,
        )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of the package until a test ends."""
    FakeLLM.made.clear()
    package = ModuleType("vllm")
    package.__spec__ = ModuleSpec("vllm", None, origin="fake")
    package.__dict__.update(LLM=FakeLLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", package)
