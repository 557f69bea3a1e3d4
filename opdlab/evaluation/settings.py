"""The settings that samples depend on, stored with them so that samples of different settings are never mixed."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch

from opdlab.data.datamodule import PromptDataModule
from opdlab.data.prompts import PromptSet
from opdlab.evaluation.evaluator import Evaluator
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import LocalTeacher, Teacher
from opdlab.records import digest

_DIGEST_BYTES = 16
# Keys of a Hugging Face configuration that name a model's origin and do not affect what it computes.
_ORIGIN_KEYS = ("_name_or_path", "transformers_version", "_commit_hash", "name_or_path")
# Options of a verifier that do not affect its verdicts.
_SPEED = ("num_workers",)


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Return a digest of everything that determines a model's samples: weights, architecture and stop tokens.

    Takes about a second per GB of weights. The digest does not depend on the path of the weights.

    Args:
        model: on any device; with sharded weights, the digest covers the shards of this process.

    Example:
        >>> model = LanguageModel("package://opdlab.toy/models/student")
        >>> before = fingerprint(model)
        >>> model.model.model.norm.weight.data[0] += 1e-6
        >>> before == fingerprint(model)
        False
    """
    config = {key: value for key, value in model.model.config.to_dict().items() if key not in _ORIGIN_KEYS}
    # An adapter's scaling factor is neither a weight nor part of the model's configuration.
    scaling = [(name, getattr(layer, "scaling", None)) for name, layer in model.model.named_modules()]
    factors = [(name, value) for name, value in scaling if isinstance(value, dict)]
    total = hashlib.blake2b(digest([config, model.stop_ids, factors]).encode(), digest_size=_DIGEST_BYTES)
    # named_parameters() lists tied weights once.
    for name, tensor in sorted([*model.model.named_parameters(), *model.model.named_buffers()]):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()


def evaluation_settings(
    model: LanguageModel, teacher: Teacher | None, evaluator: Evaluator, data: PromptDataModule, trainer: pl.Trainer
) -> dict[str, Any]:
    """Return the settings of an evaluation that its samples depend on, as a tree of configuration keys.

    Args:
        model: the evaluated model.
        teacher: reference of the reverse KL; None if that is not measured.
        evaluator: holds the options of evaluation and sampling.
        data: holds the benchmarks.
        trainer: of the evaluation.
    """
    config = evaluator.config
    return {
        "model": {
            "student": {"weights": fingerprint(model)},
            "teacher": {"weights": fingerprint(teacher.model) if isinstance(teacher, LocalTeacher) else None},
            "eval_sampling": asdict(evaluator.sampler.config),
            "evaluation": {"reverse_kl": config.reverse_kl, "seed": config.seed},
        },
        "data": {
            "eval_batch_size": data.eval_batch_size,  # a batch's seed depends on its index
            "benchmarks": {name: benchmark_settings(prompts) for name, prompts in data.benchmarks.items()},
        },
        "trainer": {
            "precision": str(trainer.precision),
            "devices": trainer.world_size,
            "accelerator": trainer.strategy.root_device.type,
        },
    }


def benchmark_settings(prompts: PromptSet) -> dict[str, Any]:
    """Return a benchmark's settings that its metrics depend on: prompts as tokens, gold answers, verifier."""
    rows = [(prompt.problem.id, prompt.tokens, prompt.problem.answer) for prompt in prompts.prompts]
    verifier, described = prompts.verifier, None
    if verifier is not None:
        options = {name: value for name, value in vars(verifier).items() if name[0] != "_" and name not in _SPEED}
        # An object's repr may contain its address, which differs between runs.
        text = json.dumps(options, default=lambda value: type(value).__qualname__)
        described = f"{type(verifier).__module__}.{type(verifier).__qualname__} {text}"
    return {"num_problems": len(rows), "prompts": digest(rows), "verifier": described}
