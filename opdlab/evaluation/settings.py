"""What samples depend on, written beside them so that those of different settings are never mixed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning
import torch
import transformers

from opdlab.data.prompts import PromptSet
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import SamplingConfig
from opdlab.tasks.verifier import Verifier
from opdlab.version import __version__

_DIGEST_BYTES = 16
# Of a Hugging Face configuration: says where a model came from, not what it computes.
_ORIGIN_KEYS = ("_name_or_path", "transformers_version", "_commit_hash", "name_or_path")
# Of a verifier: have no influence on its verdicts.
_SPEED_OPTIONS = ("num_workers",)


def digest(value: Any) -> str:
    """Hexadecimal digest of anything that JSON can hold.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest([1, 2]) == digest([2, 1])
        (True, False)
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=_DIGEST_BYTES).hexdigest()


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Digest of all that decides what a model samples: every byte of its weights, its architecture, its stop tokens.

    About a second for each GB of weights. Where they were loaded from has no influence.

    Args:
        model: on any device; under a strategy that shards weights, those of this process.

    Example:
        >>> model = LanguageModel("package://opdlab.tasks.toy/models/student")
        >>> before = fingerprint(model)
        >>> model.model.model.norm.weight.data[0] += 1e-6
        >>> before == fingerprint(model)
        False
    """
    config = {key: value for key, value in model.model.config.to_dict().items() if key not in _ORIGIN_KEYS}
    # An adapter's factor is neither a weight nor in the model's configuration.
    scaling = [(name, getattr(layer, "scaling", None)) for name, layer in model.model.named_modules()]
    factors = [(name, value) for name, value in scaling if isinstance(value, dict)]
    total = hashlib.blake2b(digest([config, model.stop_ids, factors]).encode(), digest_size=_DIGEST_BYTES)
    # Tied weights stand once in named_parameters().
    for name, tensor in sorted([*model.model.named_parameters(), *model.model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()


def benchmark_settings(prompts: PromptSet) -> dict[str, Any]:
    """What a benchmark's figures depend on, the model aside: prompts as tokens, gold answers, verifier."""
    rows = [(prompt.problem.id, prompt.tokens, prompt.problem.answer) for prompt in prompts.prompts]
    return {"num_problems": len(rows), "prompts": digest(rows), "verifier": _describe(prompts.verifier)}


def _describe(verifier: Verifier | None) -> str | None:
    if verifier is None:
        return None
    options = {name: value for name, value in vars(verifier).items() if name[0] != "_" and name not in _SPEED_OPTIONS}
    # An object's own text may hold its address, which differs from run to run.
    text = json.dumps(options, default=lambda value: type(value).__qualname__)
    return f"{type(verifier).__module__}.{type(verifier).__qualname__} {text}"


def evaluation_settings(
    model: LanguageModel,
    sampling: SamplingConfig,
    benchmarks: Mapping[str, PromptSet],
    *,
    teacher: LanguageModel | None,
    about: Mapping[str, Any],
    **others: Any,
) -> dict[str, Any]:
    """Content of ``settings.json``.

    Args:
        model: the model that is evaluated.
        sampling: how it is sampled from.
        benchmarks: what it is evaluated on.
        teacher: to which the reverse KL is measured, if it is.
        about: said but not compared.
        others: compared, by the key that the user knows, with ``__`` for its dots.
    """
    compared = {
        "model.student (its weights)": fingerprint(model),
        "model.teacher (its weights)": fingerprint(teacher) if teacher is not None else None,
        **{f"model.eval_sampling.{key}": value for key, value in asdict(sampling).items()},
        **{key.replace("__", "."): value for key, value in others.items()},
    }
    for name, prompts in benchmarks.items():
        settings = benchmark_settings(prompts)
        compared |= {f"data.benchmarks.{name} ({key})": value for key, value in settings.items()}
    return {"model": model.path, **about, "compared": compared}


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Name the keys in which two settings differ, or None.

    Example:
        >>> difference({"seed": 0, "top_p": 1.0}, {"seed": 1, "top_p": 1.0})
        'seed is 0 there and 1 now'
    """
    keys = [key for key in [*ours, *(theirs.keys() - ours.keys())] if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} now" for key in keys) or None


def versions() -> dict[str, str]:
    """Versions of what figures may depend on."""
    packages = {"torch": torch, "transformers": transformers, "lightning": lightning}
    return {"opdlab": __version__} | {name: str(package.__version__) for name, package in packages.items()}
