"""The sampler on servers of vLLM: ``/v1/completions`` with token ids, weights through a folder."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import distributed

from opdlab.errors import UsageError, require
from opdlab.files import expanded
from opdlab.locks import locked
from opdlab.policies.engines.engine_sampler import EngineSampler
from opdlab.policies.engines.probe import limit
from opdlab.policies.engines.requests import EngineAnswer, EngineRequest
from opdlab.policies.engines.weights import plain_model, write_weights
from opdlab.policies.fingerprints import fingerprint
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import register_sampler
from opdlab.policies.served.connection import Ask, BadAnswerError, ServerError, Servers
from opdlab.policies.served.models import find_model
from opdlab.policies.served.prompt_scores import read_entries
from opdlab.processes import STOP
from opdlab.records import digest, read_json, write_json

TOKEN_VARIABLE = "OPDLAB_SAMPLER_TOKEN"
"""Environment variable with the token of the servers: no option, because saved configurations show options."""
_COMPLETIONS, _RPC, _RESET = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
_DEV_MODE = "; start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, on a network that only you reach"
_LOADED = "loaded.json"
_WAIT_SECONDS = 0.1


@register_sampler("vllm_server")
class VLLMServerSampler(EngineSampler):
    """Sampler on one or several servers of vLLM, which have been started with any weights of the student's shapes.

    A refresh writes the weights into a folder (safetensors, an adapter merged, the output layer in any case), has each
    server load them and empty its cache of prompts, and compares a probe. The server needs ``VLLM_SERVER_DEV_MODE=1``.
    The processes of a run share the folder: the first one writes, and a server loads equal weights once. Another run
    must not use the same servers at the same time.

    A request that fails is sent again, to the next server; equal requests have equal answers, so nothing is sampled
    twice. A server that needs a token gets the one in the environment variable ``OPDLAB_SAMPLER_TOKEN``.

    Args:
        url: of the server, such as ``http://localhost:8000``; or a list of servers, which are asked in rotation.
        folder: for the weights, at the same path for the run and the servers; null for one in ``~/.cache/opdlab``.
        model: name on the server; null for the only one there.
        per_process: True to give each process of the run the server of its number, instead of all of them.
        concurrency: requests under way at a time, for each process of the run.
        timeout: of one attempt, seconds: longer than the longest response takes.
        retries: how often a failed request is sent again.
        retry_seconds: until the first of these attempts; each further wait is twice as long, up to half a minute.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> VLLMServerSampler("http://localhost:8000/v1", concurrency=0)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: concurrency is 0, but must be at least 1
    """

    def __init__(
        self,
        url: str | list[str],
        folder: str | None = None,
        model: str | None = None,
        per_process: bool = False,
        concurrency: int = 256,
        timeout: float = 3600.0,
        retries: int = 6,
        retry_seconds: float = 1.0,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "concurrency": concurrency,
            "timeout": timeout,
            "retries": retries,
            "retry_seconds": retry_seconds,
            "owner": "the sampler's server",
            "token_variable": TOKEN_VARIABLE,
        }
        self._servers = Servers([url] if isinstance(url, str) else list(url), **self._options)
        self._model, self._per_process = model, per_process
        key = digest(sorted(self._servers.urls))[:16]
        require(folder != "", "folder is empty, but must be a folder of its own, such as ./weights")
        given = f"~/.cache/opdlab/sampler/{key}" if folder is None else folder
        self._folder = expanded(given, "folder").absolute()
        self._model_name = ""
        self._length: int | None = None

    def _engines(self) -> Sequence[int]:
        return range(len(self._servers.urls))

    def _name(self, engine: int | None = None) -> str:
        urls = self._servers.urls
        return "the server " + (" and ".join(urls) if engine is None else urls[engine])

    def _max_length(self) -> int | None:
        return self._length

    # -- start -------------------------------------------------------------------------------------------------------

    def setup(self, model: LanguageModel) -> None:
        """Ask the servers for their model, and whether they can load weights.

        Raises:
            UsageError: a server does not answer, serves another model, or was started without what a refresh needs.
        """
        lengths = []
        for server in range(len(self._servers.urls)):
            self._model_name, about = find_model(self._servers, server, self._model, "model.sampler", "vLLM")
            lengths.append(about.get("max_model_len"))
            self._servers.ask(Ask(_RESET, lambda content: None, lambda: b"", server=server, why=_DEV_MODE))
        self._length = min((length for length in lengths if isinstance(length, int)), default=None)

    # -- weights -----------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # evaluations run in it, and merging an adapter copies the model
    def _take_over(self, model: LanguageModel, *, anew: bool) -> bool:
        self._choose_server()
        found, new = fingerprint(model), False
        with self._turn():
            record = read_json(self._folder / _LOADED)
            if anew or record.get("weights") != found:
                write_weights(plain_model(model), self._folder / "weights")
                record = {"weights": found, "servers": []}
            for server, url in enumerate(self._servers.urls):
                if url not in record["servers"]:
                    self._load(server)
                    record["servers"].append(url)
                    new = True
            write_json(self._folder / _LOADED, record)
        return new

    def _choose_server(self) -> None:
        """Keep the server of this process if each has its own."""
        if not self._per_process or not distributed.is_initialized():
            return
        urls, count = self._servers.urls, distributed.get_world_size()
        if count > 1 and len(urls) > 1:
            require(
                len(urls) == count,
                f"model.sampler.url names {len(urls)} servers and per_process is true, but the run has {count} "
                "processes: name a server for each, or set per_process to false",
            )
            self._servers = Servers([urls[distributed.get_rank()]], **self._options)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process works with the folder, and keep it until the block ends."""
        try:
            while True:
                with locked(self._folder) as free:
                    if free:
                        yield
                        return
                STOP.check()
                time.sleep(_WAIT_SECONDS)
        except OSError as error:
            raise UsageError(f"model.sampler.folder is '{self._folder}', which cannot be written ({error})") from error

    def _load(self, server: int) -> None:
        folder = self._folder / "weights"
        content = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(folder)},
            "timeout": self._options["timeout"],
        }
        why = f"{_DEV_MODE}; the weights are in {folder}"
        self._servers.ask(Ask(_RPC, lambda content: None, lambda: json.dumps(content).encode(), server=server, why=why))
        self._servers.ask(Ask(_RESET, _read_reset, lambda: b"", server=server, why=_DEV_MODE))

    def _check_weights(self) -> None:
        """Raise a UsageError if a server gives the probe other log-probabilities than after the refresh.

        A server that has died is left out if others have answered.
        """
        dead: list[ServerError] = []
        for server, url in enumerate(self._servers.urls):
            try:
                answer = self._all_answers(self._asked[:1], server)[0]
            except ServerError as error:
                dead.append(error)
                continue
            differences = (
                torch.tensor(answer.prompt_logprobs) - self._last[server].engine[: len(answer.prompt_logprobs)]
            )
            mean = float(differences.abs().mean())
            if mean > limit(self._first):
                self._in_use = None
                raise UsageError(
                    f"model.sampler: the server {url} gives a probe log-probabilities that are {mean:.2g} nats from "
                    "those after the refresh, so its weights have changed while it sampled: it was started anew, or "
                    "another run uses it; go on with --ckpt_path last"
                )
        if len(dead) == len(self._servers.urls):
            raise dead[0]

    # -- samples -----------------------------------------------------------------------------------------------------

    def _answers(
        self, requests: Sequence[EngineRequest], engine: int | None = None
    ) -> Generator[tuple[int, EngineAnswer] | None]:
        with closing(self._servers.ask_all([self._ask(request, engine) for request in requests])) as answers:
            yield from answers

    def _ask(self, request: EngineRequest, server: int | None) -> Ask:
        def body() -> bytes:
            content = {"model": self._model_name, "prompt": list(request.prompt), "return_token_ids": True}
            return json.dumps({**content, **request.options()}).encode()

        return Ask(_COMPLETIONS, _reader(request), body, server=server)


