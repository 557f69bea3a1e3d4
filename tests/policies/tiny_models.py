"""Tiny random models of many architectures, and rollouts for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from opdlab.policies import LanguageModel, SamplingConfig, TransformersSampler, sample_rollouts
from opdlab.progress import Progress
from opdlab.seeds import derive_streams
from opdlab.toy import chain_tokenizer
from opdlab.types import Rollouts

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
COMMON = {
    **IDS,
    "vocab_size": 38,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large weights: otherwise logits of a random model are so small that a wrong head would go unnoticed.
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True),
    "qwen3 sliding": lambda: Qwen3Config(
        **COMMON, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama untied": lambda: LlamaConfig(**COMMON, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=5.0, sliding_window=4),
    # One layer with a sliding window, one without.
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        head_dim=8,
        final_logit_softcapping=5.0,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": lambda: PhiConfig(**COMMON),  # has a bias in the head
    "cohere": lambda: CohereConfig(**COMMON, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**COMMON, logits_scaling=8.0),
    "gpt2": lambda: GPT2Config(**IDS, vocab_size=38, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def save_random(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
            torch.nn.init.normal_(bias)  # initialised with zeros, which would hide a missing bias
        model.save_pretrained(folder)
    (tokenizer or chain_tokenizer()).save_pretrained(folder)
    return folder


def sampled(
    model: LanguageModel,
    config: SamplingConfig,
    prompts: Sequence[Sequence[int]],
    seed: int = 0,
    progress: Progress | None = None,
) -> Rollouts:
    """Sample as a behavior policy does, with prompts numbered from 0."""
    sampler = TransformersSampler()
    sampler.refresh(model, 0)
    streams = derive_streams("rollouts", seed, keys=range(len(prompts)), num_samples=config.num_samples)
    return sample_rollouts(sampler, model, prompts, streams, config, progress=progress)


PROMPT_LENGTHS, RESPONSE_LENGTHS = (5, 2, 9, 1), (7, 4, 1, 6)


def rollouts(temperature: float = 0.7) -> Rollouts:
    """Four rollouts of different lengths, prompts padded on the left and responses on the right."""
    generator = torch.Generator().manual_seed(0)

    def rows(lengths: tuple[int, ...], left: bool) -> tuple[Tensor, Tensor]:
        width = max(lengths)
        columns = torch.arange(width).flip(0) if left else torch.arange(width)
        mask = columns < torch.tensor(lengths)[:, None]
        return torch.randint(3, 38, mask.shape, generator=generator).masked_fill(~mask, 0), mask

    prompt_tokens, prompt_mask = rows(PROMPT_LENGTHS, left=True)
    tokens, mask = rows(RESPONSE_LENGTHS, left=False)
    zeros = torch.zeros(4, dtype=torch.long)
    logprobs = torch.zeros(mask.shape)
    return Rollouts(
        *(prompt_tokens, prompt_mask, tokens, mask, logprobs), zeros, torch.arange(4), *3 * (zeros,), temperature
    )
