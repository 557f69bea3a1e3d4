"""Samplers: options of sampling, the interface and its registry, and the rollouts that they give.

Shapes: P prompts, n samples of each, N = P * n rollouts, T response tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.policies.language_model import LanguageModel
from opdlab.progress import Progress, SilentProgress
from opdlab.registry import Registry
from opdlab.types import Rollouts, StopReason, left_padded


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


@dataclass(frozen=True)
class Samples:
    """The output of a sampler.

    Args:
        tokens: [N, T] long: responses, from column 0, each up to its first stop token, that included; a prompt's are in
            consecutive rows.
        mask: [N, T] bool: valid positions, at least one in each row.
        logprobs: [N, T] float32, nats: of the tokens as the sampler's own engine computes them, at the sampling
            temperature and before top-p; or None.

    Example:
        >>> Samples(torch.tensor([[7, 1]]), torch.tensor([[True, True]])).logprobs is None
        True
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor | None = None


class Sampler(ABC):
    """Base of all samplers, which sample responses from a language model's weights.

    A sampler only chooses tokens: the behavior snapshot scores them, whatever sampled them. Its constructor is also
    called to check a configuration, so it must not load anything; :meth:`setup` may.
    """

    gives_logprobs: ClassVar[bool] = False
    """True if :attr:`Samples.logprobs` is not None wherever :meth:`knows_logprobs` is true."""
    _in_use: tuple[LanguageModel, Hashable] | None = None

    def setup(self, model: LanguageModel) -> None:
        """Prepare for a model, once, before training; does nothing by default.

        Args:
            model: of the shapes, tokenizer and vocabulary that will be sampled from; its weights will change.

        Raises:
            UsageError: the sampler does not support the model.
        """
        del model

    @abstractmethod
    def refresh(self, model: LanguageModel, step: int) -> None:
        """Take over the weights of a model; :meth:`sample` samples from these.

        Args:
            model: on the device on which it works; its weights do not change until the samples are taken. Weights that
                are sharded over processes are gathered. They are freed afterwards: copy what is kept.
            step: optimizer steps that the weights have taken.
        """

    @abstractmethod
    def sample(
        self, prompts: Sequence[Sequence[int]], streams: Tensor, config: SamplingConfig, progress: Progress
    ) -> Samples:
        """Return sampled responses.

        A response must depend on its prompt, its stream and the weights alone, up to rounding: not on other prompts,
        on their order or on the process.

        Args:
            prompts: P prompts, token ids.
            streams: [P, n] long, in host memory: a random stream for each response, see
                :func:`opdlab.seeds.derive_streams`.
            config: ``num_samples`` is ignored, since ``streams`` has n.
            progress: a task of ``N * max_new_tokens`` units, named ``sampling``, shows a progress bar.

        Raises:
            NonFiniteLogitsError: the logits are NaN or infinite.
        """

    def knows_logprobs(self, config: SamplingConfig) -> bool:
        """True if the samples that are taken with some options have log-probabilities; by default always or never."""
        del config
        return self.gives_logprobs

    def release(self) -> None:
        """Free the memory that only sampling needs, until the next call; does nothing by default."""
        return

    def use(self, model: LanguageModel, step: int, version: Hashable) -> None:
        """Call :meth:`refresh` unless this version of the model's weights is in use already.

        Args:
            model: see :meth:`refresh`.
            step: see there.
            version: differs whenever the model's weights may differ.
        """
        if self._in_use is None or self._in_use[0] is not model or self._in_use[1] != version:
            self._in_use = None  # if the refresh fails
            self.refresh(model, step)
            self._in_use = model, version


_REGISTRY: Registry[Sampler] = Registry("sampler", Sampler, "opdlab.policies", "opdlab.samplers")  # type: ignore[type-abstract]


def sampler_registry() -> Registry[Sampler]:
    """Return the registry of samplers, for the command line."""
    return _REGISTRY


register_sampler = _REGISTRY.register
"""Class decorator that registers a sampler under a name; see :meth:`opdlab.registry.Registry.register`."""


def sample_rollouts(
    sampler: Sampler,
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    streams: Tensor,
    config: SamplingConfig,
    *,
    progress: Progress | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> Rollouts:
    """Return sampled responses to each prompt as rollouts; a prompt's are consecutive.

    Args:
        sampler: uses the weights of ``model``.
        model: the policy.
        prompts: P prompts, token ids.
        streams: [P, n] long: random streams of the responses, see :func:`opdlab.seeds.derive_streams`.
        config: options of sampling, of which ``num_samples`` is ignored.
        progress: shows a progress bar.
        prompt_ids: each prompt's row in its prompt set; None numbers the prompts from 0.

    Returns:
        N rollouts, in host memory, with ids from 0. Their log-probabilities are not computed yet and are 0.

    Raises:
        UsageError: the sampler returns something that is not N responses.
    """
    samples = sampler.sample(prompts, streams, config, progress or SilentProgress())
    count, samples_each, mask = streams.numel(), streams.shape[1], samples.mask
    length = int(mask.sum(1).max()) if mask.numel() else 0
    require(
        samples.tokens.shape == mask.shape and len(mask) == count and 0 < length <= config.max_new_tokens,
        f"{type(sampler).__name__}.sample returned tokens of shape {tuple(samples.tokens.shape)} with a mask of shape "
        f"{tuple(mask.shape)} and up to {length} valid positions, but must return {count} responses of 1 to "
        f"{config.max_new_tokens} tokens",
    )
    require(
        samples.logprobs is not None or not sampler.knows_logprobs(config),
        f"{type(sampler).__name__}.gives_logprobs is true, but its sample returned none: return them, or set it to "
        "false",
    )
    mask, tokens = mask[:, :length], samples.tokens[:, :length]
    tokens = tokens.masked_fill(~mask, model.tokenizer.pad_token_id)
    largest = int(tokens.max())
    require(
        largest < model.vocab_size,
        f"{type(sampler).__name__}.sample returned the token {largest}, but the student has {model.vocab_size} tokens "
        "that it may sample",
    )
    stopped = (torch.isin(tokens, torch.tensor(model.stop_ids)) & mask).any(1)
    rows = torch.tensor(range(len(prompts)) if prompt_ids is None else prompt_ids)
    padded = left_padded(prompts, model.tokenizer.pad_token_id)
    prompt_tokens, prompt_mask, rows = (tensor.repeat_interleave(samples_each, 0) for tensor in (*padded, rows))
    logprobs = samples.logprobs
    return Rollouts(
        prompt_tokens,
        prompt_mask,
        tokens,
        mask,
        behavior_logprobs=torch.zeros(count, length),
        stop_reasons=torch.where(stopped, int(StopReason.EOS), int(StopReason.LENGTH)),
        rollout_ids=torch.arange(count),
        prompt_ids=rows,
        sampled_at_step=torch.zeros(count, dtype=torch.long),
        snapshot_step=torch.zeros(count, dtype=torch.long),
        temperature=config.temperature,
        sampler_logprobs=None if logprobs is None else logprobs[:, :length].float().masked_fill(~mask, 0.0),
    )
