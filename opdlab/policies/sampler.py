"""Sampling responses with transformers' ``generate``.

Shapes: B rollouts, P prompt tokens (padded on the left), T response tokens.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from opdlab.errors import require
from opdlab.policies.decoding import Decoding, NonFiniteLogitsError, why_not_selectable
from opdlab.policies.language_model import LanguageModel
from opdlab.progress import Progress, SilentProgress
from opdlab.seeds import derive_seed, seeded
from opdlab.types import Rollouts, StopReason, left_padded

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
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but must be at least 1")
        require(self.temperature > 0, f"temperature is {self.temperature}, but must be above 0")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be above 0 and at most 1")


def uses_own_loop(model: PreTrainedModel) -> bool:
    """True if a model is sampled by :class:`opdlab.policies.decoding.Decoding`.

    Otherwise transformers' own loop is used, and the reason is logged once per process.

    Args:
        model: a causal language model.
    """
    reason = why_not_selectable(model)
    if reason is not None:
        name = type(model).__name__
        _say_once(f"sampling: {name} is decoded by transformers' own loop, which is slower, because {reason}")
    return reason is None


_say_once = functools.cache(rank_zero_info)


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
        prompt_ids: Sequence[int] | None = None,
    ) -> Rollouts:
        """Return ``num_samples`` sampled responses to each prompt; a prompt's responses are consecutive.

        Args:
            model: the policy; it samples on its own device, in eval mode.
            prompts: token ids.
            seed: determines the samples, independently of earlier random numbers.
            progress: shows a progress bar.
            prompt_ids: each prompt's row in its prompt set; None numbers the prompts from 0.

        Returns:
            The responses, in host memory, with ids from 0. Their log-probabilities are not computed yet and are 0.
        """
        config = self.config
        padded, masks = left_padded(prompts, model.tokenizer.pad_token_id)
        total = len(prompts) * config.num_samples * config.max_new_tokens
        with (progress or SilentProgress()).task("sampling", total) as advance:
            if uses_own_loop(model.model):
                loop = Decoding(config.num_samples, config.batch_size, advance)
                with seeded(derive_seed("sample", seed, 0), model.device):
                    tokens = self._generate(model, padded, masks, custom_generate=loop)
            else:
                tokens = self._decode_in_chunks(model, padded, masks, seed, advance)
        stops = torch.isin(tokens, torch.tensor(model.stop_ids))
        mask = stops.int().cumsum(1) - stops.int() == 0  # up to and including the first stop token
        length, count = int(mask.sum(1).max()), len(tokens)
        prompt_rows = torch.tensor(range(len(prompts)) if prompt_ids is None else prompt_ids)
        padded, masks, prompt_rows = (t.repeat_interleave(config.num_samples, 0) for t in (padded, masks, prompt_rows))
        return Rollouts(
            padded,
            masks,
            tokens[:, :length],
            mask[:, :length],
            behavior_logprobs=torch.zeros(count, length),
            stop_reasons=torch.where(stops.any(1), int(StopReason.EOS), int(StopReason.LENGTH)),
            rollout_ids=torch.arange(count),
            prompt_ids=prompt_rows,
            sampled_at_step=torch.zeros(count, dtype=torch.long),
            snapshot_step=torch.zeros(count, dtype=torch.long),
            temperature=config.temperature,
        )

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
        network = model.model
        only_tokens = _OnlyTokens(model.vocab_size, check="custom_generate" not in options)
        config = GenerationConfig(
            do_sample=True,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=0,  # the default of transformers is 50
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=model.stop_ids,
            pad_token_id=model.tokenizer.pad_token_id,
        )
        # The model's own penalties or top-k would change the samples without appearing in the configuration.
        own, training = network.generation_config, network.training
        network.generation_config = config
        network.eval()
        try:
            output: Tensor = network.generate(
                tokens.to(model.device),
                attention_mask=mask.long().to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([only_tokens]),  # applied before temperature and top-p
                **options,
            )
        finally:
            network.generation_config = own
            network.train(training)
        return output.cpu()


class _OnlyTokens(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Gives probability 0 to the rows of the output layer beyond the model's tokens.

    Args:
        vocab_size: number of tokens.
        check: also raise :class:`NonFiniteLogitsError` for NaN or infinite logits, for which the device must be waited.
    """

    def __init__(self, vocab_size: int, check: bool) -> None:
        self._vocab_size, self._check = vocab_size, check

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._check and not bool(scores.amax(1).isfinite().all()):
            raise NonFiniteLogitsError
        if scores.shape[1] > self._vocab_size:
            scores[:, self._vocab_size :] = -torch.inf
        return scores


class _Tick(StoppingCriteria):  # type: ignore[misc] # transformers is not typed
    """A stopping criterion that never stops; it advances the progress bar by one token per row."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._advance(len(input_ids))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
