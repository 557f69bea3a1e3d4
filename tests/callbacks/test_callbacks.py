"""Callbacks on real runs of the toy world; BehaviorRefresh and StopCheckpoint are in test_module, test_resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from opdlab.callbacks import BehaviorRefresh, GateMonitor, HFExport
from opdlab.callbacks.gate_monitor import gate_histograms
from opdlab.errors import UsageError
from opdlab.gating import GateInputs, build_gate
from tests.toy_run import Run


def test_histograms_hold_every_valid_position_once() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(100) < torch.tensor([[100], [70], [0], [33]])
    current = torch.randn(4, 100, generator=generator)
    inputs = GateInputs(torch.zeros(4, 100).long(), mask, torch.zeros(4, 100), current)
    gates = build_gate("block32", tau=3.0)(inputs)
    histograms = gate_histograms(gates, inputs, max_blocks=64)
    blocks = [histograms[f"gate/block/{n:03d}"] for n in range(4)]
    assert [len(block) for block in blocks] == [96, 65, 38, 4]
    torch.testing.assert_close(blocks[1].mean(), gates.weights[:, 32:64][mask[:, 32:64]].mean())
    assert len(histograms["gate/weights"]) == int(mask.sum())
    torch.testing.assert_close(histograms["gate/token_drift"], current[mask])
    assert "gate/block/002" not in gate_histograms(gates, inputs, max_blocks=2)


def test_monitor_writes_every_n_steps(make_run: Callable[..., Run], tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="events")
    make_run(callbacks=(GateMonitor(every_n_steps=2),)).fit(5, logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("gate/block/000")] == [2, 4]
    assert "gate/block/001" in events.Tags()["histograms"]  # 40 tokens are two blocks of 32


def test_export_writes_what_was_trained(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(callbacks=(HFExport(str(tmp_path / "student")),))
    run.fit(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for ours, theirs in zip(run.module.student.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bad_intervals_are_refused() -> None:
    with pytest.raises(UsageError, match="every_n_steps is 0"):
        BehaviorRefresh(every_n_steps=0)
    with pytest.raises(UsageError, match="every_n_steps is 0"):
        GateMonitor(every_n_steps=0)
    with pytest.raises(UsageError, match="max_blocks is 0"):
        GateMonitor(max_blocks=0)
