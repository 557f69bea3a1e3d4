"""A pair of processes that exchange tensors by gloo, started once for a test file, which runs functions in both."""

import importlib
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240.0
"""Seconds that a function may take."""


class Processes:
    """Two processes; see :meth:`run`.

    Args:
        folder: for what they print.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self._said = [folder / f"process-{rank}.txt" for rank in (0, 1)]
        self._processes = [self._start(rank, port) for rank in (0, 1)]
        self._answers: list[queue.Queue[Any]] = [queue.Queue(), queue.Queue()]
        for rank in (0, 1):
            threading.Thread(target=self._read, args=(rank,), daemon=True).start()

    def _start(self, rank: int, port: str) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "RANK": str(rank)},
            **{"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        }
        with self._said[rank].open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.ranks.pair"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )

    def _read(self, rank: int) -> None:
        stream = self._processes[rank].stdout
        assert stream is not None
        with suppress(EOFError, ValueError):  # closed
            while True:
                self._answers[rank].put(_receive(stream))
        self._answers[rank].put((False, "the process has ended"))

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """Return ``function(rank, *args)`` of both processes.

        Args:
            function: of a module, importable by name.
            args: can be pickled, as can the results.
            seconds: that it may take; the processes are killed then.
        """
        for process in self._processes:
            assert process.stdin is not None
            _send(process.stdin, (function.__module__, function.__qualname__, args))
        found: list[Any] = []
        for rank, answers in enumerate(self._answers):
            try:
                worked, value = answers.get(timeout=seconds)
            except queue.Empty:
                worked, value = False, f"no result within {seconds:.0f} s"
            if not worked:
                self.kill()
                said = "\n".join(path.read_text(errors="replace")[-4000:] for path in self._said)
                raise AssertionError(f"process {rank}: {value}\n{said}")
            found.append(value)
        return found

    def kill(self) -> None:
        """Kill both processes and what they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Two processes that run functions together."""
    made = Processes(tmp_path_factory.mktemp("pair"))
    try:
        yield made
    finally:
        made.kill()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def _serve() -> None:
    """Run functions in a process of the pair, until it is killed or nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what functions print must not come between answers
    import torch

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    kept = dict(os.environ)
    with suppress(EOFError):
        while True:
            module, name, args = _receive(sys.stdin.buffer)
            os.environ.update(kept)  # Lightning removes the size when a trainer has finished
            try:
                function: Any = importlib.import_module(module)
                for part in name.split("."):
                    function = getattr(function, part)
                answer = True, function(rank, *args)
            except BaseException:
                answer = False, traceback.format_exc()
            _send(answers, answer)
    os._exit(0)


if __name__ == "__main__":
    _serve()
