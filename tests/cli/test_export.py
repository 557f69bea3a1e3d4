"""``opdlab export``: the student of a checkpoint as a folder, and which checkpoint is the best."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlab.callbacks import RunCheckpoint
from opdlab.checkpoint_choice import best_step, student_weights
from opdlab.checkpoints import read_checkpoint
from opdlab.cli import EXIT_USAGE, main
from opdlab.errors import UsageError
from opdlab.files import replacing
from tests.cli.test_fit import SMALL

METRIC = "val/toy/pass@1"
# Evaluations after steps 2, 4 and 6 (micro-batches), periodic checkpoints after 3 and 6.
BEST = (
    *("--trainer.max_steps", "7", "--trainer.val_check_interval", "2", "--checkpoint.every_n_train_steps", "3"),
    *("--checkpoint.monitor", METRIC, "--checkpoint.mode", "max", "--export.enabled", "false"),
    *("--model.evaluation.teacher", "false", "--checkpoint.save_last", "true"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps with scores of its own, which are the same on every machine: 0.2, 0.6, 0.6, 0.1 by step."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("opdlab.evaluation.evaluator.Evaluator.compute", _scored())
        assert main(["fit", "-c", "quickstart", "-c", "small.yaml", *BEST]) == 0
    return folder / "runs/quickstart/version_0"


def _scored() -> Callable[[Any], dict[str, torch.Tensor]]:
    scores = iter([0.9, 0.2, 0.6, 0.6, 0.1])  # before training, after steps 2, 4, 6 and 7
    return lambda _: {f"{name}/pass@1": torch.tensor(score) for score in [next(scores)] for name in ("toy", "mean")}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_stays_beside_the_newest(run: Path) -> None:
    # Step 3 was saved with the score of step 2 in sight, step 6 has the score of step 4 again: the earlier one stays.
    assert names(run) == ["final.ckpt", "last.ckpt", "step-4.ckpt", "step-6.ckpt"]
    with (run / "metrics.csv").open() as file:
        scores = {int(row["step"]): row[METRIC] for row in csv.DictReader(file) if row[METRIC]}
    assert list(scores) == [0, 2, 4, 6, 7]
    results = json.loads((run / "results.json").read_text())
    assert (results["best_step"], results["after_step"]) == (4, 7)
    assert results["best"]["toy/pass@1"]["value"] == pytest.approx(0.6)


def test_the_best_one_is_exported_with_a_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best"
    assert main(["export", str(run), "--checkpoint", "best", "--out", str(out)]) == 0
    assert f"student after 4 steps, from {run / 'checkpoints/step-4.ckpt'}" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer("7\n")["input_ids"]
    saved = student_weights(run / "checkpoints/step-4.ckpt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"model.{name}"])
    card = ModelCard.load(out / "README.md").text
    assert "| optimizer steps | 4 |" in card
    assert "| optimizer | AdamW\\(lr=0.0002\\) |" in card
    assert "| metric | before | step 4 |" in card
    assert "| toy/pass\\@1 | 0.900 | 0.600 |" in card
    assert (out / "opdlab.yaml").read_text() == (run / "config.yaml").read_text()
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 12


def test_last_is_the_default_and_a_file_may_be_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "last")]) == 0
    assert "--merge" not in capsys.readouterr().out
    assert "| optimizer steps | 7 |" in (tmp_path / "last/README.md").read_text()
    assert main(["export", str(run), "--checkpoint", "step-6.ckpt", "--merge"]) == 0
    assert "--merge has no effect: the student has no adapter\n" in capsys.readouterr().out
    assert "| optimizer steps | 6 |" in (run / "student-step-6/README.md").read_text()


def test_a_run_that_was_copied_goes_on_with_its_checkpoints(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a warning, which would be an error here, and without a second file for the last checkpoint."""
    copy = tmp_path / "version_0"
    shutil.copytree(run, copy)
    monkeypatch.chdir(run.parents[2])
    monkeypatch.setattr(sys, "path", list(sys.path))
    more = ["--trainer.max_steps", "9", "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", str(tmp_path)]
    last = ["--ckpt_path", str(copy / "checkpoints/last.ckpt")]
    before = names(run)
    assert main(["fit", "-c", "quickstart", "-c", "small.yaml", *BEST, *more, *last]) == 0
    # The final checkpoint, of step 7, is not on the way from the last periodic one, of step 6, to step 9.
    assert names(copy) == ["final.ckpt.before-resume", "last.ckpt", "step-4.ckpt", "step-9.ckpt"]
    assert names(run) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}/checkpoints"], "is not a run's folder, since it has no config.yaml"),
        (["{run.parent}"], "did you mean {run}?"),
        (["{run}/nowhere"], "is not a folder: give a run's folder"),
        (
            ["{run}", "--checkpoint", "step-5.ckpt"],
            "--checkpoint is 'step-5.ckpt', which is not a file: give best, last",
        ),
        (["{run}", "--checkpoint", "beste"], "step-4.ckpt, step-6.ckpt"),
        (
            ["{run}", "--checkpoint", "{run}/config.yaml"],
            "--checkpoint '{run}/config.yaml' cannot be read, it is no ch",
        ),
        (["{run}", "--out", "{run}"], "exists: give another folder, or delete it"),
        ([], "give a run's folder, such as"),
    ],
)
def test_wrong_calls_are_one_line(
    run: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(run=run) for word in arguments]
    assert main(["export", *words]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said.format(run=run) in error
    assert error.count("\n") == 1


def test_best_needs_a_metric_and_a_score(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    config = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(f"monitor: {METRIC}", "monitor: null"))
    assert main(["export", str(copy), "--checkpoint", "best"]) == EXIT_USAGE
    assert "--checkpoint.monitor val/mean/pass@1 --checkpoint.mode max" in capsys.readouterr().err
    assert main(["export", str(copy)]) == EXIT_USAGE
    assert "has no sound checkpoint" in capsys.readouterr().err
    (copy / "config.yaml").write_text(config)
    (copy / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes())
    assert main(["export", str(copy), "--checkpoint", "best"]) == EXIT_USAGE
    assert "has no sound checkpoint" in capsys.readouterr().err
    with replacing(copy / "checkpoints/step-3.ckpt") as file:
        torch.save({**read_checkpoint(run / "checkpoints/step-6.ckpt"), "global_step": 3}, file)
    assert main(["export", str(copy), "--checkpoint", "best"]) == EXIT_USAGE
    assert "no checkpoint of" in (error := capsys.readouterr().err)
    assert "ones are of steps 3; give --checkpoint last" in error


def test_a_broken_checkpoint_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "metrics.csv"):
        shutil.copy(run / name, tmp_path)
    broken = tmp_path / "checkpoints/step-9.ckpt"
    broken.write_bytes((run / "checkpoints/step-6.ckpt").read_bytes()[:5000])
    for checkpoint in ("last", "best"):
        assert main(["export", str(tmp_path), "--checkpoint", checkpoint]) == EXIT_USAGE
        error = capsys.readouterr().err
        assert f"'{tmp_path}' has no sound checkpoint in checkpoints/: '{broken}' cannot be read, it may" in error
        assert error.count("\n") == 1
    shutil.copy(run / "checkpoints/step-4.ckpt", tmp_path / "checkpoints")
    for checkpoint in ("last", "best"):
        with pytest.warns(UserWarning, match=rf"--checkpoint {checkpoint} skips what is not sound: '{broken}' cannot"):
            assert main(["export", str(tmp_path), "--checkpoint", checkpoint, "--out", str(tmp_path / checkpoint)]) == 0
        assert "student after 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["export", "replay"])
