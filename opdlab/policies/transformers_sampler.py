"""The sampler in this process: opdlab's decoding loop, or transformers' own for models that it does not support.

Shapes: P prompts, n samples of each, N = P * n rollouts, B rows of a batch, T response tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from opdlab.errors import require
from opdlab.policies.decoding import Decoding, NonFiniteLogitsError, why_not_selectable
from opdlab.policies.draws import draw, uniforms
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import Sampler, Samples, SamplingConfig, register_sampler
from opdlab.progress import Progress
from opdlab.types import left_padded

Advance: TypeAlias = Callable[[int], None]


@register_sampler("transformers")
class TransformersSampler(Sampler):
    """Sampler in this process: opdlab's decoding loop, or transformers' for models that it does not support.

    The model itself is sampled from, on its device and in eval mode, so a refresh copies nothing.
    """

    _model: LanguageModel

    def setup(self, model: LanguageModel) -> None:
        """Log if the model is decoded by transformers' slower loop."""
        uses_own_loop(model.model)

    def refresh(self, model: LanguageModel, step: int) -> None:
        """Keep a reference to the model."""
        del step
        self._model = model

    def sample(
        self, prompts: Sequence[Sequence[int]], streams: Tensor, config: SamplingConfig, progress: Progress
    ) -> Samples:
        """Return sampled responses, see :meth:`Sampler.sample`."""
        model = self._model
        padded, masks = left_padded(prompts, model.tokenizer.pad_token_id)
        processors = LogitsProcessorList([_OnlyTokens(model.vocab_size)])
        if config.temperature != 1:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
        with progress.task("sampling", streams.numel() * config.max_new_tokens) as advance:
            if uses_own_loop(model.model):
                loop = Decoding(streams, config.batch_size, advance)
                options = {"logits_processor": processors, "custom_generate": loop}
                tokens = _generate(model, padded, masks, config.max_new_tokens, **options)
            else:
                tokens = _decode_in_chunks(model, padded, masks, streams, config, processors, advance)
        stops = torch.isin(tokens, torch.tensor(model.stop_ids))
        return Samples(tokens, stops.int().cumsum(1) - stops.int() == 0)  # up to and including the first stop token


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


def _decode_in_chunks(
    model: LanguageModel,
    prompts: Tensor,
    mask: Tensor,
    streams: Tensor,
    config: SamplingConfig,
    processors: LogitsProcessorList,
    advance: Advance,
) -> Tensor:
    """Return responses decoded with transformers' loop, [N, T] long; it reads each prompt once per response.

    Raises:
        UsageError: the model's own ``generate`` does not take its tokens from the logits.
    """
    count, longest, width = streams.numel(), config.max_new_tokens, prompts.shape[1]
    prompts, mask = (tensor.repeat_interleave(streams.shape[1], 0) for tensor in (prompts, mask))
    tokens, stop_ids = torch.full((count, longest), model.tokenizer.pad_token_id), torch.tensor(model.stop_ids)
    for start in range(0, count, config.batch_size):
        rows = slice(start, start + config.batch_size)
        chosen = _Chosen(processors, streams.flatten()[rows].to(model.device), width, advance)
        options = {"logits_processor": LogitsProcessorList([chosen])}
        new = _generate(model, prompts[rows], mask[rows], longest, **options)[:, width:]
        length = new.shape[1]
        drawn = torch.stack(chosen.tokens, 1)[:, :length].cpu() if chosen.tokens else new[:, :0]
        stopped = torch.isin(new, stop_ids).int()
        before_end = stopped.cumsum(1) - stopped == 0
        require(
            drawn.shape == new.shape and torch.equal(drawn[before_end], new[before_end]),
            f"{type(model.model).__name__} generates in a way of its own, which does not take the tokens that opdlab "
            "draws: it cannot be sampled from; use another model",
        )
        tokens[rows, :length] = new
        advance(len(new) * (longest - length))
    return tokens


def _generate(model: LanguageModel, tokens: Tensor, mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Return the output of ``generate``, in host memory; ``options`` choose the tokens."""
    network = model.model
    config = GenerationConfig(
        do_sample=False,  # the tokens are drawn from streams, not from the global generator
        max_new_tokens=max_new_tokens,
        eos_token_id=model.stop_ids,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    # The model's own penalties or top-k would change the samples without appearing in the configuration.
    own, training = network.generation_config, network.training
    network.generation_config = config
    network.eval()
    try:
        with torch.inference_mode():  # a tenth faster than no_grad where kernels are short
            output: Tensor = network.generate(
                tokens.to(model.device),
                attention_mask=mask.long().to(model.device),
                generation_config=config,
                synced_gpus=False,  # sharded weights are gathered before, so processes may end at different times
                **options,
            )
    finally:
        network.generation_config = own
        network.train(training)
    return output.cpu().clone()  # a tensor that may take part in training


class _OnlyTokens(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Gives probability 0 to the rows of the output layer beyond the model's tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        if scores.shape[1] > self._vocab_size:
            scores[:, self._vocab_size :] = -torch.inf
        return scores


class _Chosen(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Draws the next tokens and gives every other token probability 0, so that transformers' loop takes them.

    Args:
        processors: change the logits before.
        streams: [B] long, of the rows.
        width: columns of the prompts.
        advance: called with the number of rows, once per token.

    Attributes:
        tokens: [B] long each: what was drawn.
    """

    def __init__(self, processors: LogitsProcessorList, streams: Tensor, width: int, advance: Advance) -> None:
        self._processors, self._streams, self._width, self._advance = processors, streams, width, advance
        self.tokens: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = torch.tensor(input_ids.shape[1] - self._width, device=scores.device)
        probabilities = self._processors(None, scores.float()).softmax(-1)
        drawn = draw(probabilities, uniforms(self._streams, position))
        if bool((drawn < 0).any()):
            raise NonFiniteLogitsError
        self.tokens.append(drawn)
        self._advance(len(drawn))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)
