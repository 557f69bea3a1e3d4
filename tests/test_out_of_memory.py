"""Lack of memory is one line with the keys that lower the use, exit code 1, and the last checkpoint stays."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opdlab.cli import main
from opdlab.out_of_memory import out_of_memory
from tests.cli.test_fit import SMALL

FULL_DEVICE = """
import torch
from lightning.pytorch import Callback

class Full(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")
"""
FIT = (
    "fit -c configs/quickstart.yaml --trainer.default_root_dir {root} --trainer.max_steps 2 --trainer.logger false"
    " --data.benchmarks.toy.init_args.num_problems 4"
)


@pytest.mark.filterwarnings("ignore:.*was made for 512 positions")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--model.sampling.max_new_tokens 1000000000000000",
            "while sampling rollouts (.* asked for): lower model.sampling.batch_size or model.sampling.max_new_tokens;",
        ),
        (
            "--model.eval_sampling.max_new_tokens 1000000000000000",
            "while sampling answers of an evaluation (.* asked for): lower model.eval_sampling.batch_size",
        ),
    ],
)
def test_a_run_without_memory_says_what_lowers_it(
    tmp_path: Path, options: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main([*FIT.format(root=tmp_path).split(), *options.split()]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opdlab: error: ")]
    assert "Traceback" not in line
    start, _, end = words.partition("(.* asked for)")
    assert "out of memory on the host " + start in line
    assert end in line


def test_the_last_checkpoint_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A device's error at the third step; a real one needs a GPU.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "full_device.py").write_text(FULL_DEVICE)
    arguments = ["fit", "-c", "quickstart", "-c", "small.yaml", "--trainer.max_steps", "4"]
    assert main([*arguments, "--trainer.callbacks+=full_device.Full"]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opdlab: error: ")]
    assert "out of memory on the device while training (2.00 GiB asked for): lower model.max_tokens_per_pass" in line
    assert "the last checkpoint is kept" in line
    run = tmp_path / "runs/quickstart/version_0"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2.ckpt"]
    assert main([*arguments, "--ckpt_path", "last", "--model.max_tokens_per_pass", "200"]) == 0
    assert (run / "checkpoints/step-4.ckpt").is_file()


def raised(function: object, *arguments: object) -> BaseException:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        function(*arguments)  # type: ignore[operator]
    return caught.value


def test_errors_of_torch_numpy_and_python() -> None:
    for error in (
        raised(torch.empty, 1 << 60),
        raised(np.empty, (1 << 50,)),
        raised(bytearray, 1 << 62),
        OSError(12, "Cannot allocate memory"),
    ):
        assert str(out_of_memory(error)).startswith("out of memory on the host"), error


def test_errors_of_devices() -> None:
    # Their messages, since a device is not at hand.
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert str(out_of_memory(error)).startswith("out of memory on the device"), error
    assert "(20.00 GiB asked for)" in str(out_of_memory(torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU")))


def test_other_errors_are_left_alone() -> None:
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("out of memory")):
        assert out_of_memory(error) is None
