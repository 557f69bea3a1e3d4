"""The sampler in this process: ``vllm.LLM``, which gets the weights without a file."""

import os
import random
import shutil
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed

from opdlab.errors import UsageError, first_line, require
from opdlab.out_of_memory import out_of_memory
from opdlab.packages import require_package
from opdlab.policies.engines.engine_sampler import EngineSampler, checked
from opdlab.policies.engines.requests import EngineAnswer, EngineRequest
from opdlab.policies.engines.weights import named_weights, plain_model, write_weights
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.loading import DType
from opdlab.policies.sampler import register_sampler

# The engine must be in this process, so that it gets weights without a copy; it must not bind the process to one core.
_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
_OURS = ("model", "seed", "logprobs_mode", "generation_config", "enable_sleep_mode", "skip_tokenizer_init")


@register_sampler("vllm")
class VLLMSampler(EngineSampler):
    """Sampler with vLLM in this process, on the model's device. Needs the extra ``vllm``.

    The engine starts at the first refresh. Each refresh hands over the weights (an adapter merged, the output layer in
    any case), empties the cache of prompts, and compares a probe. On a GPU the engine gives its memory back between
    sampling and the next buffer (vLLM's sleep mode).

    Args:
        gpu_memory_utilization: share of the GPU's memory that the engine takes while it samples, weights included;
            above 0, below 1. On a CPU, ``VLLM_CPU_KVCACHE_SPACE`` gives GiB of its cache, by default 1.
        max_model_len: tokens of the longest prompt and response together; null for the model's own maximum, whose
            cache may not fit.
        dtype: of the engine's weights; ``auto`` takes the student's.
        enforce_eager: True to compile nothing: a faster start, and slower sampling.
        sleep_level: 1 keeps the weights in host memory while the engine sleeps, 2 drops them, and each buffer hands
            them over; 0 never sleeps. No effect on a CPU.
        options: further arguments of ``vllm.LLM``, such as ``{max_num_seqs: 512}``.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> VLLMSampler(gpu_memory_utilization=1.5)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: gpu_memory_utilization is 1.5, but must be above 0 and below 1
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        dtype: DType | Literal["auto"] = "auto",
        enforce_eager: bool = False,
        sleep_level: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require(
            0 < gpu_memory_utilization < 1,
            f"gpu_memory_utilization is {gpu_memory_utilization}, but must be above 0 and below 1",
        )
        require(
            max_model_len is None or max_model_len >= 1, f"max_model_len is {max_model_len}, but must be at least 1"
        )
        require(sleep_level in (0, 1, 2), f"sleep_level is {sleep_level}, but must be 0, 1 or 2")
        for name in options or {}:
            require(name not in _OURS, f"options has '{name}', which opdlab sets itself: leave it out")
        self._options: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            **({} if dtype == "auto" else {"dtype": dtype}),  # vLLM's own auto would narrow float32
            **(options or {}),
        }
        self._sleep_level, self._sleeps, self._asleep = sleep_level, False, False
        self._engine: Any = None
        self._folder: Path | None = None  # for weights that the engine can only read from files
        self._device_type = "cpu"

    def _name(self, engine: int | None = None) -> str:
        del engine
        return "vLLM in this process"

    def _max_length(self) -> int | None:
        return None if self._engine is None else int(self._engine.model_config.max_model_len)

    # -- start -------------------------------------------------------------------------------------------------------

    def setup(self, model: LanguageModel) -> None:
        """Import vLLM.

        Raises:
            UsageError: it is missing, or cannot be imported.
        """
        self._prepare()
        require_package("vllm", "model.sampler", "vllm")

    def _prepare(self) -> None:
        os.environ.update(_SETTINGS)
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)

    def _start(self, plain: LanguageModel) -> None:
        """Start the engine with a model's weights.

        Raises:
            UsageError: vLLM does not know the model, or has too little memory.
        """
        self._prepare()
        from vllm import LLM

        self._sleeps = self._sleep_level > 0 and plain.device.type == "cuda"
        options = {
            "seed": 0,
            "dtype": str(next(plain.parameters()).dtype).removeprefix("torch."),
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "enable_sleep_mode": self._sleeps,
            **_of_processes(),
            **self._options,
        }
        folder = Path(mkdtemp(prefix="opdlab-vllm-"))
        remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        by_name = write_weights(plain, folder)
        try:
            with _kept_generators():
                self._engine = LLM(model=str(folder), **options)
        except Exception as error:  # vLLM raises many types
            remove()
            if out_of_memory(error) is not None:
                raise
            raise UsageError(
                f"model.sampler: vLLM cannot start with this model ({first_line(error)}): change "
                "model.sampler.max_model_len, gpu_memory_utilization or options, or set model.sampler to transformers"
            ) from error
        if by_name:
            remove()
        else:
            self._folder = folder

    # -- weights -----------------------------------------------------------------------------------------------------

    def _take_over(self, model: LanguageModel, *, anew: bool) -> bool:
        del anew
        with _modes_of_vllm(model.device.type):
            plain = plain_model(model)
            if self._engine is None:
                self._start(plain)
            self._wake()
            handed: dict[str, Any] = {"weights_iterator": named_weights(plain)}
            if self._folder is not None:
                write_weights(plain, self._folder)
                handed = {"weights_path": str(self._folder)}
            self._engine.collective_rpc("reload_weights", kwargs=handed)
            emptied = self._engine.reset_prefix_cache()
        self._device_type = model.device.type
        require(bool(emptied), "model.sampler: vLLM cannot empty its cache of prompts, because it still samples")
        return True

    def release(self) -> None:
        """Let the engine sleep, on a GPU; see :meth:`Sampler.release`."""
        if self._engine is None or not self._sleeps or self._asleep:
            return
        self._engine.sleep(level=self._sleep_level)
        self._asleep = True
        if self._sleep_level == 2:
            self._in_use = None  # the weights are gone

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # vLLM takes its memory from the device, not from torch
            self._engine.wake_up()
            self._asleep = False

    # -- samples -----------------------------------------------------------------------------------------------------

    def _answers(
        self, requests: Sequence[EngineRequest], engine: int | None = None
    ) -> Generator[tuple[int, EngineAnswer] | None]:
        from vllm import SamplingParams

        params = []
        for request in requests:
            options = {**request.options(), "detokenize": False}
            options["logit_bias"] = {int(token): bias for token, bias in options.get("logit_bias", {}).items()} or None
            params.append(SamplingParams(**options))
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        llm_engine: Any = self._engine.llm_engine
        waiting: dict[str, tuple[int, str]] = {}  # index and name inside of the engine, which ends in random characters
        try:
            with _modes_of_vllm(self._device_type):
                self._wake()
                names = self._engine.enqueue(prompts, params, use_tqdm=False) if prompts else []
                waiting |= {name.partition("-")[0]: (index, name) for index, name in enumerate(names)}
            while waiting:
                with _modes_of_vllm(self._device_type):
                    outputs = [output for output in llm_engine.step() if output.finished]
                done = [(waiting.pop(output.request_id)[0], output) for output in outputs]
                yield None
                for index, output in done:
                    yield index, checked(_answer(output), requests[index], self._name())
        finally:
            if waiting:
                llm_engine.abort_request([name for _, name in waiting.values()], internal=True)


def _answer(output: Any) -> EngineAnswer:
    """Return what a ``vllm.RequestOutput`` holds."""
    sampled = output.outputs[0]
    tokens = [int(token) for token in sampled.token_ids]
    logprobs = [float(each[token].logprob) for token, each in zip(tokens, sampled.logprobs or [], strict=True)]
    scored = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    return EngineAnswer(tokens, logprobs, [float(each[token].logprob) for token, each in scored])


def _of_processes() -> dict[str, Any]:
    """Return the options of an engine in one of several processes: each process has its own, on its own device."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return {}
    os.environ.setdefault("RANK", str(distributed.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(distributed.get_world_size()))
    os.environ.setdefault("LOCAL_RANK", "0")
    return {"distributed_executor_backend": "external_launcher"}


@contextmanager
def _modes_of_vllm(device_type: str) -> Iterator[None]:
    """Run a block outside of the modes of an evaluation: inference mode, whose tensors vLLM cannot change, autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Restore the global random generators after the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
