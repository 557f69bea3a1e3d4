"""The protocol of vLLM: ``/v1/completions`` with ``prompt_logprobs``.

A server of this kind knows log-probabilities at temperature 1 of the tokens of a prompt and of the K most likely tokens
at each of its positions. What follows from them is served: everything at temperature 1 but hidden states and entropy;
at another temperature the ratios of the K probabilities, which is what ``renormalize`` compares.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.served.connection import Ask, RefusedError, ServerError, Servers
from opdlab.policies.served.prompt_scores import most_likely, read_entries, read_scores, targets_of
from opdlab.records import digest
from opdlab.types import Rollouts, Targets, TeacherRequest

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
        for spare in (each for each in _SPARE if not each or k + each <= self.vocab_size):
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
        differences, values = [], []
        for server, url in enumerate(self._servers.urls):
            entries = self._entries(tokens, server)
            _check_positions(entries, tokens, url)
            _check_texts(entries, tokens, texts, url)
            values.append([_logprob(entries[at], token, url) for at, token in enumerate(tokens) if at])
            worst = max(abs(mine - first) for mine, first in zip(values[-1], values[0], strict=True))
            require(
                worst < 1.0,
                f"the servers {self._servers.urls[0]} and {url} give log-probabilities that differ by {worst:.2g} "
                "nats: all must serve the same weights",
            )
            differences += self._next_differences(tokens, server)
        self._probe = values[0]
        return max(differences, default=None)

    def _entries(self, tokens: Sequence[int], server: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self._servers.ask(
            self._ask(tokens, 1, partial(read_entries, num=len(tokens)), server)
        )
        return entries

    def _next_differences(self, tokens: Sequence[int], server: int) -> list[float]:
        """Return how far what a server samples from is from what it gives for the same token in a prompt, nats."""
        middle, url, differences = len(tokens) // 2, self._servers.urls[server], []
        options: dict[str, Any] = {"logprobs": 1, "return_tokens_as_token_ids": True}
        sampled = self._servers.ask(self._ask(tokens[:middle], 1, _read_next, server, **options))
        for token, logprob in sampled.items():
            entries = self._entries([*tokens[:middle], token, *tokens[middle + 1 :]], server)
            shifts = {
                shift: abs(_logprob(entries[middle + shift], token, url) - logprob)
                for shift in (-1, 0, 1)
                if not shift or str(token) in entries[middle + shift]
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
            differences.append(shifts[0])
        return differences

    def fingerprint(self) -> str:
        """Return a digest of the model's name and of the probe's log-probabilities, rounded to a sixteenth nat."""
        return digest([self._model, self.vocab_size, [round(value * _FINGERPRINT_STEPS) for value in self._probe]])


def _read_next(content: bytes) -> dict[int, float]:
    """Return log-probabilities of the next token by id; empty if the server does not give them by id."""
    try:
        first = (json.loads(content)["choices"][0]["logprobs"] or {}).get("top_logprobs") or [{}]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}
    names = {name: value for name, value in first[0].items() if name.startswith("token_id:")}
    return {int(name.removeprefix("token_id:")): float(value) for name, value in names.items()}


def _logprob(entry: Mapping[str, Any], token: int, url: str) -> float:
    """Return a token's log-probability in an entry."""
    try:
        return float(entry[str(token)]["logprob"])
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(
            f"the teacher's server {url} gives no log-probability of token {token} at its place"
        ) from error


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