def test_a_configuration_that_is_cut_off_is_named(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes((run / "config.yaml").read_bytes()[:300])
    assert main([command, str(tmp_path)]) == EXIT_USAGE
    error = capsys.readouterr().err
    lacks = "model.student, model.teacher, model.objective, model.gate, data.train"
    assert f"{file} lacks {lacks}: it may be cut off; mend it, such as with student/opdlab.yaml" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_model_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"student.model.x": torch.zeros(2)}, "global_step": 1}, other)
    with pytest.warns(UserWarning, match="has no digest"):
        assert main(["export", str(run), "--checkpoint", str(other), "--out", str(tmp_path / "out")]) == EXIT_USAGE
    assert "does not fit the student of the run's configuration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_alone_or_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("small.yaml").write_text(SMALL)
    adapter = [
        "--model.student.init_args.adapter.r",
        "4",
        "--model.evaluation.teacher",
        "false",
        "--export.enabled",
        "false",
    ]
    assert main(["fit", "-c", "quickstart", "-c", "small.yaml", *adapter]) == 0
    run = Path("runs/quickstart/version_0")
    assert main(["export", str(run), "--out", "adapter"]) == 0
    assert Path("adapter/adapter_model.safetensors").is_file()
    assert not Path("adapter/config.json").exists()
    assert main(["export", str(run), "--out", "merged", "--merge"]) == 0
    assert not list(Path("merged").glob("adapter*"))
    tokens = torch.tensor([[5, 6, 7, 8]])
    small, whole = (AutoModelForCausalLM.from_pretrained(name)(tokens).logits for name in ("adapter", "merged"))
    torch.testing.assert_close(small, whole, atol=1e-4, rtol=1e-4)


def test_a_run_resumes_from_its_best_checkpoint_as_if_it_had_not_stopped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 4 was saved after its evaluation, which is repeated.
    monkeypatch.chdir(run.parents[2])
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copytree(run, tmp_path / "copy")
    try:
        resume = ["--ckpt_path", str(run / "checkpoints/step-4.ckpt")]
        assert main(["fit", "-c", "quickstart", "-c", "small.yaml", *BEST, *resume]) == 0
        after = student_weights(run / "checkpoints/final.ckpt")
        before = student_weights(tmp_path / "copy/checkpoints/final.ckpt")
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    finally:  # other tests read the run
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "copy", run)


def test_the_rules_of_the_best_one() -> None:
    assert best_step({2: 0.5, 4: 0.7, 6: 0.7}, "max") == 4
    assert best_step({2: 0.5, 4: 0.3, 6: float("nan")}, "min") == 4
    assert best_step({}, "max") is None
    with pytest.raises(UsageError, match="monitor is 'val/mean/pass@1', but mode is null"):
        RunCheckpoint(monitor="val/mean/pass@1")
    with pytest.raises(UsageError, match="must be a metric of the evaluations"):
        RunCheckpoint(monitor="train/loss", mode="min")
    with pytest.raises(UsageError, match="save_top_k is 0"):
        RunCheckpoint(monitor="val/mean/pass@1", mode="max", save_top_k=0)


def test_a_direction_without_a_metric_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "export: {enabled: false}\n")
    options = ["--trainer.default_root_dir", str(tmp_path), "--checkpoint.mode", "max"]
    assert main(["fit", "-c", "quickstart", "-c", str(tmp_path / "small.yaml"), *options]) == 0
    assert caplog.text.count("checkpoint.mode is max, but checkpoint.monitor is null") == 1
