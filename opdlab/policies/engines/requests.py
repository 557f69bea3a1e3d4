"""What an engine is asked for, what it answers, and what is wrong with an answer."""

import math
from dataclasses import dataclass
from typing import Any

from opdlab.errors import require

LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""
_NEVER = -100.0  # vLLM's lowest bias of a logit


def check_temperature(temperature: float) -> None:
    """Raise a UsageError if vLLM does not sample at a temperature."""
    require(
        temperature >= LOWEST_TEMPERATURE,
        f"temperature is {temperature:g}, but vLLM samples at {LOWEST_TEMPERATURE} or above: raise it, or set "
        "model.sampler to transformers",
    )


@dataclass(frozen=True)
class EngineRequest:
    """One response that an engine samples. Equal requests have equal answers, whatever is sampled beside them.

    Args:
        prompt: token ids.
        max_tokens: tokens of the longest response.
        seed: of the response's random numbers.
        temperature: divides the logits.
        top_p: probability mass that is sampled from.
        stops: token ids at which the response ends.
        excluded: token ids that are never sampled.
        prompt_logprobs: True if the tokens of the prompt are scored too.

    Example:
        >>> options = EngineRequest((5, 9), max_tokens=4, seed=7, stops=(1,)).options()
        >>> options["max_tokens"], options["stop_token_ids"], options["ignore_eos"]
        (4, [1], True)
    """

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stops: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    prompt_logprobs: bool = False

    def options(self) -> dict[str, Any]:
        """Return vLLM's sampling parameters, with the same names in Python and in JSON.

        All are given, because vLLM takes those that are missing from the model's ``generation_config.json``.
        """
        options: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.stops),
            "ignore_eos": True,  # the model's own stop tokens may be others
            "logprobs": 0,  # of the sampled token alone
        }
        if self.excluded:
            options["logit_bias"] = dict.fromkeys(map(str, self.excluded), _NEVER)
        if self.prompt_logprobs:
            options["prompt_logprobs"] = 1
        return options


@dataclass(frozen=True)
class EngineAnswer:
    """A sampled response.

    Args:
        tokens: the stop token included.
        logprobs: of each token, nats.
        prompt_logprobs: of the prompt's tokens from the second on, nats; empty if they were not asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]

    def fault(self, request: EngineRequest) -> str | None:
        """Return what is wrong with the answer to a request, or None.

        Example:
            >>> EngineAnswer([7, 1], [-0.5, -0.1], []).fault(EngineRequest((5,), 4, seed=0, stops=(1,)))
            >>> EngineAnswer([7, 8], [-0.5, -0.1], []).fault(EngineRequest((5,), 4, seed=0, stops=(1,)))
            'a response ends after 2 of 4 tokens without a stop token'
        """
        stopped = [place for place, token in enumerate(self.tokens) if token in request.stops]
        count, numbers = len(self.tokens), [*self.logprobs, *self.prompt_logprobs]
        if not count or count > request.max_tokens:
            return f"a response has {count} tokens, but must have 1 to {request.max_tokens}"
        if stopped and stopped[0] != count - 1:
            return f"a response goes on after the stop token {self.tokens[stopped[0]]}"
        if not stopped and count < request.max_tokens:
            return f"a response ends after {count} of {request.max_tokens} tokens without a stop token"
        if not set(self.tokens).isdisjoint(request.excluded):
            return f"a response has the token {max(self.tokens)}, which the student lacks"
        if len(self.logprobs) != count:
            return f"there are {len(self.logprobs)} log-probabilities of {count} tokens"
        if request.prompt_logprobs and len(self.prompt_logprobs) != len(request.prompt) - 1:
            return f"there are {len(self.prompt_logprobs)} log-probabilities of {len(request.prompt) - 1} prompt tokens"
        if not all(math.isfinite(number) and number < 1e-3 for number in numbers):  # 1e-3: rounding
            return "a log-probability is no number, or above 0"
        return None
