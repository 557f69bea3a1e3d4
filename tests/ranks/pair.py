"""Processes that stay up for a test module and run its functions together, with torch's communication on the CPU."""

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

_START_SECONDS = 120.0  # for the imports, beside the time of the first function
_OTHERS_SECONDS = 5.0  # for the others once one has failed: they may wait for it


class Processes:
    """Processes that run functions of test modules together; they start with the first one.

    Args:
        count: number of processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def _start(self) -> None:
        # A process that has the imports and forks: torch on macOS does not bear it.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            multiprocessing.set_forkserver_preload(["opdlab.module"])
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            facts = (rank, self._count, str(Path(self._folder.name) / "store"), theirs)
            process = context.Process(target=_serve, args=facts, daemon=True)
            process.start()
            theirs.close()  # so that each side notices the end of the other
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 240.0) -> list[Any]:
        """Return what a function returns in each process, by rank.

        Args:
            function: of a module; called as ``function(rank, *args)`` with ``torch.distributed`` initialised.
            args: can be pickled.
            seconds: that it may take. Then, and if a process has failed, the processes are killed, and the next call
                starts others.

        Raises:
            AssertionError: a process has failed, or has not returned in time.
        """
        deadline = time.monotonic() + seconds
        if not self._processes:
            self._start()
            deadline += _START_SECONDS
        for connection in self._connections:
            connection.send_bytes(_bytes_of((function, args)))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting := [rank for rank in range(self._count) if rank not in results and rank not in failures]:
            ready = wait([self._connections[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(waiting, "has not returned in time")
            for rank in waiting:
                if self._connections[rank] not in ready:
                    continue
                try:
                    succeeded, value = _value_of(self._connections[rank].recv_bytes())
                except EOFError:
                    succeeded, value = False, "has ended"
                (results if succeeded else failures)[rank] = value
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + _OTHERS_SECONDS)
        if failures:
            self.close()
            raise AssertionError("\n".join(f"rank {rank} {said}" for rank, said in failures.items()))
        return [results[rank] for rank in range(self._count)]

    def close(self) -> None:
        """Kill the processes, and whatever they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # if it has not become the first one of its group yet
            process.join()
        for connection in self._connections:
            connection.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._connections = [], []


def _bytes_of(value: Any) -> bytes:
    """Return a value as bytes; pickle alone cannot read tensors of uint16."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _value_of(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)


def _serve(rank: int, count: int, store: str, connection: Connection) -> None:
    """Run functions until the parent ends."""
    os.setsid()
    # Lightning finds the processes by these.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # Lightning asks for them, and connects nothing
    kept = dict(os.environ)
    torch.set_num_threads(1)
    limit = timedelta(seconds=240)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            os.environ |= kept  # Lightning removes some when a trainer has finished
            function, args = _value_of(message)
            answer = _bytes_of((True, function(rank, *args)))
        except BaseException:
            answer = _bytes_of((False, f"has failed: {traceback.format_exc()}"))
        connection.send_bytes(answer)


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes."""
    processes = Processes(2)
    yield processes
    processes.close()
