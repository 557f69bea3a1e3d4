"""A study's file is checked before anything runs: one line has the fault and its fix."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.study import plain_config, plan_study, shipped_studies
from opdlab.errors import UsageError
from opdlab.studies.plan import make_plan
from opdlab.studies.study import parse_study, read_study
from tests.studies.tiny import SHORT, content, plan, study_run, write


def variant(name: str, *overrides: str) -> dict[str, Any]:
    return {"name": name, "overrides": list(overrides)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"variants": [{"nam": "none"}]}, "unknown key 'nam'; did you mean 'name'? keys of a variant: name, overrides"),
        ({"seeds": None}, "seeds is missing"),
        ({"seeds": ["a"]}, "seeds is a, but must be an integer"),
        ({"seeds": []}, "seeds is empty: give numbers from 0"),
        ({"seeds": [3, 1, 3]}, "seeds has 3 twice"),
        ({"seeds": [-1]}, "seeds has -1, but must be numbers from 0"),
        ({"variants": []}, "variants is empty"),
        ({"variants": [variant("a"), variant("a")], "baseline": "a"}, "variants has the name 'a' twice"),
        ({"variants": [variant("a"), variant("A")], "baseline": "a"}, "variants has the name 'a' twice"),
        ({"variants": [variant("../a")], "baseline": "../a"}, "is '../a', but names a folder"),
        ({"name": "a/b"}, "name is 'a/b', but names a folder"),
        ({"baseline": "nome"}, "baseline is 'nome', which is no variant; did you mean 'none'?"),
        (
            {"variants": [variant("none"), {"name": "a", "baseline": "nome"}]},
            "variants: baseline of 'a' is 'nome', which is no variant; did you mean 'none'?",
        ),
        (
            {"variants": [variant("none"), {"name": "a", "baseline": "a"}]},
            "variants: baseline of 'a' is 'a', but 'a' is the variant itself: leave it out",
        ),
        (
            {"variants": [{"name": "none", "baseline": "a"}, variant("a")]},
            "variants: baseline of 'none' is 'a', but 'none' is that of the study: leave it out",
        ),
        ({"budgets": [0]}, "budgets has 0, but must be optimizer steps, at least 1"),
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": [2, 2]}, "budgets has 2 twice"),
        ({"threads": 0}, "threads is 0"),
        ({"base": []}, "base is empty"),
        ({"overrides": ["model.gate=span"]}, "overrides has 'model.gate=span': write --key=value"),
        ({"overrides": ["--model.gate"]}, "write --key=value"),
        ({"overrides": ["--data.seed=3"]}, "data.seed follows from seeds: leave it out"),
        ({"overrides": ["--trainer.max_steps=3"]}, "trainer.max_steps follows from budgets"),
    ],
)
def test_what_is_no_study_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_study(content(**changes))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"variants": [variant("none"), variant("b", "--model.gaet=span")]},
            "'b': unknown key 'model.gaet'; did you mean",
        ),
        ({"variants": [variant("none", "--model.gate=spam")]}, "unknown gate 'spam'; did you mean 'span'?"),
        ({"variants": [variant("none", "--model.gate=token", "--model.gate.tau=-1")]}, "tau is -1"),
        ({"variants": [variant("none", "--data.benchmarks=null")]}, "data.benchmarks is empty"),
        ({"variants": [variant("none", "--trainer.limit_val_batches=0")]}, "trainer.limit_val_batches is 0"),
        ({"variants": [variant("none", "--trainer.max_epochs=1")]}, "trainer.max_epochs is 1"),
        (
            {"variants": [variant("none", "--checkpoint.save_weights_only=true")]},
            "checkpoint.save_weights_only is true, with which a run that is killed cannot go on: leave it out",
        ),
        (
            {"variants": [variant("none", "--collapse_guard.stop=true")]},
            "but collapse_guard.stop follows from the comparison, for which all runs take equally many steps: leave it",
        ),
        ({"variants": [variant("none", "--model.evaluation.pass_at=[64]")]}, "model.evaluation.pass_at has 64"),
        ({"variants": [variant("none", "--data.reuse.batch_size=3")]}, "data.reuse.batch_size is 3"),
        (
            {"variants": [variant("none"), variant("b", "--model.gate.tau=LinearTau", "--model.gate.tau.num_steps=0")]},
            "variants: 'b': model.gate.tau.num_steps is 0, but must be at least 1",
        ),
        (
            {"variants": [variant("none"), variant("b", "--model.max_tokens_per_pass=0")]},
            "variants: 'b': model.max_tokens_per_pass is 0, but must be at least 1",
        ),
        ({"variants": [variant("none", "--data.max_prompt_tokens=0")]}, "data.max_prompt_tokens is 0"),
        ({"variants": [variant("none", "--gate_monitor.every_n_steps=0")]}, "gate_monitor.every_n_steps is 0"),
        (
            {"overrides": ["--model.gaet=span"]},
            "/tiny.yaml: overrides: unknown key 'model.gaet'; did you mean 'model.gate'?",
        ),
        (
            {"overrides": ["--model.gate.tua=1"], "base": ["quickstart"]},
            ": overrides: model.gate: unknown key 'tua' of",
        ),
        ({"base": ["quickstrat"]}, "/tiny.yaml: base: there is no configuration file 'quickstrat'"),
        (
            {"variants": [variant("none"), variant("b", "--model.teacher.path=./nowhere")]},
            "/tiny.yaml: variants: 'b': model './nowhere' does not exist in ",
        ),
        (
            {"overrides": ["--data.train=opdlab.data.JsonlProblems", "--data.train.path=nowhere.jsonl"]},
            "data.train.path is nowhere.jsonl, but this file does not exist in ",
        ),
    ],
)
def test_a_configuration_that_cannot_run_is_found_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    assert study_run(monkeypatch, write(tmp_path, **changes)) == EXIT_USAGE
    error = capsys.readouterr().err
    assert words in error
    assert not (tmp_path / "runs").exists()


def test_devices_are_a_number(tmp_path: Path) -> None:
    """A run sees the devices that the study gives it, under the numbers from 0 on."""

    def resolve(arguments: Sequence[str]) -> dict[str, Any]:
        config = dict(plain_config(arguments))
        return config | {"trainer": {**config["trainer"], "devices": [1]}}

    with pytest.raises(
        UsageError, match=r"trainer.devices is \[1\], but a study chooses the devices of each run: give"
    ):
        make_plan(read_study(write(tmp_path)), tmp_path / "study", resolve)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "paper-toi-mild"], "did you mean 'paper-toy-mild'?"),
        (["run", "tiny.yaml", "--jobs", "0"], "--jobs is 0"),
        (["run", "tiny.yaml", "--cluster", "slurm"], "timeout_min"),
        (
            ["run", "tiny.yaml", "--cluster", "slurm", "--parameters.timeout_min", "9"],
            "--cluster slurm cannot be used: ",
        ),
        (["run", "tiny.yaml", "--cluster", "moon"], "--cluster moon cannot be used"),
        (["run", "tiny.yaml", "--parameters.timeuot", "3"], "'timeuot', but the local cluster knows: timeout_min"),
        (
            ["run", "tiny.yaml", "--parameters.timeout_min", "soon"],
            "--parameters.timeout_min is soon, but must be a number",
        ),
        (["run", "tiny.yaml", "--parameters.timeout_min", "-1"], "--parameters.timeout_min is -1.0: give a finite"),
        (
            ["run", "tiny.yaml", "--parameters.gpus_per_node", "two"],
            "--parameters.gpus_per_node is two, but must be an integer",
        ),
        (
            ["run", "tiny.yaml", "--parameters.gpus_per_node", "3", "--parameters.visible_gpus", "0,1"],
            "--parameters.gpus_per_node is 3, but there are 2 GPUs here: lower it",
        ),
        (
            ["run", "tiny.yaml", "--parameters.gpus_per_node", "2", "--parameters.visible_gpus", "0"],
            "--parameters.gpus_per_node is 2, but there are 1 GPUs here: lower it",
        ),
        (["run", "tiny.yaml", "--folder", "tiny.yaml/x"], "cannot be written"),
        (["run", "tiny.yaml", "--folder", "50%a"], "/50%a', but submitit puts a number in place of %a: give"),
        (["run", "tiny.yaml", "--share", "."], "--share has '.', which has no study.yaml"),
        ([], "give run, report or list"),
    ],
)
def test_a_command_that_cannot_work_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opdlab"])
    assert main(["study", *arguments]) == EXIT_USAGE
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}  # no folder with a lock


# -- a study edited after runs exist ----------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A study with a run of variant ``none`` and seed 0."""
    (tmp_path / "mine.yaml").write_text("data: {max_prompt_tokens: 64}")
    plan(tmp_path, base=["quickstart", "mine"]).settle()
    run = tmp_path / "study/runs/none/seed-0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"state": "failed"}))
    return tmp_path


