"""CollapseGuard on real runs of the toy world: healthy ones, and some that go wrong."""

import csv
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from opdlab.callbacks import CollapseGuard, StopCheckpoint
from opdlab.cli import main
from opdlab.cli.parsing import parse_fit
from opdlab.errors import UsageError
from opdlab.gating import build_gate
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
from opdlab.policies import LanguageModel
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, Run
from tests.viewer_pages import Tags

MakeRun = Callable[..., Run]
NO_WEIGHTS = "the gate's weights were all 0 in 3 steps"


def zeros() -> LanguageModel:
    student = LanguageModel(STUDENT)
    for parameter in student.parameters():
        parameter.data.zero_()
    return student


# What goes wrong, and what the first message says of it.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"lr": 1000.0}, "entropy|4-grams|reverse KL"),
    "temperature": ({"temperature": 1e-6}, "entropy is 0 nats|one token has all probability"),
    "tau": ({"gate": build_gate("block32", tau=1e6, normalization="none")}, NO_WEIGHTS),
    "zeros": ({"student": zeros}, "tokens are equally likely"),
}


@pytest.mark.parametrize("objective", [TeacherTopK(k=8), SampledTokenOPD()], ids=["lsm", "opd"])
@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_reported(make_run: MakeRun, name: str, objective: Objective) -> None:
    options, words = WRONG[name]
    if name == "zeros":
        options = {"student": zeros()}
    guard = CollapseGuard()
    make_run(callbacks=(guard,), objective=objective, **options).fit(4)  # at 1000 the fifth step is not finite
    assert guard.messages
    assert all(message.startswith("collapse: step ") for message in guard.messages)
    assert not guard.stopped
    assert re.search(words, guard.messages[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_healthy_run_has_no_message_and_its_metrics(make_run: MakeRun, tmp_path: Path, accumulate: int) -> None:
    guard = CollapseGuard()
    logger = CSVLogger(tmp_path, name="", version="csv")
    make_run(callbacks=(guard,), accumulate=accumulate, lr=1e-4).fit(9, logger=logger)
    assert guard.messages == []
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    entropies = [float(row["train/teacher_entropy"]) for row in rows if row.get("train/teacher_entropy")]
    assert len(entropies) == 9
    assert all(0 < value < 1 for value in entropies)
    buffers = [row for row in rows if row.get("rollout/reverse_kl")]
    assert [row["step"] for row in buffers] == ["3", "7"]  # two steps a pass, two passes a buffer
    assert all(0 < float(row["rollout/repeated_share"]) < 0.5 for row in buffers)


def test_weights_are_those_without_the_guard_bit_for_bit(make_run: MakeRun) -> None:
    plain, guarded = make_run(lr=30.0), make_run(lr=30.0, callbacks=(CollapseGuard(),))
    plain.fit(5, logger=False)
    guarded.fit(5, logger=False)
    for name, tensor in plain.module.state_dict().items():
        assert torch.equal(tensor, guarded.module.state_dict()[name]), name


@pytest.mark.parametrize("own_checkpoint", [True, False])
def test_stopping_leaves_a_checkpoint_and_a_page(make_run: MakeRun, tmp_path: Path, own_checkpoint: bool) -> None:
    guard = CollapseGuard(stop=True)
    gate = build_gate("block32", tau=1e6, normalization="none")
    others = () if own_checkpoint else (StopCheckpoint(),)
    run = make_run(callbacks=(guard, *others), gate=gate, refresh=100)
    trainer = run.fit(9, logger=False, enable_checkpointing=not own_checkpoint)
    assert guard.stopped
    assert trainer.global_step == 4  # the first step is fresh
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 4
    assert (path.name == "collapsed.ckpt") == own_checkpoint
    page = Tags((tmp_path / "rollouts" / "step-000004.html").read_text())
    (summary,) = [attributes["content"] for _, attributes in page.tags if attributes.get("name") == "opdlab-summary"]
    assert NO_WEIGHTS in json.loads(str(summary))["facts"]["collapse"]


@pytest.mark.parametrize(("micro_batch", "accumulate"), [(3, 1), (5, 1), (1, 2)])
def test_a_resumed_run_says_what_an_uninterrupted_one_says(
    make_run: MakeRun, tmp_path: Path, micro_batch: int, accumulate: int
) -> None:
    gate = build_gate("block32", tau=1e6, normalization="none")
    options: dict[str, Any] = {"gate": gate, "lr": 30.0, "accumulate": accumulate}
    whole, first, second = CollapseGuard(), CollapseGuard(), CollapseGuard()
    make_run(callbacks=(whole,), **options).fit(10)
    make_run(callbacks=(first, SaveAt(tmp_path / "at.ckpt", micro_batch)), **options).fit(micro_batch)
    make_run(callbacks=(second,), **options).fit(10, ckpt_path=tmp_path / "at.ckpt")
    assert second.messages == whole.messages != []
    assert second.state_dict()["first"] == whole.state_dict()["first"] is not None


def test_a_disabled_guard_does_nothing(make_run: MakeRun) -> None:
    guard = CollapseGuard(enabled=False)
    make_run(callbacks=(guard,), temperature=1e-6).fit(4, logger=False)
    assert guard.messages == []


def test_the_command_line_has_the_guard_and_its_limits() -> None:
    config = parse_fit(["-c", "quickstart", "--collapse_guard.stop", "true", "--collapse_guard.max_repeated", "0.8"])
    assert (config.collapse_guard.stop, config.collapse_guard.max_repeated) == (True, 0.8)
    assert config.collapse_guard.patience == dataclasses.fields(CollapseGuard().limits)[0].default
    with pytest.raises(UsageError, match=r"collapse_guard\.patience is 0, but must be at least 1"):
        parse_fit(["-c", "quickstart", "--collapse_guard.patience", "0"])


def test_fit_that_is_stopped_has_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = {
        "model.sampling.temperature": 1e-6,
        "model.sampling.max_new_tokens": 12,
        "model.eval_sampling.max_new_tokens": 4,
        "data.benchmarks.toy.init_args.num_problems": 2,
        "data.reuse.prompts_per_pool": 16,
        "trainer.enable_progress_bar": "false",
        "collapse_guard.stop": "true",
    }
    assert main(["fit", "-c", "quickstart", *(f"--{key}={value}" for key, value in options.items())]) == 3
    run = tmp_path / "runs/quickstart/version_0"
    results = json.loads((run / "results.json").read_text())
    assert (results["state"], results["steps"]) == ("collapsed", 3)
    assert [warning.startswith("collapse: step 3: the student's entropy") for warning in results["warnings"]] == [True]
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert (run / "rollouts/step-000003.html").is_file()
    assert "training has collapsed" in capsys.readouterr().err
