"""Lack of memory is one line with the keys that lower the use, exit code 1, and the last checkpoint stays."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opdlab.cli import main
from opdlab.out_of_memory import out_of_memory

FIT = "fit -c configs/quickstart.yaml --trainer.default_root_dir {root} --trainer.max_steps 2 --trainer.logger false"


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
