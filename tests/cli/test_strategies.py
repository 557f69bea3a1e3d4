"""Strategies that are not supported, and what does not go with sharded weights: one line, before models are loaded."""

from pathlib import Path
from typing import Any

import pytest

from opdlab.cli import EXIT_USAGE, main

FIT = ["fit", "-c", "quickstart", "--model.student.path", "/nowhere"]
SHARDED = ["--trainer.strategy", "model_parallel"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*FIT, *arguments]) == EXIT_USAGE
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0].partition("error: ")[2]


@pytest.mark.parametrize(
    "name",
    [
        *("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3"),
        *(f"lightning.pytorch.strategies.{name}Strategy" for name in ("FSDP", "DeepSpeed", "ModelParallel")),
    ],
)
def test_other_ways_to_shard_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "--trainer.strategy", name)
    assert said == (
        f"trainer.strategy is {name}, which opdlab does not support: take model_parallel, which shards weights, "
        "gradients and optimizer states over all processes with FSDP2, without tensor parallelism, or ddp"
    )


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("model.max_tokens_per_pass", "100", "model.max_tokens_per_pass is 100"),
        ("model.behavior.offload", "true", "model.behavior.offload is true"),
        ("model.teacher.offload", "true", "model.teacher.offload is true"),
        ("model.student.compile", "true", "model.student.compile is true"),
        ("model.teacher.quantization", "4bit", "model.teacher.quantization is 4bit"),
        ("trainer.precision", "16-mixed", "trainer.precision is 16-mixed"),
        ("save_pools", "true", "save_pools is true"),
        ("model.teacher", "SelfTeacher", "model.teacher is SelfTeacher, whose weights are in checkpoints"),
        ("data.reuse.overlap", "1", "data.reuse.overlap is 1"),
    ],
)
def test_options_for_whole_weights_are_refused(
    option: str, value: str, shown: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, *SHARDED, f"--{option}", value)
    assert said.startswith(f"{shown}, but trainer.strategy model_parallel shards the weights over the processes")


@pytest.mark.usefixtures("peft_pair")
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    merged = ["--model.student.adapter.r", "4", "--model.sampler", "vllm"]
    assert refusal(capsys, *SHARDED, *merged).startswith(
        "model.sampler is vLLM, which takes the adapter of model.student merged into a copy of the weights, but "
    )
    two = ["--trainer.strategy", "single_device", "--trainer.devices", "2"]
    assert refusal(capsys, *two) == (
        "trainer.strategy is single_device, but trainer.devices and trainer.num_nodes make 2 processes: use auto or "
        "ddp, or one device"
    )
    for devices in ("0", "-2", "[]", "abc", "2.5"):
        for command in ("fit", "estimate"):
            assert main([command, *FIT[1:], "--trainer.devices", devices]) == EXIT_USAGE
            assert f"trainer.devices is {devices}, but must be a number from 1 on, " in capsys.readouterr().err
    assert refusal(capsys, "--trainer.strategy", "model_paralel") == (
        "trainer.strategy is model_paralel, which does not exist; did you mean 'model_parallel'? give auto, ddp or "
        "model_parallel"
    )
    compiled = ["--model.student.compile", "true", "--data.reuse.overlap", "1"]
    assert refusal(capsys, *compiled).startswith("data.reuse.overlap is 1, but model.student.compile is true, and ")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_NAME": "run", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"} | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (TORCHRUN, "torchrun"),
        ({**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"}, "torchrun"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, "srun"),
        (SRUN, None),  # a script of sbatch, started once
        ({**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
    ],
)
def test_a_run_of_one_process_that_is_started_several_times_is_refused(
    variables: dict[str, str],
    name: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each process would train alone, or find no folder."""
    monkeypatch.chdir(tmp_path)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    said = refusal(capsys)
    assert said == (
        f"trainer.devices is 1 and trainer.num_nodes is 1, but {name} has started 4 processes, 2 on a machine: give "
        "--trainer.devices 2 and --trainer.num_nodes 2"
        if name
        else "model '/nowhere' does not exist: give a folder written by save_pretrained, or a hub id such as "
        "Qwen/Qwen3-0.6B"
    )