def _read_reset(content: bytes) -> None:
    """Raise a :class:`BadAnswerError` if a server could not empty its cache; older ones say nothing."""
    try:
        success = json.loads(content)["success"]
    except (ValueError, KeyError, TypeError):
        return
    if not success:
        raise BadAnswerError("its cache of prompts is in use and was not emptied")


def _reader(request: EngineRequest) -> Callable[[bytes], EngineAnswer]:
    """Return the function that reads the answer to a request; it raises a :class:`BadAnswerError` for a fault."""

    def read(content: bytes) -> EngineAnswer:
        try:
            choice = json.loads(content)["choices"][0]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            answer = EngineAnswer([int(token) for token in tokens], [float(value) for value in logprobs], [])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BadAnswerError(
                f"no JSON with choices[0].token_ids and log-probabilities ({len(content)} bytes)"
            ) from error
        if request.prompt_logprobs:
            entries = read_entries(content, len(request.prompt))[1:]
            try:
                values = [
                    float(entry[str(token)]["logprob"])
                    for entry, token in zip(entries, request.prompt[1:], strict=True)
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise BadAnswerError("a prompt token has no log-probability") from error
            answer = EngineAnswer(answer.tokens, answer.logprobs, values)
        if (fault := answer.fault(request)) is not None:
            raise BadAnswerError(fault)
        return answer

    return read
