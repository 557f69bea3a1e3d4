"""A small server that speaks vLLM's JSON, backed by a model of transformers, with troubles on demand.

It scores prompts, samples, loads weights from a folder, and has a cache of prompts that outlives the weights until it
is emptied. As in vLLM, weights that a reload does not give stay as they were, the output layer's too.
"""

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

TEACHER_FOLDER = Path(__file__).parents[2] / "opdlab/toy/models/teacher"


class FakeVLLM:
    """A server in a thread.

    Args:
        folder: of the model.
        name: of the model for clients.
        max_logprobs: most entries that a request may want.
        max_model_len: most tokens, the sampled one included.
        token: that each request must have, or None.
        troubles: what happens instead of the answer, by the number of the counted request, from 0:
            ``error`` (500), ``cut`` (JSON without its end), ``short`` (fewer bytes than announced), ``slow``, ``few``
            (entries missing, or a response that ends early), ``stop`` (a response that goes on after a stop token),
            ``die`` (this request and all later ones find no server), ``restart`` (the first weights are back).
        shift: positions by which entries are moved.
        bos: True to put a token before each prompt.
        samples: False to leave out what the next token is sampled from.
        hot: temperature of the distribution that is sampled from.
        slow: seconds of a slow answer.
        likeliest: ids from this one on are the most likely ones everywhere; None for the model's own logits.
        dev: False for a server without VLLM_SERVER_DEV_MODE.
        processed: True for log-probabilities after temperature and top-p.
        forgets: weights that a reload does not take: ``head``, ``all``, or nothing.
        keeps_cache: True if the cache of prompts is never emptied.
    """

    def __init__(
        self,
        folder: Path = TEACHER_FOLDER,
        name: str = "toy",
        *,
        max_logprobs: int = 40,
        max_model_len: int | None = 256,
        token: str | None = None,
        troubles: Mapping[int, str] | None = None,
        shift: int = 0,
        bos: bool = False,
        samples: bool = True,
        hot: float = 1.0,
        slow: float = 1.0,
        likeliest: int | None = None,
        dev: bool = True,
        processed: bool = False,
        forgets: str = "",
        keeps_cache: bool = False,
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.dev, self.processed, self.forgets, self.keeps_cache = dev, processed, forgets, keeps_cache
        self.now = self.start
        self.cache: dict[tuple[int, ...], dict[str, Tensor]] = {}
        """The weights of when a prompt was first read."""
        self.loaded: list[str] = []
        """Folders of the reloads."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.names, self.max_logprobs, self.max_model_len, self.token = [name], max_logprobs, max_model_len, token
        self.troubles, self.shift, self.bos, self.samples, self.hot = dict(troubles or {}), shift, bos, samples, hot
        self.slow, self.likeliest = slow, likeliest
        self.counts = False
        """True once requests are counted: set it after the probe."""
        self.asked: list[list[int]] = []
        """Prompts of the counted requests, troubled ones included."""
        self.answered: list[list[int]] = []
        """Prompts of those that were answered in full."""
        self.most = 0
        """Largest number of requests at a time."""
        self.dead = False
        self._under_way = 0
        self._texts: dict[int, str] = {}
        self._lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "FakeVLLM":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.dead:
            self._server.shutdown()
            self._server.server_close()
        self._thread.join(5)

    def die(self) -> None:
        """Close the listening socket; answers under way are lost."""
        self.dead = True
        threading.Thread(target=self._server.shutdown, daemon=True).start()
        self._server.server_close()

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.names]}

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> Tensor:
        with self._lock:
            logits: Tensor = self.model(torch.tensor([tokens])).logits[0].float()
        if self.likeliest is not None:
            logits[:, self.likeliest :] = logits.amax(1, keepdim=True) + 1
        return logits

    def reload(self, folder: str) -> None:
        given: dict[str, Tensor] = {}
        for path in Path(folder).glob("*.safetensors"):
            given |= load_file(path)
        self.loaded.append(folder)
        self.take(given)

    @torch.no_grad()
    def take(self, given: dict[str, Tensor]) -> None:
        if self.forgets == "head":
            given.pop("lm_head.weight", None)
        with self._lock:
            for name, tensor in self.model.state_dict().items():
                if name in given and self.forgets != "all":
                    tensor.copy_(given[name])
            self.now = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def restart(self) -> None:
        with self._lock:
            self.model.load_state_dict(self.start)
            self.now = self.start

    def sampled(self, asked: Mapping[str, Any], trouble: str | None) -> dict[str, Any]:
        """Return a response; options that are not given have defaults that change it."""
        prompt = list(asked["prompt"])
        tokens: list[int] = []
        numbers: list[float] = []
        generator = torch.Generator().manual_seed(asked.get("seed", 0))
        bias = torch.zeros(self.model.config.vocab_size)
        for index, value in (asked.get("logit_bias") or {}).items():
            bias[int(index)] = value
        weights = self.cache.setdefault(tuple(prompt), self.now)
        while len(tokens) < asked["max_tokens"]:
            with torch.no_grad(), self._lock:
                row = torch.tensor([[*prompt, *tokens]])
                logits = functional_call(self.model, weights, (row,)).logits[0, -1].float()
            scores = (logits + bias) / max(asked.get("temperature", 0.5), 0.01)
            if (top_p := asked.get("top_p", 0.5)) < 1:
                ranked = scores.softmax(-1).sort(descending=True)
                outside = ranked.values.cumsum(0) - ranked.values >= top_p
                scores = scores.index_fill(0, ranked.indices[outside], -torch.inf)
            if asked.get("top_k", 1) or asked.get("repetition_penalty") != 1 or not asked["ignore_eos"]:
                scores = torch.full_like(scores, -torch.inf).index_fill(0, scores.argmax()[None], 0.0)
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            tokens.append(token)
            numbers.append(float((scores if self.processed else logits).log_softmax(-1)[token]))
            if token in asked["stop_token_ids"]:
                break
        if trouble == "stop":
            tokens, numbers = [asked["stop_token_ids"][0], *tokens], [numbers[0], *numbers]
        if trouble == "few":
            tokens, numbers = tokens[:-1], numbers[:-1]
        finish = "stop" if tokens and tokens[-1] in asked["stop_token_ids"] else "length"
        logprobs = {"token_logprobs": numbers, "tokens": [f"token_id:{token}" for token in tokens]}
        choice = {"text": "", "token_ids": tokens, "finish_reason": finish, "logprobs": logprobs}
        return {"model": asked["model"], "choices": [choice]}

    def completion(self, asked: Mapping[str, Any], trouble: str | None = None) -> dict[str, Any]:
        response: dict[str, Any] = {"choices": [{}]}
        if asked.get("return_token_ids"):
            response = self.sampled(asked, trouble)
            if not asked.get("prompt_logprobs"):
                return response
            asked = {name: value for name, value in asked.items() if name != "logprobs"}
        scored = self.scored(asked)
        scored["choices"][0] = {**scored["choices"][0], **response["choices"][0]}
        return scored

    def scored(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        prompt, k = list(asked["prompt"]), int(asked["prompt_logprobs"])
        if self.bos:
            prompt = [0, *prompt]
        logits = self.logprobs(prompt)
        scores = logits.log_softmax(-1)
        entries: list[dict[str, Any] | None] = [None]
        for at, token in enumerate(prompt[1:]):
            values, top = scores[at].topk(k)
            ranks = {token: int((scores[at] > scores[at, token]).sum()) + 1}
            ranks |= {index: rank for rank, index in enumerate(top.tolist(), 1)}
            known = {token: float(scores[at, token]), **dict(zip(top.tolist(), values.tolist(), strict=True))}
            entries.append(
                {
                    str(index): {"logprob": value, "rank": ranks[index], "decoded_token": self.decode(index)}
                    for index, value in known.items()
                }
            )
        if self.shift:
            moved = entries[1:]
            entries = [None, *moved[-self.shift :], *moved[: -self.shift]]
        following = (logits[-1] / self.hot).log_softmax(-1)
        sampled = int(following.argmax())
        choice: dict[str, Any] = {"text": "", "prompt_logprobs": entries, "logprobs": None}
        if "logprobs" in asked and self.samples and asked.get("return_tokens_as_token_ids"):
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{sampled}": float(following[sampled])}]}
        return {"model": asked["model"], "choices": [choice]}

    def decode(self, index: int) -> str:
        if index not in self._texts:
            self._texts[index] = self.tokenizer.decode([index])
        return self._texts[index]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with the default of 5, connections that are opened at once wait for seconds


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeVLLM
    protocol_version = "HTTP/1.1"
    under_way = 0
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgment of its headers

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, content: bytes, length: int | None = None) -> None:
        self._leave()  # before the client has the answer and asks again
        with suppress(OSError):  # the client may have gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
        self.close_connection = status != 200 or length is not None

    def _refused(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": {"message": message, "code": status}}).encode())

    def _knows_token(self) -> bool:
        token = self.server_state.token
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def do_GET(self) -> None:
        if not self._knows_token():
            return self._refused(401, "Unauthorized")
        return self._send(200, json.dumps(self.server_state.models()).encode())

    def do_POST(self) -> None:
        state = self.server_state
        if self.path != "/v1/completions":
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            return self._control(content)
        with state._lock:
            self.under_way = 1
            state._under_way += 1
            state.most = max(state.most, state._under_way)
        try:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        finally:
            self._leave()
        return None

    def _leave(self) -> None:
        with self.server_state._lock:
            self.server_state._under_way -= self.under_way
            self.under_way = 0

    def _control(self, content: bytes) -> None:
        state = self.server_state
        if not state.dev or not self._knows_token():
            return self._refused(*((404, "Not Found") if self._knows_token() else (401, "Unauthorized")))
        if self.path == "/collective_rpc":
            asked = json.loads(content)
            assert asked["method"] == "reload_weights"
            state.reload(asked["kwargs"]["weights_path"])
            return self._send(200, b'{"results": [null]}')
        assert self.path == "/reset_prefix_cache"
        if not state.keeps_cache:
            state.cache.clear()
        return self._send(200, b'{"success": true}')

    def _refusal(self, asked: Mapping[str, Any]) -> tuple[int, str] | None:
        state, k = self.server_state, asked.get("prompt_logprobs") or 0
        if not self._knows_token():
            return 401, "Unauthorized"
        if asked["model"] not in state.names:
            return 404, f"The model `{asked['model']}` does not exist."
        if asked["max_tokens"] < 1:
            return 400, "max_tokens must be at least 1"
        if k > state.max_logprobs:
            return 400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {state.max_logprobs}"
        if state.max_model_len is not None and len(asked["prompt"]) + asked["max_tokens"] > state.max_model_len:
            return 400, "This model's maximum context length is too small"
        return None

    def _answer(self, asked: Mapping[str, Any]) -> None:
        state = self.server_state
        if (refused := self._refusal(asked)) is not None:
            return self._refused(*refused)
        trouble = None
        # Short ones that sample nothing only ask for the largest K.
        counts = state.counts and (len(asked["prompt"]) > 2 or asked.get("return_token_ids"))
        if counts:
            with state._lock:
                trouble = state.troubles.pop(len(state.asked), None)
                state.asked.append(asked["prompt"])
        if state.dead or trouble == "die":
            if not state.dead:
                state.die()
            self.close_connection = True
            return None
        if trouble == "error":
            return self._refused(500, "EngineCore encountered an issue")
        if trouble == "restart":
            state.restart()
        time.sleep(state.slow if trouble == "slow" else 0)
        answer = state.completion(asked, trouble)
        if trouble == "few" and asked.get("prompt_logprobs"):
            del answer["choices"][0]["prompt_logprobs"][1]
        content = json.dumps(answer).encode()
        if trouble in ("cut", "short"):
            return self._send(200, content[:-20], len(content) if trouble == "short" else None)
        if counts and trouble is None:
            with state._lock:
                state.answered.append(asked["prompt"])
        return self._send(200, content)
