"""What a run says when it starts, saves and ends: nothing that a user cannot use."""

import logging
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelSummary, RichModelSummary
from transformers import PreTrainedModel

from opdlab.callbacks import CollapseGuard, LabProgressBar
from opdlab.policies import LanguageModel
from opdlab.training.summary import ModelSizes
from tests.policies.tiny_models import CONFIGS, rollouts, save_random
from tests.toy_run import Run

NOISE = ("FLOPs", "Modules in", "eval mode", "weights_only", "0.00it/s")


def test_training_starts_and_saves_without_noise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = CollapseGuard(stop=True)  # saves a checkpoint
    run = Run(tmp_path, callbacks=(LabProgressBar(), guard), max_new_tokens=12, temperature=1e-6)
    with caplog.at_level(logging.INFO):
        trainer = run.fit(4, enable_model_summary=True, enable_progress_bar=True, limit_val_batches=1)
        trainer.validate(run.module, datamodule=run.data, verbose=False)
    said = [*(record.getMessage() for record in caplog.records), *capsys.readouterr()]
    assert guard.stopped
    for noise in NOISE:
        assert not [text for text in said if noise in text]
    assert "student: 280 K parameters, 280 K trained; behavior snapshot: 280 K" in said
    assert not any(module.training for module in run.module.behavior.policy.modules())


def test_a_model_that_wants_a_mask_is_scored_without_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 gives it once per process where a row begins or ends with the padding token."""
    logger, handler = logging.getLogger(PreTrainedModel.__module__), logging.Handler()
    monkeypatch.setattr(logger, "warning_once", logger.warning, raising=False)
    model = LanguageModel(str(save_random(tmp_path / "gpt2", CONFIGS["gpt2"]())))
    heard: list[str] = []
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    logger.addHandler(handler)
    try:
        model.score(rollouts())
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert heard == ["something else"]


@pytest.mark.parametrize(
    ("given", "stays"), [((), False), ((RichModelSummary(max_depth=3),), True), ((ModelSummary(max_depth=2),), True)]
)
def test_only_the_default_summary_is_replaced(tmp_path: Path, given: tuple[Callback, ...], stays: bool) -> None:
    run = Run(tmp_path, callbacks=given, max_new_tokens=12)
    callbacks: list[Callback] = run.fit(1, enable_model_summary=True).callbacks  # type: ignore[attr-defined]
    assert any(isinstance(each, ModelSummary) for each in callbacks) == stays
    assert any(isinstance(each, ModelSizes) for each in callbacks) != stays
