"""The worker process that judges mathematical answers.

The worker only forks; its child judges, and the kernel ends the child at the time limit of an answer, even inside C
code. A fork takes a millisecond, a new interpreter with SymPy half a second.

This module must not import torch.
"""

import gc
import json
import logging
import mmap
import os
import resource
import signal
import sys
from dataclasses import astuple
from multiprocessing.connection import Connection

from opdlab.verifiers.math.judging import judge
from opdlab.verifiers.verifier import Verdict

# A child that grows by more than this is replaced, because SymPy's caches only grow.
_MAX_GROWTH = 256 << 20

_IDLE, _BUSY, _DIFFERENT, _EQUAL = range(4)
_EXIT_PARENT_GONE, _EXIT_GROWN, _EXIT_FAILED = range(3)

# Judged without a time limit: this loads SymPy and fills the grammar's caches, which every fork inherits.
_WARM_UP = (
    (r"\frac{x}{2} + \sqrt{3}", r"\sqrt{3} + 0.5x"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, -\frac{\pi}{2})"),
    (r"\{1, 2\}", "1, 3"),
    ("x^2 - 2x + 1 = 0", "y = 2x + 3"),
    (r"\sin(x) + \log_2 5", r"\cos^2 x - 5!"),
)


def serve(channel: Connection, time_limit: float, memory_limit: int) -> None:
    """Judge answers from the channel until it closes.

    Args:
        channel: receives ``[answers, gold, boxed]`` as JSON, one at a time, and sends back the :class:`Verdict`.
        time_limit: seconds per answer.
        memory_limit: MiB of address space.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_limit << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    for answer, gold in _WARM_UP:
        judge([answer], gold, boxed=True)
    gc.freeze()  # keeps memory pages shared with the children
    state = mmap.mmap(-1, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the parent reads errors of the start from stderr
    channel.send_bytes(b"ready")
    while True:
        state[0] = _IDLE
        child = os.fork()
        if child == 0:
            _serve_in_child(channel, state, time_limit)
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


def _serve_in_child(channel: Connection, state: mmap.mmap, time_limit: float) -> None:
    code = _EXIT_FAILED
    try:
        largest = _peak_memory() + _MAX_GROWTH
        while _peak_memory() < largest:
            request = channel.recv_bytes()
            state[0] = _BUSY
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            answer = _encoded(_judge_safely(request, state))
            signal.setitimer(signal.ITIMER_REAL, 0)
            state[0] = _IDLE
            channel.send_bytes(answer)
        code = _EXIT_GROWN
    except (EOFError, OSError):
        code = _EXIT_PARENT_GONE
    finally:
        os._exit(code)


def _judge_safely(request: bytes, state: mmap.mmap) -> Verdict:
    def decided(equal: bool) -> None:
        state[0] = _EQUAL if equal else _DIFFERENT

    try:
        answers, gold, boxed = json.loads(request)
        return judge(answers, gold, boxed, decided)
    except MemoryError:
        return _without_form(state, "memory limit")
    except Exception as error:  # an answer that crashes the parser is wrong
        return _without_form(state, f"not understood ({type(error).__name__})")


def _peak_memory() -> int:
    """Return the peak resident memory in bytes; the system call counts in KiB, except on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