BASE = ["quickstart", "mine"]
TOKEN = content()["variants"][1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": [2, 6]}, "budgets is [2, 4] there and [2, 6] now"),
        ({"overrides": [*SHORT, "--data.eval_batch_size=2"]}, "overrides is"),
        ({"threads": 2}, "threads is 1 there and 2 now"),
        (
            {"variants": [variant("none", "--model.gate=none", "--data.reuse.epochs=3"), TOKEN]},
            "variants: 'none': overrides is ['--model.gate=none'] there and",
        ),
        ({"variants": [TOKEN], "baseline": "token"}, "variants: 'none' is gone, but has runs"),
        ({"seeds": [1, 2]}, "seeds has no 0 any more, which has runs"),
    ],
)
def test_a_study_that_was_edited_says_what_changed(begun: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(begun, **{"base": BASE, **changes}).settle()
    assert words in str(caught.value)
    assert "give another --folder" in str(caught.value)


def test_a_base_file_that_was_edited_is_noticed(begun: Path) -> None:
    (begun / "mine.yaml").write_text("data: {max_prompt_tokens: 65}")
    with pytest.raises(UsageError, match="'none': data.max_prompt_tokens is 64 there and 65 now"):
        plan(begun, base=BASE).settle()


def test_a_project_may_be_moved_with_its_base_files(begun: Path) -> None:
    moved = begun.rename(begun.with_name("moved"))
    plan(moved, base=BASE).settle()
    assert str(moved / "mine.yaml") in read_study(moved / "study").base
    (moved / "mine.yaml").write_text("data: {max_prompt_tokens: 65}")
    with pytest.raises(UsageError, match="'none': data.max_prompt_tokens is 64 there and 65 now"):
        plan(moved, base=BASE).settle()


def test_what_a_variant_is_compared_with_may_be_changed(begun: Path) -> None:
    """It is of the report alone."""
    more = [content()["variants"][0], {"name": "token", "overrides": ["--model.gate=token"], "baseline": "none"}]
    plan(begun, base=BASE, variants=more).settle()
    assert read_study(begun / "study").variants[1].baseline == "none"


def test_variants_and_seeds_may_be_added_and_what_has_no_runs_changed(begun: Path) -> None:
    more = [content()["variants"][0], variant("token", "--model.gate=token"), variant("span", "--model.gate=span")]
    made = plan(begun, base=BASE, variants=more, seeds=[0, 7])
    made.settle()
    assert len(made.runs()) == 6
    assert read_study(begun / "study") == made.study


def test_configurations_are_migrated_before_they_are_compared(begun: Path) -> None:
    """A class that has moved is the same class: its old name may stand in the folder."""
    stored = begun / "study/variants/none.json"
    text = stored.read_text()
    stored.write_text(text.replace("opdlab.toy.ChainProblems", "opdlab.tasks.toy.problems.ChainProblems"))
    assert stored.read_text() != text
    plan(begun, base=BASE).settle()
    assert stored.read_text() == text
    stored.write_text(text.replace("opdlab.toy.ChainProblems", "opdlab.moved.ChainProblems"))
    with pytest.raises(UsageError, match=r"is opdlab.moved.ChainProblems there and opdlab.toy.ChainProblems now"):
        plan(begun, base=BASE).settle()


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_sound_and_explained(name: str, tmp_path: Path) -> None:
    file = shipped_studies()[name]
    study = read_study(file)
    assert study.name == name
    made = plan_study(study, tmp_path, plain_config)
    assert len({json.dumps(config, sort_keys=True) for config in made.resolved.values()}) == len(study.variants)
    for line in file.read_text().splitlines():
        assert "#" in line or line.startswith("  - "), line  # every key is explained
    assert yaml.safe_load(file.read_text()).keys() >= {"variants", "seeds", "budgets"}
