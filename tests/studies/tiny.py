"""A study of a few seconds: three problems, answers of a few tokens."""

import gc
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import main

SHORT = [
    *("--data.benchmarks.toy.init_args.num_problems=3", "--data.train.init_args.num_problems=16"),
    *("--data.eval_batch_size=1", "--data.reuse.prompts_per_pool=4", "--data.reuse.batch_size=4"),
    *("--model.sampling.max_new_tokens=10", "--model.eval_sampling.max_new_tokens=10"),
    *("--model.eval_sampling.num_samples=2", "--model.evaluation.pass_at=[1,2]"),
    *("--checkpoint.every_n_train_steps=2", "--model.optimizer.init_args.lr=1.0e-2", "--trainer.log_every_n_steps=1"),
]


def content(**changes: Any) -> dict[str, Any]:
    """What a tiny study's file holds."""
    study: dict[str, Any] = {
        "name": "tiny",
        "base": ["quickstart", "toy_study"],
        "overrides": SHORT,
        "variants": [
            {"name": "none", "overrides": ["--model.gate=none"]},
            {"name": "token", "overrides": ["--model.gate=token", "--model.gate.tau=100"]},
        ],
        "baseline": "none",
        "seeds": [0, 1],
        "budgets": [2, 4],
    }
    return {key: value for key, value in {**study, **changes}.items() if value is not None}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content(**changes)))
    return file


def study_run(monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> int:
    """Run ``opdlab study run`` in this process, beside the file."""
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with warnings.catch_warnings():
        # submitit's debug executor leaves its log files for the garbage collector to close: now, and not in whatever
        # test comes next.
        warnings.filterwarnings("ignore", "unclosed file .*DEBUG_", ResourceWarning)
        try:
            return main(["study", "run", str(file), "--cluster", "debug", *options])
        finally:
            gc.collect()


def lines(root: Path) -> dict[str, bytes]:
    """Every sample line of a study, by file."""
    files: Sequence[Path] = sorted(root.glob("runs/*/*/evaluations/*/*.jsonl"))
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
