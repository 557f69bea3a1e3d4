"""A decoding loop for transformers' ``generate`` that reads each prompt once and removes finished rows.

transformers' own loop reads each prompt once per response and computes every row until the longest of its batch is
done. This loop copies the cached keys and values of a prompt to its responses, removes finished rows, and replaces them
with waiting rows. All rows share one rectangle, padded on the left, so that every attention kernel works.

Shapes: N responses in total, A rows in the current batch, W columns of the cache, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from opdlab.errors import UsageError
from opdlab.policies.cpu_attention import own_attention
from opdlab.policies.decoding_cache import join_layers
from opdlab.policies.draws import draw, uniforms

# Rows leave once this share of them is done, because the whole cache is copied whenever rows leave or enter. Half and
# twice this value were slower on a CPU.
LEAVE_SHARE = 0.125
# Waiting rows enter once this share of the batch is free. For rows of varied lengths a quarter also works. Rows of
# similar length should start together, because rows that enter later are padded to the width of the others.
ENTER_SHARE = 0.5
# Random numbers of a row are computed for so many tokens at a time.
LOOK_AHEAD = 32

# Parts of `generate` that this loop replaces. A model that overrides one of them needs its own decoding. Names that a
# version of transformers lacks are skipped.
_REPLACED = (
    "generate",
    "prepare_inputs_for_generation",
    "_prefill",
    "_prepare_cache_for_generation",
    "_prepare_position_ids_for_generation",
    "_update_model_kwargs_for_generation",
)
# Names of the argument of `forward` that takes the cache: transformers 5.24 renamed it.
_CACHE_ARGUMENTS = ("cache", "past_key_values")


def why_not_selectable(model: PreTrainedModel) -> str | None:
    """Return why :class:`Decoding` cannot decode with this model; None if it can.

    It handles models that carry only keys and values, in plain or sliding-window layers, from one token to the next. It
    does not handle other states (Mamba and other hybrids), layers that share a cache, chunked attention, or models that
    prepare their inputs in their own way.

    Args:
        model: a causal language model.

    Returns:
        The first reason found, as the end of a sentence, for one line of the log.
    """
    inputs = inspect.signature(model.forward).parameters
    overridden = [
        name for name in _REPLACED if getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)
    ]
    if overridden:
        return f"it overrides {overridden[0]} of transformers"
    if missing := {"attention_mask", "position_ids"} - inputs.keys():
        return f"its forward takes no {min(missing)}"
    if not inputs.keys() & set(_CACHE_ARGUMENTS):
        return f"its forward takes none of the arguments {', '.join(_CACHE_ARGUMENTS)}"
    if model.is_remote_code():
        return "its code is not part of transformers"
    if model.config.is_encoder_decoder or model._is_stateful or not model._supports_default_dynamic_cache():
        return "it carries more than keys and values from token to token"
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    # A chunked layer has a sliding-window cache, but its attention does not slide.
    kinds = getattr(config, "layer_types", None)
    chunked = getattr(config, "attention_chunk_size", None) if kinds is None else "chunked_attention" in kinds
    if not layers or not plain or chunked:
        return "its cache has layers other than plain and sliding-window attention"
    return None


class NonFiniteLogitsError(UsageError):
    """Error for NaN or infinite logits while sampling.

    Args:
        step: optimizer steps taken, if known.
    """

    def __init__(self, step: int | None = None) -> None:
        when = "" if step is None else f" at step {step}"
        super().__init__(
            f"sampling{when}: the logits of the model are NaN or infinite: lower the learning rate, or resume from an "
            "earlier checkpoint"
        )


@contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Name the optimizer step in a :class:`NonFiniteLogitsError` of the block."""
    try:
        yield
    except NonFiniteLogitsError as error:
        raise NonFiniteLogitsError(step) from error


def look_every(device: torch.device) -> int:
    """Return how many tokens to draw between checks for finished rows; on a GPU each check makes the host wait."""
    return 1 if device.type == "cpu" else 4


