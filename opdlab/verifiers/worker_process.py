"""The worker process that judges answers.

The worker only forks; its child judges, and the kernel ends the child at the time limit of an answer, even inside C
code. A fork takes a millisecond, a new interpreter with SymPy half a second.

Neither this module nor a task of opdlab may import torch.
"""

import gc
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import astuple
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from opdlab.verifiers.verifier import Verdict

# A child that grows by more than this is replaced, because caches, such as SymPy's, only grow.
_MAX_GROWTH = 256 << 20

_IDLE, _BUSY, _DIFFERENT, _EQUAL = range(4)
_EXIT_PARENT_GONE, _EXIT_GROWN, _EXIT_FAILED = range(3)


def serve(channel: Connection, task: str, options: Mapping[str, Any], time_limit: float, memory_limit: int) -> None:
    """Judge answers from the channel until it closes.

    Args:
        channel: receives the values of a request as JSON, one at a time, and sends back the :class:`Verdict`.
        task: see :class:`opdlab.verifiers.worker_pool.WorkerPool`.
        options: see there.
        time_limit: seconds per answer.
        memory_limit: MiB of address space.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_limit << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    module, _, name = task.partition(":")
    judge = getattr(import_module(module), name)(**options)
    gc.freeze()  # keeps memory pages shared with the children
    state = mmap.mmap(-1, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the parent reads errors of the start from stderr
    channel.send_bytes(b"ready")
    while True:
        state[0] = _IDLE
        child = os.fork()
        if child == 0:
            _serve_in_child(channel, judge, state, time_limit)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if state[0] != _IDLE:
            reason = "time limit" if status == -signal.SIGALRM else "worker died"
            channel.send_bytes(_encoded(_without_form(state, reason)))
        elif status in (_EXIT_PARENT_GONE, _EXIT_FAILED):
            return


def _without_form(state: mmap.mmap, reason: str) -> Verdict:
    """Return the verdict after an interruption: for ``reason``, unless only the canonical form was interrupted."""
    reasons = {_EQUAL: "equal", _DIFFERENT: "different"}
    return Verdict(state[0] == _EQUAL, None, reasons.get(state[0], reason))


def _encoded(verdict: Verdict) -> bytes:
    return json.dumps(astuple(verdict)).encode()


def _serve_in_child(channel: Connection, judge: Callable[..., Verdict], state: mmap.mmap, time_limit: float) -> None:
    code = _EXIT_FAILED
    try:
        largest = _peak_memory() + _MAX_GROWTH
        while _peak_memory() < largest:
            request = channel.recv_bytes()
            state[0] = _BUSY
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            answer = _encoded(_judge_safely(judge, request, state))
            signal.setitimer(signal.ITIMER_REAL, 0)
            state[0] = _IDLE
            channel.send_bytes(answer)
        code = _EXIT_GROWN
    except (EOFError, OSError):
        code = _EXIT_PARENT_GONE
    finally:
        os._exit(code)


def _judge_safely(judge: Callable[..., Verdict], request: bytes, state: mmap.mmap) -> Verdict:
    def decided(equal: bool) -> None:
        state[0] = _EQUAL if equal else _DIFFERENT

    try:
        return judge(*json.loads(request), decided=decided)
    except MemoryError:
        return _without_form(state, "memory limit")
    except Exception as error:  # an answer that crashes the parser is wrong
        return _without_form(state, f"not understood ({type(error).__name__})")


def _peak_memory() -> int:
    """Return the peak resident memory in bytes; the system call counts in KiB, except on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
