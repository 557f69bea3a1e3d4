"""The command `opdlab serve-teacher`: where it listens, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from opdlab.cli import main
from opdlab.policies import LanguageModel, LocalTeacher, ServedTeacher, TeacherRequest
from opdlab.policies.served.address import TOKEN_VARIABLE
from tests.policies.test_served_teacher import rollouts
from tests.toy_run import STUDENT, TEACHER

ROOT = Path(__file__).parents[2]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve-teacher", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def test_it_serves_until_a_signal_comes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opdlab", "serve-teacher", TEACHER, "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), TOKEN_VARIABLE: "a-token"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            match = re.fullmatch(rf"serving {TEACHER} on \w+ at (http://127.0.0.1:\d+), with a token\n", line)
            assert match is not None, (line, child.poll())
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(TOKEN_VARIABLE, "a-token")
                teacher = ServedTeacher(match[1])
                teacher.bind(LanguageModel(STUDENT))
                ours = teacher.score(rollouts(), TeacherRequest())
            local = LocalTeacher(TEACHER).score(rollouts(), TeacherRequest())
            torch.testing.assert_close(ours.logprobs, local.logprobs, atol=1e-5, rtol=1e-5)
            child.terminate()
            _, said = child.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1].startswith("opdlab: stopped by SIGTERM")
    assert "Traceback" not in said


def test_where_it_may_listen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "example.org"):
        assert f"host is {host}, which other machines can reach" in refused([TEACHER, "--host", host], capsys)
    assert "port is 70000" in refused([TEACHER, "--port", "70000"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}" in refused([TEACHER, "--port", str(port)], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: PATH"),
        (["./nothing"], "./nothing"),
        ([TEACHER, "--device", "nowhere"], "device is 'nowhere', which this machine does not have"),
        ([TEACHER, "--batch_size", "0"], "batch_size is 0"),
        ([TEACHER, "--max_body_mib", "0"], "max_body_mib is 0"),
        ([TEACHER, "--dtype", "float8"], "float8"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(arguments, capsys)