class Decoding:
    """A decoding loop that samples responses from their random streams; pass it as ``custom_generate``.

    Args:
        streams: [number of prompts, responses per prompt] long, see :func:`opdlab.policies.draws.uniforms`.
        batch_size: rows decoded at a time.
        advance: called with the number of new tokens; when a row finishes, its unused tokens count too.
    """

    def __init__(self, streams: Tensor, batch_size: int, advance: Callable[[int], None]) -> None:
        self._streams, self._batch_size, self._advance = streams, batch_size, advance
        self._num_samples = streams.shape[1]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Return the sampled responses; ``generate`` calls this.

        Args:
            model: a model for which :func:`why_not_selectable` returns None.
            input_ids: [number of prompts, P], padded on the left.
            logits_processor: temperature and top_p; it receives no tokens.
            generation_config: the number of tokens and the stop tokens.
            **model_kwargs: other arguments that generate passes to its loops: the empty cache, the prompts' mask (None
                if no prompt is padded), options of the forward pass. They are not named in this signature, because
                generate does not pass named ones on.

        Returns:
            [N, max_new_tokens] long; positions after a stop token are padding.
        """
        num_rows, max_new_tokens = len(input_ids) * self._num_samples, generation_config.max_new_tokens
        loop = _Loop(model, input_ids, logits_processor, generation_config, self._streams, model_kwargs)
        rows: _Rows | None = None
        remaining: list[int] = []
        entered, done = 0, 0
        with own_attention():
            while True:
                live = [row for row, tokens in enumerate(remaining) if tokens]
                until = self._enter_until(entered, num_rows, len(live))
                if until == entered and not live:
                    return loop.output[:, :-1]
                sparse = len(remaining) - len(live) >= LEAVE_SHARE * len(remaining)
                # A cache with the columns of the longest response may hold some of finished rows only.
                if rows is None or until > entered or sparse or rows.width >= loop.max_width:
                    parts = [rows.select(live)] if rows is not None and live else []
                    rows = None  # no name for a cache whose rows are all done
                    if until > entered:
                        parts.append(loop.prefill(range(entered, until)))
                    rows, entered = _join(parts, loop.max_width), until
                else:
                    loop.steps(rows, min(look_every(input_ids.device), max(remaining)))
                remaining = rows.remaining.tolist()
                if loop.failed:
                    raise NonFiniteLogitsError
                before, done = done, entered * max_new_tokens - sum(remaining)
                self._advance(done - before)

    def _enter_until(self, entered: int, num_rows: int, num_live: int) -> int:
        """Return the end of the range of waiting rows that enter now; it starts at ``entered``."""
        room = self._batch_size - num_live
        if room < ENTER_SHARE * self._batch_size:
            return entered
        until = min(entered + room, num_rows)
        # A prompt whose responses enter at different times is read twice; leaving a few rows free is cheaper.
        split = until % self._num_samples
        return until - split if until - split > entered and split < LEAVE_SHARE * self._batch_size else until


@dataclass
class _Rows:
    """The rows of the current batch, of equal width.

    Args:
        cache: keys and values of all tokens except the last.
        width: columns of the cache.
        origins: [A] long, rows of the cache.
        places: [A] long, rows of the output.
        lengths: [A] long, columns of the cache that a row uses, counted from the right; for a finished row it may be
            one less.
        tokens: [A] long, the last drawn tokens.
        remaining: [A] long, tokens still to be drawn: 0 for finished rows.
        mask: [A, at least W + 1] long, 1 for columns that a row uses; None if every row uses all columns.
        numbers: [A, tokens] float64, random numbers of the next tokens; those of finished rows have no meaning.
    """

    cache: Cache
    width: int
    origins: Tensor
    places: Tensor
    lengths: Tensor
    tokens: Tensor
    remaining: Tensor
    mask: Tensor | None = None
    numbers: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "_Rows":
        """Return some of the rows; the cache is not copied."""
        index = torch.tensor(rows, device=self.places.device)
        states = (self.origins, self.places, self.lengths, self.tokens, self.remaining)
        return _Rows(self.cache, self.width, *(state[index] for state in states))


class _Loop:
    """The constants of a decoding loop, and its output; see :meth:`Decoding.__call__` for the arguments.

    Attributes:
        max_width: columns of the cache that the longest response needs.
        failed: bool scalar: True once logits were NaN or infinite; a tensor, so that the host need not wait for it.
        output: [N, max_new_tokens + 1] long; the last column receives the tokens drawn for finished rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Tensor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        streams: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        self._model, self._prompts, self._processors = model, prompts, processors
        self._num_samples, self._streams = streams.shape[1], streams.flatten().to(prompts.device)
        self._stops = torch.tensor(config.eos_token_id, device=prompts.device)
        mask = arguments.get("attention_mask")
        self._lengths = (torch.ones_like(prompts) if mask is None else mask).sum(1)
        passed_on = ("use_cache", "logits_to_keep")
        self._options: dict[str, Any] = {name: value for name, value in arguments.items() if name in passed_on}
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = next(name for name in _CACHE_ARGUMENTS if name in parameters)
        # Find the cache by type: `generate` and a model may name the argument differently.
        self._empty_cache = next(value for value in arguments.values() if isinstance(value, Cache))
        self.max_width = prompts.shape[1] + config.max_new_tokens
        self.failed = torch.zeros((), dtype=torch.bool, device=prompts.device)
        size = len(self._streams), config.max_new_tokens + 1
        self.output = prompts.new_full(size, config.pad_token_id)

    def _logits(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """Return the logits of each row's last token, [A, V]."""
        options = self._options | {self._cache_argument: cache}
        output = self._model(input_ids=tokens, attention_mask=mask, position_ids=positions, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def prefill(self, places: range) -> _Rows:
        """Read the prompts of some responses, draw the first tokens, and return the rows."""
        device, num_samples = self.output.device, self._num_samples
        prompts = slice(places[0] // num_samples, places[-1] // num_samples + 1)
        of_row = torch.tensor([place // num_samples - prompts.start for place in places], device=device)
        lengths = self._lengths[prompts]
        width = int(lengths.max())
        positions = torch.arange(width, device=device) - (width - lengths)[:, None]  # [prompts, width]; < 0: padding
        cache = copy.deepcopy(self._empty_cache)
        tokens, mask = self._prompts[prompts, -width:], (positions >= 0).long()
        logits = self._logits(tokens, mask, positions.clamp(min=0), cache)
        remaining = torch.full_like(of_row, self.output.shape[1] - 1)
        rows = _Rows(
            *(cache, width, of_row, torch.tensor(places, device=device)),
            *(lengths[of_row] - 1, torch.empty_like(of_row), remaining),
        )
        self._draw(rows, logits[of_row])
        return rows

    def steps(self, rows: _Rows, count: int) -> None:
        """Draw ``count`` tokens per row, or fewer if the cache fills up first."""
        for _ in range(min(count, self.max_width - rows.width)):
            mask = None if rows.mask is None else rows.mask[:, : rows.width + 1]
            logits = self._logits(rows.tokens[:, None], mask, rows.lengths[:, None], rows.cache)
            rows.width += 1
            self._draw(rows, logits)

    def _draw(self, rows: _Rows, logits: Tensor) -> None:
        positions = self.output.shape[1] - 1 - rows.remaining  # [A], of the tokens that are drawn now
        if rows.numbers is None or not rows.numbers.shape[1]:
            ahead = torch.arange(LOOK_AHEAD, device=positions.device)
            rows.numbers = uniforms(self._streams[rows.places][:, None], positions[:, None] + ahead)
        logits = logits.float()
        for processor in self._processors:  # the list's own call looks up the parameters of each at every token
            logits = processor(None, logits)
        drawn = draw(logits.softmax(-1), rows.numbers[:, 0])
        rows.numbers = rows.numbers[:, 1:]
        self.failed |= (drawn < 0).any()
        rows.tokens = drawn.clamp(min=0)
        self.output[rows.places, positions] = rows.tokens
        stopped = torch.isin(rows.tokens, self._stops)
        rows.remaining = (rows.remaining - 1).clamp(min=0).masked_fill(stopped, 0)
        # A finished row stays at its last position, because the next position may not exist.
        rows.lengths += rows.remaining > 0


def _join(parts: Sequence[_Rows], max_width: int) -> _Rows:
    """Return the rows of all parts as one batch, without left columns that no row uses."""
    places, lengths, tokens, remaining = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("places", "lengths", "tokens", "remaining")
    )
    width = max(1, int(lengths.max()))
    cache = parts[0].cache
    for number, layers in enumerate(zip(*(part.cache.layers for part in parts), strict=True)):
        cache.layers[number] = join_layers(layers, [part.origins for part in parts], width, max_width)
    padding = width - lengths[:, None]  # [A, 1], columns on the left that a row does not use
    mask = (torch.arange(max_width + 1, device=padding.device) >= padding).long() if bool(padding.any()) else None
    origins = torch.arange(len(places), device=places.device)
    return _Rows(cache, width, origins, places, lengths, tokens, remaining, mask)
