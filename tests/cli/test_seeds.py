"""The seeds of a run: what follows ``seed_everything``, and what does not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from opdlab.checkpoints import CheckpointFiles
from opdlab.cli import EXIT_USAGE, main
from opdlab.data import PromptDataModule
from opdlab.evaluation import EvaluationConfig, Evaluator
from opdlab.policies import SamplingConfig
from opdlab.seeds import evaluation_seed, run_seed
from opdlab.toy import ChainProblems
from tests.cli.test_fit import SMALL

Weights = dict[str, torch.Tensor]
Fit = Callable[..., Path]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Run ``opdlab fit`` in an empty folder, and return the run's folder ``ROOT/version_0``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)

    def run(root: str, *arguments: str, config: tuple[str, ...] = ("quickstart", "small.yaml")) -> Path:
        files = [part for name in config for part in ("-c", name)]
        samples = ["--model.evaluation.samples", f"{root}/samples", "--model.evaluation.teacher", "false"]
        samples += ["--model.eval_sampling.max_new_tokens", "120"]  # short answers are equal with any seed
        assert main(["fit", *files, "--trainer.default_root_dir", root, *samples, *arguments]) == 0
        return tmp_path / root / "version_0"

    return run


def weights(run: Path) -> Weights:
    return dict(AutoModelForCausalLM.from_pretrained(run / "student").state_dict())


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def evaluations(run: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the compared settings and the sample lines of each evaluation of a run, in order."""
    found = []
    for folder in sorted((run.parent / "samples").glob("*/val-step-*")):
        lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
        found.append((json.loads((folder / "settings.json").read_text())["compared"], lines))
    assert len(found) == 2
    return found


def test_everything_follows_the_seed_and_a_saved_configuration_too(fit: Fit) -> None:
    one, two = fit("one", "--seed_everything", "1"), fit("two", "--seed_everything", "2")
    again = fit("again", "--seed_everything", "1")
    saved = yaml.safe_load((one / "config.yaml").read_text())
    assert (saved["seed_everything"], saved["data"]["seed"], saved["model"]["evaluation"]["seed"]) == (1, None, None)
    rerun = fit(
        *("rerun", "--seed_everything", "2", "--trainer.logger", "true", "--checkpoint.dirpath", "null"),
        config=(str(one / "config.yaml"),),
    )
    used = json.loads((one / "results.json").read_text())["seeds"]
    assert used == {"seed_everything": 1, "data.seed": 1, "model.evaluation.seed": 1}
    assert equal(weights(one), weights(again))
    assert equal(weights(two), weights(rerun))
    assert not equal(weights(one), weights(two))
    assert evaluations(one) == evaluations(again)
    assert evaluations(two) == evaluations(rerun)
    # The untrained student: the same problems, other answers.
    (settings, lines), (other_settings, other_lines) = evaluations(one)[0], evaluations(two)[0]
    assert settings["model"]["evaluation"].pop("seed") == 1
    assert other_settings["model"]["evaluation"].pop("seed") == 2
    assert settings == other_settings
    assert [line["problem"] for line in lines] == [line["problem"] for line in other_lines]
    assert [line["response"] for line in lines] != [line["response"] for line in other_lines]


def test_a_given_seed_does_not_follow(fit: Fit) -> None:
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]
    run = fit("one", "--seed_everything", "1", "--data.seed", "7", "--model.evaluation.seed", "8", *logger)
    assert [settings["model"]["evaluation"]["seed"] for settings, _ in evaluations(run)] == [8, 8]
    (logged,) = Path("logs").rglob("hparams.yaml")
    values = yaml.safe_load(logged.read_text())
    assert {name: value for name, value in values.items() if "seed" in name} == {
        "seed": 1,
        "data.seed": 7,
        "evaluation.seed": 8,
    }


def test_an_evaluation_of_a_checkpoint_takes_the_seed_of_its_run(fit: Fit, tmp_path: Path) -> None:
    checkpoint = fit("one", "--seed_everything", "3") / "checkpoints/step-2.ckpt"
    (tmp_path / "one/version_0/config.yaml").unlink()  # the checkpoint alone is enough

    def validate(*arguments: str) -> Any:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        command = ["validate", "-c", "quickstart", "-c", "small.yaml", "--ckpt_path", str(checkpoint)]
        assert main([*command, "--model.evaluation.samples", str(out), *arguments]) == 0
        return json.loads((out / "settings.json").read_text())["compared"]["model"]["evaluation"]["seed"]

    assert validate() == 3
    assert validate("--model.evaluation.seed", "5") == 5
    content = CheckpointFiles().load_checkpoint(checkpoint)
    del content["opdlab_evaluation_seed"]  # as an earlier version wrote it
    CheckpointFiles().save_checkpoint(content, checkpoint)
    assert validate("--seed_everything", "4") == 4
    content["opdlab_evaluation_seed"] = 6
    torch.save(content, checkpoint, _use_new_zipfile_serialization=False)  # torch's older format
    assert evaluation_seed(None, checkpoint) == 6


@pytest.mark.parametrize("value", ["false", "null", "-1", "4294967296"])
def test_seeds_that_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "quickstart", "--seed_everything", value]) == EXIT_USAGE
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"opdlab: error: seed_everything is {value}, but ")


def test_true_takes_a_random_seed_on_which_all_processes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert len({run_seed(True) for _ in range(4)}) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="seed_everything is true, but the processes of a run need the same seed"):
        run_seed(True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")  # of the process that started this one
    assert run_seed(True) == 12


def test_without_the_command_line_a_null_seed_is_0() -> None:
    assert PromptDataModule(ChainProblems(1)).seed == 0
    assert Evaluator(EvaluationConfig(), SamplingConfig(), []).config.seed == 0
    assert Evaluator(EvaluationConfig(seed=4), SamplingConfig(), []).config.seed == 4
