"""The parent's side of worker processes: each thread feeds one process, one answer at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from opdlab.verifiers.verifier import Verdict

# Not multiprocessing, which would run the main script again in each process and so import torch. The process gets our
# sys.path, because the package may be importable only through it.
_PROGRAM = (
    "import json, sys; fd, path, *task = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from multiprocessing.connection import Connection; from opdlab.verifiers.worker_process import serve; "
    "serve(Connection(fd), *task)"
)
_START_LIMIT = 300.0  # seconds; a cold file system on a busy cluster is slow
# The kernel enforces the time limit; this covers a process that was stopped or lost.
_GRACE = 5.0


class WorkerStartError(RuntimeError):
    """Error if no worker process can be started."""


class WorkerPool:
    """Judges answers in processes that are killed when an answer takes too long.

    Args:
        task: ``module:function``; each process calls the function once, with ``options``, and gets the function that
            judges. It is called with the values of a request and with ``decided``, which it may call with the result
            before it goes on, so that an interruption does not lose the result. It returns a :class:`Verdict`.
        options: of the task, values that JSON can represent.
        num_workers: number of processes; each starts with its first answer.
        time_limit: seconds per answer, without the start of a process and the wait for a free one.
        memory_limit: MiB of address space per process.
    """

    def __init__(
        self, task: str, options: Mapping[str, Any], num_workers: int, time_limit: float, memory_limit: int
    ) -> None:
        self.owner = os.getpid()
        self._task = task, options, time_limit, memory_limit
        self._tasks: SimpleQueue[tuple[Future[Verdict], bytes] | None] = SimpleQueue()
        self._lock = threading.RLock()  # the garbage collector may call stop() anywhere
        self._stopped = False
        self._broken: WorkerStartError | None = None
        self._workers: set[_Worker] = set()
        # Daemons, so that the interpreter does not wait at exit for unread answers.
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, *request: Any) -> "Future[Verdict]":
        """Queue the values of a request, which JSON can represent, and return a future.

        The future raises :class:`WorkerStartError` if no process can start, or after :meth:`stop`.
        """
        future: Future[Verdict] = Future()
        with self._lock:  # answers queued before the threads' end marker are still processed
            if self._stopped:
                future.set_exception(WorkerStartError("the verifier was stopped"))
            else:
                self._tasks.put((future, json.dumps(request).encode()))
        return future

    def stop(self) -> None:
        """Kill all processes, including busy ones."""
        if os.getpid() != self.owner:
            return  # a fork of the parent must not kill the parent's processes
        with self._lock:
            self._stopped = True
            for worker in list(self._workers):
                worker.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=_GRACE)

    def _run(self) -> None:
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            future, request = task
            for reason in (None, "worker died"):
                try:
                    worker = worker or self._start()
                    future.set_result(worker.judge(request))
                except WorkerStartError as error:
                    future.set_exception(error)
                except TimeoutError:
                    self._end(worker)
                    worker = None
                    future.set_result(Verdict(False, None, "time limit"))
                except (EOFError, OSError):
                    # The worker died, not its judging fork. The answer is probably not the cause, so try again.
                    self._end(worker)
                    worker = None
                    if reason is None:
                        continue
                    future.set_result(Verdict(False, None, reason))
                except Exception as error:  # whoever waits must learn of it, and the thread must live on
                    self._end(worker)  # its next words may be about this answer
                    worker = None
                    future.set_exception(error)
                break
        self._end(worker)

    def _start(self) -> "_Worker":
        if self._broken is not None:
            raise self._broken
        with self._lock:
            if self._stopped:
                raise WorkerStartError("the verifier was stopped")
            try:
                worker = _Worker(*self._task)
            except OSError as error:
                raise WorkerStartError(f"no process can be started to judge answers: {error}") from error
            self._workers.add(worker)
        try:
            worker.wait_until_ready()
        except WorkerStartError as error:
            self._end(worker)
            self._broken = error  # the next start would fail in the same way, after the same wait
            raise
        return worker

    def _end(self, worker: "_Worker | None") -> None:
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
            worker.kill()
            worker.close()


class _Worker:
    """A process group: the worker process and its judging fork."""

    def __init__(self, task: str, options: Mapping[str, Any], time_limit: float, memory_limit: int) -> None:
        self._patience = time_limit + _GRACE
        self._channel, theirs = Pipe()
        here = str(Path.cwd())
        paths = [path or here for path in sys.path]
        argument = json.dumps([theirs.fileno(), paths, task, options, time_limit, memory_limit])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            process_group=0,  # killed together with its forks; the parent handles Ctrl-C
            env={**os.environ, "PYTHONHASHSEED": "0"},  # makes canonical forms equal in every process
        )
        theirs.close()

    def wait_until_ready(self) -> None:
        try:
            if self._channel.poll(_START_LIMIT) and self._channel.recv_bytes() == b"ready":
                return
        except (EOFError, OSError):
            pass
        self.kill()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        raise WorkerStartError(f"no process can be started to judge answers: {lines[-1] if lines else 'it was killed'}")

    def judge(self, request: bytes) -> Verdict:
        self._channel.send_bytes(request)
        if not self._channel.poll(self._patience):
            raise TimeoutError
        answer: list[Any] = json.loads(self._channel.recv_bytes())
        return Verdict(*answer)

    def kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        self._channel.close()
        if self._process.stderr is not None:
            self._process.stderr.close()
