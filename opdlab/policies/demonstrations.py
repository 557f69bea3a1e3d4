"""Responses that the data gives, beside those that a policy samples.

Shapes: P prompts, n responses to each, T response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import Sampler, SamplingConfig, sample_rollouts
from opdlab.progress import Progress
from opdlab.types import Rollouts, StopReason, left_padded


@dataclass(frozen=True)
class Given:
    """The responses that the data gives for a prompt.

    Args:
        tokens: of the response, without a stop token.
        loss: for each token, True if it counts in the loss.
        count: number of the prompt's rollouts that take it.
    """

    tokens: Sequence[int]
    loss: Sequence[bool]
    count: int


def sample_beside(
    sampler: Sampler,
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    given: Sequence[Given],
    streams: Tensor,
    config: SamplingConfig,
    *,
    progress: Progress | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> Rollouts:
    """Return n responses to each prompt: the given ones first, the others sampled.

    The sampled ones are those of the same rows without given ones, because each row has its own random stream. A stop
    token follows a given response, which is cut to ``max_new_tokens``. No log-probabilities are computed.

    Args:
        sampler: uses the weights of ``model``.
        model: the policy.
        prompts: P prompts, token ids.
        given: of each prompt.
        streams: [P, n] long: random streams of the responses; those of given ones are not used.
        config: options of sampling.
        progress: shows a progress bar.
        prompt_ids: each prompt's row in its prompt set; None numbers the prompts from 0.
    """
    each, count = streams.shape[1], streams.numel()
    numbers = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
    parts: list[tuple[list[int], Rollouts]] = []  # rows of the buffer, and the sampled rollouts for them
    for num_given in sorted({one.count for one in given} - {each}, reverse=True):
        chosen = [index for index, one in enumerate(given) if one.count == num_given]
        part = sample_rollouts(
            sampler,
            model,
            [prompts[index] for index in chosen],
            streams[chosen, num_given:],
            config,
            progress=progress,
        )
        rows = [index * each + place for index in chosen for place in range(num_given, each)]
        parts.append((rows, part))
    cut = [_cut(one, model, config.max_new_tokens) for one in given]
    width = max([len(tokens) for tokens, _ in cut], default=1)
    width = max([width, *(part.tokens.shape[1] for _, part in parts)])
    padded, padded_mask = (t.repeat_interleave(each, 0) for t in left_padded(prompts, model.tokenizer.pad_token_id))
    tokens = torch.full((count, width), model.tokenizer.pad_token_id)
    mask, counted = torch.zeros(count, width, dtype=torch.bool), torch.ones(count, width, dtype=torch.bool)
    stops, demonstration = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
    of_sampler = torch.zeros(count, width) if sampler.knows_logprobs(config) else None
    for index, (one, (response, loss)) in enumerate(zip(given, cut, strict=True)):
        rows_of = slice(index * each, index * each + one.count)
        tokens[rows_of, : len(response)] = torch.tensor(response)
        counted[rows_of, : len(response)] = torch.tensor(loss)
        mask[rows_of, : len(response)] = demonstration[rows_of] = True
        stops[rows_of] = int(StopReason.EOS if response[-1] in model.stop_ids else StopReason.LENGTH)
    for rows, part in parts:
        length = part.tokens.shape[1]
        tokens[rows, :length], mask[rows, :length], stops[rows] = part.tokens, part.mask, part.stop_reasons
        if of_sampler is not None and part.sampler_logprobs is not None:
            of_sampler[rows, :length] = part.sampler_logprobs
    if of_sampler is not None:
        of_sampler[mask & demonstration[:, None]] = torch.nan
    zeros = torch.zeros(count, dtype=torch.long)
    return Rollouts(
        padded,
        padded_mask,
        tokens,
        mask,
        behavior_logprobs=torch.zeros(count, width),
        stop_reasons=stops,
        rollout_ids=torch.arange(count),
        prompt_ids=torch.tensor(numbers).repeat_interleave(each),
        sampled_at_step=zeros,
        snapshot_step=zeros.clone(),
        temperature=config.temperature,
        demonstration=demonstration,
        loss_mask=None if bool(counted.all()) else counted,
        sampler_logprobs=of_sampler,
    )


def _cut(given: Given, model: LanguageModel, max_new_tokens: int) -> tuple[list[int], list[bool]]:
    """Return a given response up to its first stop token, which is appended if there is none, and its loss flags."""
    eos = model.tokenizer.eos_token_id
    stop = eos if eos in model.stop_ids else model.stop_ids[0]
    tokens, loss = [*given.tokens, stop], [*given.loss, True]
    end = next(place for place, token in enumerate(tokens) if token in model.stop_ids) + 1
    return tokens[: min(end, max_new_tokens)], loss[: min(end, max_new_tokens)]
