"""Callbacks on real runs of the toy world; BehaviorRefresh, StopCheckpoint: see test_module, test_resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opdlab.callbacks import BehaviorRefresh, HFExport
from opdlab.errors import UsageError
from tests.toy_run import Run


def test_export_writes_what_was_trained(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(callbacks=(HFExport(str(tmp_path / "student")),))
    run.fit(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for ours, theirs in zip(run.module.student.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_intervals_are_refused() -> None:
    with pytest.raises(UsageError, match="every_n_steps is 0"):
        BehaviorRefresh(every_n_steps=0)
