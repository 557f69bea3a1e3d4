"""``opdlab fit`` through the command line, in this process."""

import csv
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlab.cli import EXIT_USAGE, main
from opdlab.diagnostics import find_metric, metric_rows
from tests.children import run_child
from tests.stops import stopper

README = Path(__file__).parents[2] / "README.md"

SMALL = """
trainer: {max_steps: 2, val_check_interval: 100, enable_progress_bar: false, enable_model_summary: false}
model:
  sampling: {max_new_tokens: 12}
  eval_sampling: {num_samples: 2, max_new_tokens: 12}
  evaluation: {pass_at: [1, 2]}
data:
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 8}}
  benchmarks:
    toy: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 2, split: held_out}}
  reuse: {prompts_per_pool: 4, epochs: 2, batch_size: 4}
checkpoint: {every_n_train_steps: 1}
gate_monitor: {every_n_steps: 1}
"""

Opdlab = Callable[..., int]


@pytest.fixture
def opdlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opdlab:
    """Run ``opdlab fit -c quickstart -c small …`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *arguments, command="fit": main([command, "-c", "quickstart", "-c", "small.yaml", *arguments])


def test_a_run_leaves_everything_in_its_folder(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opdlab() == 0
    output = capsys.readouterr().out
    cell = r" +│ \d\.\d{3} ± \d\.\d{3}"
    assert re.search("toy/pass@2" + 3 * cell, output)
    assert "tensorboard --logdir runs/quickstart" in output
    run = tmp_path / "runs/quickstart/version_0"
    assert (run / "config.yaml").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2.ckpt"]
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    saved = torch.load(run / "checkpoints/step-2.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(student.model.norm.weight, saved["student.model.model.norm.weight"])
    assert len(AutoTokenizer.from_pretrained(run / "student")) == 38
    events = EventAccumulator(str(run), size_guidance={"histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert "gate/block/000" in events.Tags()["histograms"]
    assert sorted(name for name in scalars if find_metric(name) is None) == []
    rows = {row.name for row in metric_rows() if not any(row.matches(name) for name in scalars)}
    of_whole_buffers = {"rollout/repeated_share", "rollout/reverse_kl"}
    optional = {"val/<benchmark>/reverse_kl", "val/<benchmark>/maj@<n>"}  # no answer is extracted from 12 tokens
    of_sampled_token = {f"train/{name}" for name in ("advantage", "baseline", "clip_share", "reward_share")}
    of_engine = {f"train/sampler_{name}" for name in ("gap", "gap_max", "correction", "correction_share")}
    of_overlap = {"rollout/hidden_share", "time/sample_wait_seconds"}
    of_others = {"gate/tau", "rollout/demonstration_share"} | of_overlap
    targets = {name for name in rows if name.startswith("targets/")}  # of a cache, of several teachers
    several = {"teacher-<teacher>/<benchmark or mean>/<metric>"}
    assert rows == of_sampled_token | of_engine | of_others | targets | of_whole_buffers | optional | several


def test_resume_goes_on_in_the_same_folder(opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opdlab("--model.evaluation.teacher", "false") == 0
    before = re.search(r"toy/length +│ ([\d.]+)", capsys.readouterr().out)
    assert opdlab("--ckpt_path", "last", "--trainer.max_steps", "3", "--model.evaluation.teacher", "false") == 0
    again = re.search(r"toy/length +│ ([\d.]+)", capsys.readouterr().out)
    assert before is not None
    assert again is not None
    assert before[1] == again[1]  # the resumed run still has the first run's start
    folders = sorted(path.name for path in (tmp_path / "runs/quickstart").iterdir())
    assert folders == ["version_0"]
    assert (tmp_path / "runs/quickstart/version_0/checkpoints/step-3.ckpt").is_file()
    assert opdlab("--trainer.max_steps", "1", "--model.evaluation.teacher", "false") == 0
    assert (tmp_path / "runs/quickstart/version_1").is_dir()
    capsys.readouterr()
    assert opdlab("--ckpt_path", "last", command="validate") == 0
    output = capsys.readouterr().out
    assert "toy/pass@1" in output
    assert "student" in output
    assert "before" not in output


@pytest.mark.parametrize("objective", ["teacher_topk", "sampled_token"])
@pytest.mark.parametrize("gate", ["none", "block64", "span"])
def test_the_six_paper_variants_run_by_flags_alone(opdlab: Opdlab, objective: str, gate: str) -> None:
    flags = ["--model.objective", objective, f"--model.gate={gate}", "--model.evaluation.teacher", "false"]
    assert opdlab(*flags, "--trainer.max_steps", "1") == 0


def test_a_gate_of_ones_own_as_the_readme_writes_it(opdlab: Opdlab, tmp_path: Path) -> None:
    code = re.search(r"```python\n# my_gates\.py\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "my_gates.py").write_text(code[1])
    name = re.search(r"--model\.gate (my_gates\.\w+)", README.read_text())
    assert name is not None
    assert opdlab("--model.gate", name[1], "--model.gate.tau", "2.0") == 0
    config = yaml.safe_load((tmp_path / "runs/quickstart/version_0/config.yaml").read_text())
    assert config["model"]["gate"]["class_path"] == name[1]
    assert config["model"]["gate"]["init_args"]["tau"] == 2.0


def test_gates_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"block64 +Gate on blocks of 64 tokens", line) for line in lines)
    assert len(lines) >= 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model.gate blok64", "unknown gate 'blok64'; did you mean 'block64'?"),
        ("--model.objective teacher_topc", "unknown objective 'teacher_topc'; did you mean 'teacher_topk'?"),
        (
            "--model.gate.tua 1",
            "error: model.gate: unknown key 'tua' of opdlab.strategies.block.Block64Gate; did you mean 'tau'?",
        ),
        ("--modle.gate block64", "unknown key 'modle.gate'; did you mean 'model.gate'?"),
        (
            "--sample_logger.every_n_step 5",
            "unknown key 'sample_logger.every_n_step'; did you mean 'sample_logger.every_n_",
        ),
        ("--sample_logger.foo 5", "unknown key 'sample_logger.foo'; its section has every_n_steps, num_rollouts"),
        ("--sample_logger false", "sample_logger is false, but it is a section; its section has every_n_steps, num"),
        ("--data.reuse.epohcs 1", "unknown key 'data.reuse.epohcs'; did you mean 'data.reuse.epochs'?"),
        ("-c quickstrat", "no configuration file 'quickstrat', and none of that name"),
        ("-c unknown_key.yaml", "unknown key 'model.gaet'; did you mean 'model.gate'?"),
        ("--model.gate.tau -1", "error: model.gate.tau is -1.0"),
        ("--model.gate opdlab.strategies.BlockGate --model.gate.block_size 0", "error: model.gate.block_size is 0"),
        ("--model.objective.k 1", "error: model.objective.k is 1"),
        ("--model.objective.k 99", "error: model.objective.k is 99, but the vocabulary has only 38 tokens"),
        ("--data.reuse.epochs 0", "error: data.reuse.epochs is 0"),
        ("--data.reuse.batch_size 3", "data.reuse.batch_size is 3, which does not divide a rollout buffer of 8"),
        ("--trainer.accumulate_grad_batches 3", "trainer.accumulate_grad_batches is 3"),
        ("--trainer.accumulate_grad_batches 0", "trainer.accumulate_grad_batches is 0, but must be at least 1"),
        ("-c binary.yaml", "binary.yaml, line 1, is not text in UTF-8: give a YAML file in that encoding"),
        ("--model.gate torch.nn.Linear", "error: model.gate is torch.nn.Linear, but must be one of block, "),
        ("--data.reuse.prompts_per_pool 12", "prompts_per_pool is 12, but there are only 8 prompts"),
        ("--behavior_refresh.every_n_steps 0", "error: behavior_refresh.every_n_steps is 0"),
        ("--model.eval_sampling.num_samples 1", "pass_at has 2, but model.eval_sampling.num_samples is 1"),
        ("--model.sampling.temperature 0", "error: model.sampling.temperature is 0"),
        ("--model.reduction sum", "model.reduction"),
        ("--model.student.path ./nowhere", "model './nowhere' does not exist in /"),
        ("--model.student.path ./half", "model './half' cannot be loaded"),
        ("--model.student.path ./other", "different vocabularies: token 3 is '0' to the teacher"),
        ("--data.train.num_problems 0", "error: data.train.num_problems is 0"),
        ("--data.benchmarks.toy.num_problems 0", "error: data.benchmarks.toy.num_problems is 0"),
        ("--model.teacher.batch_size 0", "error: model.teacher.batch_size is 0"),
        ("--model.mask_first [nowhere]", "error: model.mask_first has 'nowhere'"),
        ("-c bad_adapter.yaml", "error: model.student.adapter.r is 0"),
        ("--data.max_prompt_tokens 3", "data.max_prompt_tokens is 3, but every prompt"),
        ("--ckpt_path nowhere.ckpt", "ckpt_path 'nowhere.ckpt' does not exist"),
        ("--ckpt_path last", "there is no checkpoint under runs/quickstart"),
        ("--ckpt_path small.yaml", "cannot be read"),
        ("--trainer.max_steps many", "trainer.max_steps"),
        ("--trainer.precision bf16-true", "trainer.precision is bf16-true"),
        ("--trainer.default_root_dir small.yaml/runs", "trainer.default_root_dir is 'small.yaml/runs'"),
        ("--model.gate.block_size 32", "unknown key 'block_size' of opdlab.strategies.block.Block64Gate; its keys: "),
        ("-c unknown_gate.yaml", "unknown gate 'blok64'; did you mean 'block64'?"),
        ("-c empty.yaml", "problems.jsonl holds no problems"),
        (
            "--model.gate.tau LinearTau --model.gate.tau.num_steps 0",
            "error: model.gate.tau.num_steps is 0, but must be at",
        ),
        ("--model.gate.tau LinearTau --model.gate.tau.start -1", "error: model.gate.tau.start is -1.0, but must lie"),
        ("-c bad_target.yaml", "error: model.gate.tau.target is 1.5, but must lie between 0 and 1"),
        ("--model.max_tokens_per_pass 0", "model.max_tokens_per_pass is 0, but must be at least 1: use"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    (tmp_path / "unknown_key.yaml").write_text("model:\n  gaet: block64\n")
    (tmp_path / "unknown_gate.yaml").write_text("model:\n  gate: blok64\n")
    tau = {"class_path": "opdlab.tau.EffectiveSampleSizeTau", "init_args": {"target": 1.5}}
    gate = {"class_path": "block64", "init_args": {"tau": tau}}
    (tmp_path / "binary.yaml").write_bytes(b"\xad\xff\x00")
    (tmp_path / "bad_target.yaml").write_text(yaml.dump({"model": {"gate": gate}}))
    student = {"init_args": {"adapter": {"r": 0}}}
    (tmp_path / "bad_adapter.yaml").write_text(yaml.dump({"model": {"student": student}}))
    (tmp_path / "problems.jsonl").touch()
    source = {"class_path": "opdlab.data.JsonlProblems", "init_args": {"path": "problems.jsonl"}}
    (tmp_path / "empty.yaml").write_text(yaml.dump({"data": {"train": source}}))
    if "half" in arguments or "other" in arguments:
        make_broken_students(tmp_path)
    assert opdlab(*arguments.split()) == EXIT_USAGE
    error = capsys.readouterr().err
    reported = [line for line in error.splitlines() if line.startswith("opdlab: error:")]
    assert len(reported) == 1
    assert words in reported[0]
    assert "Traceback" not in error
    assert error.rstrip().endswith(reported[0].rstrip())


def test_training_problems_are_read_before_anything_takes_long(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = stopper("on_validation_start", "SIGINT")  # an evaluation would end with another exit code
    (tmp_path / "problems.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}')
    source = {"class_path": "opdlab.data.JsonlProblems", "init_args": {"path": "problems.jsonl"}}
    (tmp_path / "broken.yaml").write_text(yaml.dump({"data": {"train": source}}))
    assert opdlab("-c", "broken.yaml", *stops) == EXIT_USAGE
    assert "there are only 1 prompts" in capsys.readouterr().err
    assert opdlab("--data.reuse.prompts_per_pool", "12", *stops) == EXIT_USAGE
    assert "there are only 8 prompts" in capsys.readouterr().err


def make_broken_students(folder: Path) -> None:
    shipped = Path(__file__).parents[2] / "opdlab/toy/models/student"
    for name in ("half", "other"):
        (folder / name).mkdir()
        for file in shipped.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    weights = folder / "half/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tokenizer = folder / "other/tokenizer.json"
    tokenizer.write_text(re.sub(r'"0": (\d+)', '"zero": \\1', tokenizer.read_text(), count=1))


def test_an_empty_command_says_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == EXIT_USAGE
    assert "-c quickstart" in capsys.readouterr().err


def test_the_package_is_run_under_the_name_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opdlab", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    shown = run_child(command, env=environment, cwd=tmp_path, check=True)
    assert shown.stdout.startswith("usage: opdlab ")


@pytest.mark.parametrize("module", ["torch", "argparse"])  # of a command; of the command line itself
def test_ctrl_c_is_handled_while_the_libraries_load(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    command = [sys.executable, "-m", "opdlab", "gates"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{README.parent}"}
    stopped = run_child(command, env=environment, cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert stopped.stderr.startswith("opdlab: stopped")
    assert len(stopped.stderr.splitlines()) == 1


def test_a_resumed_curve_does_not_run_backwards(opdlab: Opdlab, tmp_path: Path) -> None:
    quick = (
        "--model.evaluation.teacher",
        "false",
        "--checkpoint.every_n_train_steps",
        "2",
        "--checkpoint.save_top_k=-1",
    )
    assert opdlab(*quick, "--trainer.max_steps", "5") == 0
    folder = tmp_path / "runs/quickstart/version_0"
    # As if it had been killed after step 5, for which there is no checkpoint.
    assert opdlab(*quick, "--trainer.max_steps", "6", "--ckpt_path", str(folder / "checkpoints/step-2.ckpt")) == 0
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/toy/pass@1")] == [0, 6]
    with (folder / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(rows) == [0, 1, 2, 3, 4, 5, 6]
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert {step: float(row["train/loss"]) for step, row in rows.items() if step} == pytest.approx(losses)
