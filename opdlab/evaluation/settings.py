"""The settings that samples depend on, stored with them so that samples of different settings are never mixed."""

import json
import uuid
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl

from opdlab.data.datamodule import PromptDataModule
from opdlab.data.prompts import PromptSet
from opdlab.errors import UsageError
from opdlab.evaluation.evaluator import Evaluator
from opdlab.policies.fingerprints import fingerprint
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import LocalTeacher, Teacher
from opdlab.verifiers.sources import source_digest
from opdlab.verifiers.verifier import Verifier

# Options of a verifier that do not affect its verdicts.
_SPEED = ("num_workers",)


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
            "teacher": {"weights": _of_teacher(teacher)},
            "eval_sampling": asdict(evaluator.sampling),
            "evaluation": {"reverse_kl": config.reverse_kl, "seed": config.seed},
        },
        "data": {
            "benchmarks": {name: benchmark_settings(prompts) for name, prompts in data.benchmarks.items()},
        },
        "trainer": {
            "precision": str(trainer.precision),
            "devices": trainer.world_size,
            "accelerator": trainer.strategy.root_device.type,
        },
    }


def _of_teacher(teacher: Teacher | None) -> str | None:
    """Return what a reverse KL depends on: never equal for a teacher that cannot be told from another."""
    if teacher is None or isinstance(teacher, LocalTeacher):
        return None if teacher is None else fingerprint(teacher.model)
    try:
        return teacher.fingerprint()
    except UsageError:
        return uuid.uuid4().hex


def benchmark_settings(prompts: PromptSet) -> dict[str, Any]:
    """Return a benchmark's settings that its metrics depend on: prompts as tokens, gold answers, verifier."""
    verifier, described = prompts.verifier, None
    if verifier is not None:
        options = {name: value for name, value in vars(verifier).items() if name[0] != "_" and name not in _SPEED}
        # An object's repr may contain its address, which differs between runs.
        text = json.dumps(options, default=lambda value: type(value).__qualname__)
        described = f"{type(verifier).__module__}.{type(verifier).__qualname__} {text}{_code(verifier)}"
    return {"num_problems": len(prompts), "prompts": prompts.facts.digest, "verifier": described}


def _code(verifier: Verifier) -> str:
    """Return the digest of a verifier's code, if that is not opdlab's: the code that was read at the first call."""
    module = type(verifier).__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    known: str = vars(verifier).setdefault("_code", f" {source_digest(module)}")
    return known
