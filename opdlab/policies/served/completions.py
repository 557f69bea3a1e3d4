"""The protocol of vLLM: ``/v1/completions`` with ``prompt_logprobs``.

A server of this kind knows log-probabilities at temperature 1 of the tokens of a prompt and of the K most likely tokens
at each of its positions. What follows from them is served: everything at temperature 1 but hidden states and entropy;
at another temperature the ratios of the K probabilities, which is what ``renormalize`` compares.

Shapes: T response tokens, K support, W entries of a position.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.served.connection import Ask, BadAnswerError, RefusedError, ServerError, Servers
from opdlab.records import digest
from opdlab.types import Rollouts, Targets, TeacherRequest, id_dtype

MIN_TAIL = 1e-6
"""Smallest probability outside a support: 1 less the sum of float32 probabilities is not known better."""
_PATH = "/v1/completions"
_SPARE = (8, 4, 2, 1, 0)  # more tokens than K, of which those that the student lacks are dropped
_FINGERPRINT_STEPS = 16  # a nat is divided into, because the same server repeats its numbers up to rounding
_ELSEWHERE = "take a LocalTeacher, or start the server with `opdlab serve-teacher`"


class Completions:
    """Client of servers that speak vLLM's protocol.

    Args:
        servers: all serve the same model.
        model: its name there.
        vocab_size: number of the student's tokens.
        max_length: tokens of a prompt and one more that the servers take; None if they do not say it.
    """

    stop_tokens = None
    weights_digest = None

    def __init__(self, servers: Servers, model: str, vocab_size: int, max_length: int | None) -> None:
        self._servers, self._model, self._max_length = servers, model, max_length
        self.vocab_size = vocab_size
        self._spare: dict[int, int] = {}  # by K
        self._probe: list[float] = []

    def check(self, request: TeacherRequest, temperature: float) -> None:
        """Raise a UsageError if a request cannot be served at a temperature, or if K is above a server's maximum."""
        lacks = {
            "the student's most likely tokens under the teacher (support student or union)": request.behavior_top_k,
            "the teacher's hidden states (the whole vocabulary)": request.hidden,
            "the teacher's entropy": request.entropy,
            f"the teacher's log-probabilities at temperature {temperature:g}": temperature != 1
            and (request.logprobs or request.tail),
        }
        for what, wanted in lacks.items():
            cold = (
                " (at temperature 1 they are known, and tail renormalize works at any)" if "temperature" in what else ""
            )
            require(
                not wanted,
                f"model.teacher is a ServedTeacher of {self._servers.urls[0]}, whose protocol does not give {what}, "
                f"but model.objective, model.gate or model.evaluation needs them{cold}: {_ELSEWHERE}",
            )
        if request.top_k and request.top_k not in self._spare:
            self._spare[request.top_k] = min(
                self._find_spare(request.top_k, server) for server in range(len(self._servers.urls))
            )

    def _find_spare(self, k: int, server: int) -> int:
        """Return how many tokens more than K a server gives.

        Raises:
            UsageError: it gives less than K.
        """
        refused: RefusedError | None = None
        for spare in _SPARE:
            try:
                self._servers.ask(self._ask([0, 0], k + spare, lambda content: content, server=server))
            except RefusedError as error:
                refused = error
            else:
                return spare
        assert refused is not None
        raise UsageError(
            f"model.objective compares {k} tokens, but the server {refused.url} does not give so many "
            f"({refused.status}: {refused.said}): start vLLM with --max-logprobs {k + _SPARE[0]}, or lower "
            "model.objective.k"
        ) from refused

    def _ask(
        self,
        tokens: Sequence[int],
        num: int,
        read: Callable[[bytes], Any],
        server: int | None = None,
        why: str = "",
        **options: Any,
    ) -> Ask:
        # One token is sampled in any case: vLLM refuses max_tokens 0.
        content = {"model": self._model, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": max(1, num), **options}

        def body() -> bytes:
            return json.dumps({**content, "prompt": list(tokens)}).encode()

        return Ask(_PATH, read, body, server=server, why=why)

    # -- scoring -------------------------------------------------------------------------------------------------

    def jobs(self, rollouts: Rollouts, request: TeacherRequest) -> list[tuple[Tensor, Ask]]:
        """Return the requests that score rollouts, each with its rows; rows without a valid token need none.

        Args:
            rollouts: as the teacher sees them.
            request: checked.

        Raises:
            UsageError: a rollout is longer than a server's maximum.
        """
        valid = rollouts.mask.bool()
        lengths = (valid * torch.arange(1, valid.shape[1] + 1)).amax(1).tolist()
        jobs = []
        for row in sorted(range(len(rollouts)), key=lambda row: -lengths[row]):
            if not lengths[row]:
                continue
            prompt = rollouts.prompt_tokens[row][rollouts.prompt_mask[row].bool()].tolist()
            tokens = prompt + rollouts.tokens[row, : lengths[row]].tolist()
            require(
                self._max_length is None or len(tokens) < self._max_length,
                f"a rollout has {len(tokens)} tokens with its prompt, but the server {self._servers.urls[0]} takes "
                f"{(self._max_length or 1) - 1}: start vLLM with --max-model-len {len(tokens) + 1} or more, or lower "
                "model.sampling.max_new_tokens",
            )
            where = valid[row, : lengths[row]]
            num = request.top_k + self._spare.get(request.top_k, 0) if request.top_k else 0
            jobs.append((torch.tensor([row]), self._scoring(tokens, where, request, rollouts.temperature, num)))
        return jobs

    def _scoring(
        self, tokens: list[int], valid: Tensor, request: TeacherRequest, temperature: float, num: int, why: str = ""
    ) -> Ask:
        """Return the request that scores the last T of some tokens, with ``num`` entries of each position."""
        vocab_size = min(self.vocab_size, request.vocab_size or self.vocab_size)

        def read(content: bytes) -> Targets | Ask:
            ids, logprobs, own = read_scores(content, tokens, len(tokens) - len(valid))
            order, enough = most_likely(ids, logprobs, request.top_k, vocab_size)
            if not enough[valid.numpy()].all():  # the student lacks too many of them
                lacks = f"; of its {num} most likely tokens the student has less than the {request.top_k} of "
                lacks += f"model.objective.k: start vLLM with --max-logprobs {2 * num} or more, or lower k"
                return self._scoring(tokens, valid, request, temperature, 2 * num, lacks)
            ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
            return targets_of(ids, logprobs, own, valid, request, temperature, vocab_size)

        return self._ask(tokens, num, read, why=why)

    # -- start ---------------------------------------------------------------------------------------------------

    def probe(self, tokens: Sequence[int], texts: Mapping[int, str]) -> float | None:
        """Check that the servers score the tokens that they are sent, at their positions and with their texts.

        The distribution from which a server would sample the next token must be the one that it gives for the prompt's
        next position: that finds shifted positions, templates and added tokens.

        Args:
            tokens: at least 8.
            texts: of tokens, as the student's tokenizer decodes them.

        Returns:
            The largest difference between the two distributions, nats; None if no server gives the first one.

        Raises:
            ServerError: they do not.
        """
        middle, largest, values = len(tokens) // 2, None, []
        for server, url in enumerate(self._servers.urls):
            entries = self._servers.ask(self._ask(tokens, 1, partial(read_entries, num=len(tokens)), server))
            _check_positions(entries, tokens, url)
            _check_texts(entries, tokens, texts, url)
            values.append([float(entries[at][str(token)]["logprob"]) for at, token in enumerate(tokens) if at])
            worst = max(abs(mine - first) for mine, first in zip(values[-1], values[0], strict=True))
            require(
                worst < 1.0,
                f"the servers {self._servers.urls[0]} and {url} give log-probabilities that differ by {worst:.2g} "
                "nats: all must serve the same weights",
            )
            sampled = self._servers.ask(
                self._ask(
                    tokens[:middle], 1, _read_next, server, logprobs=1, return_tokens_as_token_ids=True, temperature=1.0
                )
            )
            for token, logprob in sampled.items():
                follow = [*tokens[:middle], token, *tokens[middle + 1 :]]
                again = self._servers.ask(self._ask(follow, 1, partial(read_entries, num=len(follow)), server))
                shifts = {
                    shift: abs(float(again[middle + shift].get(str(token), {"logprob": -1e4})["logprob"]) - logprob)
                    for shift in (-1, 0, 1)
                }
                best = min(shifts, key=shifts.__getitem__)
                require(
                    best == 0 or shifts[0] - shifts[best] < 0.1,
                    f"the server {url} samples a token with log-probability {logprob:.3f}, but gives this number at "
                    f"position {best:+d} of the prompt beside it: its prompt_logprobs are shifted",
                )
                require(
                    shifts[0] < 1.0,
                    f"the server {url} gives log-probabilities that differ by {shifts[0]:.2g} nats from those that it "
                    "samples from: start it without options that change log-probabilities",
                )
                largest = max(largest or 0.0, shifts[0])
        self._probe = values[0]
        return largest

    def fingerprint(self) -> str:
        """Return a digest of the model's name and of the probe's log-probabilities, rounded to a sixteenth nat."""
        return digest([self._model, self.vocab_size, [round(value * _FINGERPRINT_STEPS) for value in self._probe]])


def read_entries(content: bytes, num: int) -> list[dict[str, Any]]:
    """Return the entries of ``prompt_logprobs``, one a token of the prompt; the first is empty.

    Args:
        content: of an answer.
        num: tokens of the prompt.

    Raises:
        BadAnswerError: the answer is cut off, or has another number of entries.
    """
    try:
        entries = json.loads(content)["choices"][0]["prompt_logprobs"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadAnswerError(f"no JSON with choices[0].prompt_logprobs ({len(content)} bytes)") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries[1:]):
        raise BadAnswerError("prompt_logprobs is no list of a null and of mappings: is it a server of vLLM?")
    if len(entries) != num or not all(entries[1:]):
        raise BadAnswerError(
            f"prompt_logprobs has {sum(map(bool, entries)) + 1} entries for {num} tokens; with less, start vLLM with "
            "--no-enable-prefix-caching"
        )
    return [{}, *entries[1:]]


def read_scores(content: bytes, tokens: Sequence[int], start: int) -> tuple[Any, Any, Any]:
    """Return the entries of the tokens from ``start`` on as arrays.

    Args:
        content: of an answer.
        tokens: of the prompt.
        start: at least 1.

    Returns:
        Ids, [T, W] int64; their log-probabilities, [T, W] float64 nats, -inf where a position has less than W entries;
        and those of the tokens themselves, [T].

    Raises:
        BadAnswerError: the answer is cut off, or lacks a token.

    Example:
        >>> scores = [None, {"7": {"logprob": -1.0}, "4": {"logprob": -0.5}}]
        >>> read_scores(json.dumps({"choices": [{"prompt_logprobs": scores}]}).encode(), [3, 7], 1)
        (array([[7, 4]]), array([[-1. , -0.5]]), array([-1.]))
    """
    entries = read_entries(content, len(tokens))[start:]
    width = max(map(len, entries))
    ids = np.full((len(entries), width), np.iinfo(np.int64).max)
    logprobs, own = np.full(ids.shape, -np.inf), np.empty(len(entries))
    try:
        for place, (entry, token) in enumerate(zip(entries, tokens[start:], strict=True)):
            ids[place, : len(entry)] = [int(name) for name in entry]
            logprobs[place, : len(entry)] = [each["logprob"] for each in entry.values()]
            own[place] = entry[str(token)]["logprob"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadAnswerError(f"the entry of prompt token {start + place} has no log-probability of it") from error
    if not np.isfinite(own).all() or np.isnan(logprobs).any() or own.max(initial=0.0) > 1e-3:
        raise BadAnswerError("a log-probability is no number, or above 0")
    return ids, logprobs, own


def most_likely(ids: Any, logprobs: Any, k: int, vocab_size: int) -> tuple[Any, Any]:
    """Return the columns of the K most likely tokens that the student has, and where there are K.

    Args:
        ids: [T, W].
        logprobs: [T, W], nats.
        k: K.
        vocab_size: number of the student's tokens; ids from it on are dropped.

    Returns:
        Columns, [T, K], most likely first; and a mask, [T].

    Example:
        >>> most_likely(np.array([[7, 99, 4]]), np.array([[-2.0, -0.1, -0.5]]), 2, vocab_size=50)
        (array([[2, 0]]), array([ True]))
    """
    kept = np.where(ids < vocab_size, logprobs, -np.inf)
    enough = (kept > -np.inf).sum(1) >= k
    return np.argsort(-kept, axis=1, kind="stable")[:, :k], enough


def targets_of(
    ids: Any, logprobs: Any, own: Any, valid: Tensor, request: TeacherRequest, temperature: float, vocab_size: int
) -> Targets:
    """Return the targets of one rollout, [1, T, …].

    Logits are log-probabilities at temperature 1, divided by the temperature; so the log-normalizer is 0 at 1.

    Args:
        ids: [T, K].
        logprobs: [T, K], nats, at temperature 1.
        own: [T], nats, of the sampled tokens.
        valid: [T] bool.
        request: what is wanted.
        temperature: of the rollouts.
        vocab_size: number of the student's tokens.
    """
    k = ids.shape[1]
    inside = np.minimum(np.exp(logprobs).sum(1), 1.0)
    columns: dict[str, Any] = {
        "logprobs": own if temperature == 1 else own * np.nan,
        "support_ids": np.minimum(ids, vocab_size - 1) if k else None,
        "support_logits": logprobs / temperature if k else None,
        "support_mass": inside if k and temperature == 1 else None,
        "log_normalizer": np.zeros(len(own)) if request.tail else None,
        "log_tail": np.log(np.maximum(1 - inside, MIN_TAIL)) if request.tail and k else None,
    }
    found = {}
    for name, values in columns.items():
        if values is not None:
            tensor = torch.from_numpy(np.ascontiguousarray(values))
            tensor = tensor.masked_fill(~valid.view(-1, *[1] * (tensor.ndim - 1)), 0)
            found[name] = tensor.to(id_dtype(vocab_size) if name == "support_ids" else torch.float32)[None]
    return Targets(**found)


def _read_next(content: bytes) -> dict[int, float]:
    """Return log-probabilities of the next token by id; empty if the server does not give them by id."""
    try:
        first = (json.loads(content)["choices"][0]["logprobs"] or {}).get("top_logprobs") or [{}]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    names = {name: value for name, value in first[0].items() if name.startswith("token_id:")}
    return {int(name.removeprefix("token_id:")): float(value) for name, value in names.items()}


def _check_positions(entries: Sequence[Mapping[str, Any]], tokens: Sequence[int], url: str) -> None:
    """Raise a ServerError if entries do not have the tokens of their positions."""

    def share(shift: int) -> float:
        places = [(at, at + shift) for at in range(1, len(tokens)) if 1 <= at + shift < len(tokens)]
        return sum(str(tokens[at]) in entries[where] for at, where in places) / len(places)

    shares = {shift: share(shift) for shift in (-1, 0, 1)}
    if shares[0] == 1.0:
        return
    best = max(shares, key=shares.__getitem__)
    raise ServerError(
        f"the teacher's server {url} does not score the tokens that it is sent: "
        + (
            f"its prompt_logprobs are shifted by {best:+d} position"
            if best and shares[best] == 1.0
            else f"only {shares[0]:.0%} of its entries name the token of their position"
        )
        + "; it must be vLLM's /v1/completions, which takes token ids and adds none"
    )


def _check_texts(
    entries: Sequence[Mapping[str, Any]], tokens: Sequence[int], texts: Mapping[int, str], url: str
) -> None:
    """Raise a ServerError if most tokens have another text there; single ones may be decoded in another way."""
    theirs = {token: entries[at][str(token)].get("decoded_token") for at, token in enumerate(tokens) if at}
    known = {
        token: text
        for token, text in theirs.items()
        if isinstance(text, str) and "\N{REPLACEMENT CHARACTER}" not in text + texts[token]
    }
    wrong = [token for token, text in known.items() if text.strip() != texts[token].strip()]
    if len(wrong) > len(known) / 2:
        raise ServerError(
            f"the teacher's server {url} has another vocabulary: token {wrong[0]} is {known[wrong[0]]!r} to it and "
            f"{texts[wrong[0]]!r} to the student; serve a model with the student's tokenizer"
        )
