"""Agreement of a served teacher with itself and with a local one, measured on a few tokens before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.errors import require
from opdlab.types import Rollouts

_NUM_TOKENS, _NUM_PROMPT = 24, 4
MAX_MEAN_DIFFERENCE = 0.25
"""Nats: a server in bfloat16 stays below it, another model does not."""


def probe_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Return the tokens of the probe: the same random ones for each run, and the last of the vocabulary.

    They need not make sense: a shift by one position changes the log-probabilities of any tokens by nats.

    Example:
        >>> from opdlab.toy import chain_tokenizer
        >>> tokens = probe_tokens(chain_tokenizer(), 38)
        >>> len(tokens), tokens == probe_tokens(chain_tokenizer(), 38), tokens[-1]
        (24, True, 37)
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(index for index in tokenizer.get_vocab().values() if index < vocab_size and index not in special)
    chosen = torch.randint(len(ids), (_NUM_TOKENS - 1,), generator=torch.Generator().manual_seed(0))
    return [*(ids[index] for index in chosen.tolist()), vocab_size - 1]


def probe_rollouts(tokens: Sequence[int]) -> Rollouts:
    """Return two rollouts: of all tokens of a probe, and of the first half of its response.

    The log-probabilities of the tokens that both have must not depend on what follows.
    """
    prompt, response = torch.tensor(tokens[:_NUM_PROMPT]), torch.tensor(tokens[_NUM_PROMPT:])
    mask = torch.ones(2, len(response), dtype=torch.bool)
    mask[1, len(response) // 2 :] = False
    zeros = torch.zeros(2, dtype=torch.long)
    prompts = prompt.repeat(2, 1), torch.ones(2, _NUM_PROMPT, dtype=torch.bool)
    return Rollouts(*prompts, response.repeat(2, 1) * mask, mask, torch.zeros(mask.shape), *5 * (zeros,))


def self_difference(logprobs: Tensor, name: str) -> float:
    """Return the largest difference between the two rollouts of :func:`probe_rollouts`, nats.

    Args:
        logprobs: [2, T], nats.
        name: of the server.

    Raises:
        UsageError: a token's log-probability depends on the tokens behind it.
    """
    half = logprobs.shape[1] // 2
    largest = float((logprobs[0, :half] - logprobs[1, :half]).abs().max())
    require(
        largest < 1.0,
        f"{name} gives a token log-probabilities that differ by {largest:.2g} nats, depending on the tokens behind it: "
        "its positions are shifted, or its model is not causal",
    )
    return largest


@dataclass(frozen=True)
class Agreement:
    """Differences between the log-probabilities of a served and a local teacher on the same tokens, nats.

    Args:
        largest: over the tokens.
        mean: of the absolute differences.
        shifted: the same mean if the server's values are moved by a position, by the shift.
    """

    largest: float
    mean: float
    shifted: dict[int, float]


def agreement(served: Tensor, local: Tensor, name: str) -> Agreement:
    """Return how far two teachers agree.

    Args:
        served: [T], nats.
        local: [T], nats.
        name: of the server, for messages.

    Raises:
        UsageError: the values agree better after a shift by a position, or not at all.

    Example:
        >>> values = torch.tensor([-1.0, -4.0, -2.0, -7.0])
        >>> agreement(values + 0.01, values, "it").mean < 0.02
        True
        >>> agreement(values.roll(1), values, "it")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: it gives the log-probabilities of the local teacher, but moved by +1 position ...
    """
    difference = (served - local).abs()
    shifted = {
        shift: float((served.roll(-shift) - local)[max(0, -shift) : len(local) - max(0, shift)].abs().mean())
        for shift in (-1, 1)
    }
    found = Agreement(float(difference.max()), float(difference.mean()), shifted)
    best = min(shifted, key=shifted.__getitem__)
    require(
        not (shifted[best] < MAX_MEAN_DIFFERENCE < found.mean),
        f"{name} gives the log-probabilities of the local teacher, but moved by {best:+d} position (mean difference "
        f"{shifted[best]:.2g} nats there, {found.mean:.2g} in place): its positions are wrong",
    )
    require(
        found.mean < MAX_MEAN_DIFFERENCE,
        f"{name} and the local teacher differ by {found.mean:.2g} nats in the mean, at most by {found.largest:.2g}: "
        "they are different models, or the server puts a template or a token before what it is sent",
    )
    return found
