"""The folder of an evaluation's samples is one for all processes."""

from pathlib import Path

import lightning.pytorch as pl
import pytest

from opdlab.evaluation import EvaluationConfig, settings
from tests.ranks.pair import Processes
from tests.toy_run import Run


def evaluated(rank: int, folder: Path) -> None:
    """Evaluate a model that each process would call by another name, as a server's answers may differ by rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "fingerprint", lambda model: f"seen by {rank}")
        made = Run(folder, evaluation=EvaluationConfig(pass_at=(1,), samples=str(folder / "samples-{settings}")))
        whole = {**made.trainer_options, "limit_val_batches": 1.0, "strategy": "ddp", "devices": 2}
        trainer = pl.Trainer(**whole, use_distributed_sampler=False)
        trainer.validate(made.module, datamodule=made.data, verbose=False)


def test_settings_that_differ_between_processes_name_one_folder(pair: Processes, tmp_path: Path) -> None:
    pair.run(evaluated, tmp_path)
    (found,) = tmp_path.glob("samples-*")
    assert {path.name for path in found.glob("toy-*.jsonl")} == {"toy-0.jsonl", "toy-1.jsonl"}
