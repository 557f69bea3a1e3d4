"""What vLLM's answers hold: log-probabilities of a prompt's tokens and of the most likely ones, as targets.

Shapes: T response tokens, K support, W entries of a position.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.policies.served.connection import BadAnswerError
from opdlab.types import Targets, TeacherRequest, id_dtype

MIN_TAIL = 1e-6
"""Smallest probability outside a support: 1 less the sum of float32 probabilities is not known better."""


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
