"""Comparison of an engine with the model whose weights it has taken over, on a few tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opdlab.policies.engines.requests import EngineAnswer, EngineRequest
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.served.probe import MAX_MEAN_DIFFERENCE, probe_tokens
from opdlab.types import Rollouts

Mode = Literal["raw", "processed"]
"""Log-probabilities of an engine: of the logits themselves, or after temperature and top-p."""
_NUM_SAMPLED, _TEMPERATURE, _SEED = 8, 2.0, 7
_LEAST_LIMIT, _TIMES_FIRST = 0.02, 8.0


def probe_requests(model: LanguageModel, excluded: tuple[int, ...]) -> list[EngineRequest]:
    """Return the requests of a probe: one scores its tokens, and one continues them from the engine's cache."""
    tokens = tuple(probe_tokens(model.tokenizer, model.vocab_size))
    score = EngineRequest(tokens, max_tokens=1, seed=_SEED, excluded=excluded, prompt_logprobs=True)
    return [score, EngineRequest(tokens, _NUM_SAMPLED, _SEED, _TEMPERATURE, excluded=excluded)]


@dataclass(frozen=True)
class ProbeResult:
    """Log-probabilities of the same tokens by an engine and by a model, nats.

    Args:
        engine: [24 + 7] of the prompt's tokens, and of those that the engine has sampled behind them.
        model: the same.
        num_sampled: number of the latter.
        mode: which log-probabilities of sampled tokens the engine gives, as the differences show.
    """

    engine: Tensor
    model: Tensor
    num_sampled: int
    mode: Mode

    @property
    def means(self) -> tuple[float, float]:
        """Return the mean absolute differences of the prompt's tokens and of the sampled ones."""
        differences = (self.engine - self.model).abs()
        return float(differences[: -self.num_sampled].mean()), float(differences[-self.num_sampled :].mean())

    @property
    def worst(self) -> float:
        """Return the larger one of :attr:`means`."""
        return max(self.means)

    def likely_cause(self, before: "ProbeResult | None", bound: float) -> str:
        """Return what probably explains a difference.

        Args:
            before: the probe after the last refresh, if there was one.
            bound: of a mean that is no more than rounding.
        """
        if before is not None and torch.equal(before.engine, self.engine):
            return "it still has the weights of the last refresh"
        if self.means[0] <= bound < self.means[1]:
            return "its cache of prompts is of earlier weights, or it changes the logits that it samples from"
        return (
            "a reload that leaves weights out (lm_head.weight of tied embeddings), other weights than the student's, "
            "or a quantized or narrower dtype"
        )


def limit(first: ProbeResult | None) -> float:
    """Return the mean difference that is accepted, given the first result: rounding differs little between refreshes.

    Example:
        >>> limit(None)
        0.25
    """
    if first is None:
        return MAX_MEAN_DIFFERENCE
    return min(MAX_MEAN_DIFFERENCE, max(_LEAST_LIMIT, _TIMES_FIRST * first.worst))


@torch.no_grad()
def local_logprobs(
    model: LanguageModel, tokens: Sequence[int], temperature: float = 1.0, all_rows: bool = True
) -> Tensor:
    """Return a model's log-probabilities of tokens from the second on, nats, in host memory.

    Args:
        model: scores the tokens.
        tokens: ids.
        temperature: divides the logits.
        all_rows: also of rows of the output layer that are no tokens, as an engine scores a prompt.
    """
    row = torch.tensor(tokens, device=model.device)[None]
    mask, zeros = torch.ones_like(row, dtype=torch.bool), torch.zeros(1, dtype=torch.long, device=model.device)
    parts = row[:, :1], mask[:, :1], row[:, 1:], mask[:, 1:], torch.zeros_like(row[:, 1:]).float()
    scored = model.score(Rollouts(*parts, *5 * (zeros,), temperature))
    if all_rows:
        scored = replace(scored, head=replace(scored.head, vocab_size=None))
    return scored.statistics().logprobs.float().cpu()


def probe_result(
    model: LanguageModel, requests: Sequence[EngineRequest], answers: Sequence[EngineAnswer]
) -> ProbeResult:
    """Return the comparison of an engine's answers to :func:`probe_requests` with a model.

    Args:
        model: with the weights that the engine should have.
        requests: the two requests.
        answers: the engine's.
    """
    scored, sampled = answers
    tokens, count = [*requests[0].prompt, *sampled.tokens], len(sampled.tokens)
    raw, theirs = local_logprobs(model, tokens), torch.tensor(sampled.logprobs)
    processed = local_logprobs(model, tokens, _TEMPERATURE, all_rows=False)[-count:]
    differences = [float((theirs - each).abs().mean()) for each in (raw[-count:], processed)]
    # Where the distribution is flat, both are alike.
    mode: Mode = "processed" if differences[0] - differences[1] > _LEAST_LIMIT / 2 else "raw"
    if mode == "processed":
        raw = torch.cat([raw[:-count], processed])
    return ProbeResult(torch.cat([torch.tensor(scored.prompt_logprobs), theirs]), raw, count, mode)
