"""Sampling responses with transformers' ``generate``.

Shapes: B rollouts, P prompt tokens (padded on the left), T response tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from opdlab.errors import require
from opdlab.policies.decoding import Decoding, why_not_selectable
from opdlab.policies.language_model import LanguageModel
from opdlab.progress import Progress, SilentProgress
from opdlab.seeds import derive_seed, seeded
from opdlab.types import Rollouts, StopReason

Advance: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class SamplingConfig:
    """Options of sampling.

    Args:
        num_samples: responses per prompt.
        temperature: divides the logits; above 0.
        top_p: probability mass of the most likely tokens that are sampled from, above 0, at most 1. It affects
            sampling, not scoring.
        max_new_tokens: longest response in tokens, its stop token included.
        batch_size: responses sampled at a time.

    Raises:
        UsageError: a value is out of range.
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    batch_size: int = 64

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"num_samples is {self.num_samples}, but must be at least 1")
        require(self.temperature > 0, f"temperature is {self.temperature}, but must be above 0")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be above 0 and at most 1")
        require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}, but must be at least 1")


class Samples(NamedTuple):
    """Sampled responses, in host memory.

    Attributes:
        prompt_tokens: [B, P] long, padded on the left; each prompt is repeated once per response.
        prompt_mask: [B, P] bool.
        tokens: [B, T] long, padded on the right.
        mask: [B, T] bool: True up to and including the stop token.
        stop_reasons: [B] long, see :class:`StopReason`.
    """

    prompt_tokens: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    stop_reasons: Tensor

    def rollouts(
        self,
        prompt_ids: Sequence[int],
        temperature: float,
        *,
        first_rollout_id: int = 0,
        step: int = 0,
        snapshot_step: int = 0,
    ) -> Rollouts:
        """Return the responses as rollouts whose log-probabilities are not computed yet: they are 0.

        Args:
            prompt_ids: each prompt's row in its prompt set; all prompts have the same number of responses.
            temperature: the sampling temperature.
            first_rollout_id: id of the first rollout; the others follow consecutively.
            step: optimizer steps taken so far.
            snapshot_step: optimizer steps taken at the last refresh of the policy that sampled.
        """
        count = len(self.tokens)
        return Rollouts(
            self.prompt_tokens,
            self.prompt_mask,
            self.tokens,
            self.mask,
            behavior_logprobs=torch.zeros(self.tokens.shape),
            stop_reasons=self.stop_reasons,
            rollout_ids=torch.arange(first_rollout_id, first_rollout_id + count),
            prompt_ids=torch.tensor(prompt_ids).repeat_interleave(count // len(prompt_ids)),
            sampled_at_step=torch.full((count,), step),
            snapshot_step=torch.full((count,), snapshot_step),
            temperature=temperature,
        )


def uses_own_loop(model: PreTrainedModel) -> bool:
    """True if a model is sampled by :class:`opdlab.policies.decoding.Decoding`.

    Otherwise transformers' own loop is used, and the reason is logged once per process.

    Args:
        model: a causal language model.
    """
    reason = why_not_selectable(model)
    if reason is not None:
        _announce_fallback(type(model).__name__, reason)
    return reason is None


@functools.cache
def _announce_fallback(architecture: str, reason: str) -> None:
    rank_zero_info(f"sampling: {architecture} is decoded by transformers' own loop, which is slower, because {reason}")


class Sampler:
    """A sampler of responses from a language model.

    Args:
        config: see :class:`SamplingConfig`.
    """

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config

    def sample(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seed: int,
        progress: Progress | None = None,
    ) -> Samples:
        """Return ``num_samples`` sampled responses to each prompt; a prompt's responses are consecutive.

        Args:
            model: the policy; it samples on its own device, in eval mode.
            prompts: token ids.
            seed: determines the samples, independently of earlier random numbers.
            progress: shows a progress bar.
        """
        config, pad_id = self.config, model.tokenizer.pad_token_id
        width = max(map(len, prompts))
        masks = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
        padded = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
        decode = self._decode if uses_own_loop(model.model) else self._decode_in_chunks
        total = len(prompts) * config.num_samples * config.max_new_tokens
        with (progress or SilentProgress()).task("sampling", total) as advance:
            tokens = decode(model, padded, masks, seed, advance)
        mask, stop_reasons = _mask_after_stop(tokens, model.stop_ids)
        length = int(mask.sum(1).max())
        padded, masks = (prompt.repeat_interleave(config.num_samples, 0) for prompt in (padded, masks))
        return Samples(padded, masks, tokens[:, :length], mask[:, :length], stop_reasons)

    def _decode(self, model: LanguageModel, prompts: Tensor, mask: Tensor, seed: int, advance: Advance) -> Tensor:
        """Return responses decoded with :mod:`opdlab.policies.decoding`, [B, T] long."""
        loop = Decoding(self.config.num_samples, self.config.batch_size, advance)
        with seeded(derive_seed("sample", seed, 0), model.device):
            return self._generate(model, prompts, mask, custom_generate=loop)

    def _decode_in_chunks(
        self, model: LanguageModel, prompts: Tensor, mask: Tensor, seed: int, advance: Advance
    ) -> Tensor:
        """Return responses decoded with transformers' loop, [B, T] long; it reads each prompt once per response."""
        config = self.config
        prompts, mask = (tensor.repeat_interleave(config.num_samples, 0) for tensor in (prompts, mask))
        tokens = torch.full((len(prompts), config.max_new_tokens), model.tokenizer.pad_token_id)
        for start in range(0, len(prompts), config.batch_size):
            rows = slice(start, start + config.batch_size)
            tick = StoppingCriteriaList([_Tick(advance)])
            with seeded(derive_seed("sample", seed, start), model.device):
                new = self._generate(model, prompts[rows], mask[rows], stopping_criteria=tick)[:, prompts.shape[1] :]
            tokens[rows, : new.shape[1]] = new
            advance(len(new) * (config.max_new_tokens - new.shape[1]))
        return tokens

    @torch.no_grad()
    def _generate(self, model: LanguageModel, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
        config = GenerationConfig(
            do_sample=True,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=0,  # the default of transformers is 50
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=model.stop_ids,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        with _generating(model, config):
            output: Tensor = model.model.generate(
                tokens.to(model.device),
                attention_mask=mask.long().to(model.device),
                generation_config=config,
                **options,
            )
        return output.cpu()


class _Tick(StoppingCriteria):  # type: ignore[misc] # transformers is not typed
    """A stopping criterion that never stops; it advances the progress bar by one token per row."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._advance(len(input_ids))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _generating(model: LanguageModel, config: GenerationConfig) -> Iterator[None]:
    """Set eval mode and replace the model's generation defaults inside the context.

    Default penalties or a default top-k would otherwise change the samples without appearing in the configuration.
    """
    own, training = model.model.generation_config, model.model.training
    model.model.generation_config = config
    model.model.eval()
    try:
        yield
    finally:
        model.model.generation_config = own
        model.model.train(training)


def _mask_after_stop(tokens: Tensor, stop_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return the valid positions, [B, T] bool, and each row's stop reason, [B] long.

    Example:
        >>> mask, reasons = _mask_after_stop(torch.tensor([[5, 1, 0], [5, 5, 5]]), stop_ids=[1])
        >>> mask.int().tolist(), reasons.tolist()
        ([[1, 1, 0], [1, 1, 1]], [0, 1])
    """
    stops = torch.isin(tokens, torch.tensor(stop_ids))
    mask = stops.int().cumsum(1) - stops.int() == 0
    reasons = torch.where(stops.any(1), int(StopReason.EOS), int(StopReason.LENGTH))
    return mask, reasons
