"""Mathematical equality of answers, judged by math-verify in processes that can be killed.

A model's answer is untrusted text: ``10^10^10`` or a few thousand parentheses keep a computer algebra system busy for
ever. So it is never looked at in our process; a worker that takes too long is killed and replaced.
"""

import logging
import multiprocessing
import weakref
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as WorkerTimeoutError
from typing import Any

from pebble import ProcessExpired, ProcessPool

from opdlab.errors import require
from opdlab.tasks.verifier import Verdict, Verifier, last_boxed

# Without a box the answer is looked for at the end of the response; more text only costs time.
_TAIL_CHARACTERS = 400
_MEMORY_LIMIT_BYTES = 4 << 30


def _start_worker() -> None:
    import resource

    import math_verify  # noqa: F401 - a second of imports, before any answer's clock runs

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it reminds us that its own limit is off

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _judge(answer: str, gold: str) -> tuple[bool, str | None, str]:
    """Runs in a worker: compare ``answer`` with ``gold``."""
    from math_verify import parse, verify

    # The worker is killed from outside; math-verify's own limit needs SIGALRM and the main thread.
    found = parse(answer, parsing_timeout=None)
    if not found:
        return False, None, "no answer"
    wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    equal = bool(verify(wanted, found, timeout_seconds=None))
    return equal, str(found[-1])[:200], "equal" if equal else "different"


class MathVerifier(Verifier):
    r"""Right when math-verify finds the answer mathematically equal to the gold one.

    The answer is what stands in the last ``\boxed{…}``, or without a box whatever math-verify finds at the end of the
    response. Workers start at the first call and end with the verifier.

    Args:
        num_workers: processes, at least 1.
        time_limit: seconds an answer may take, above 0; beyond it the worker is killed and the answer is wrong.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> verdict = MathVerifier(num_workers=1).verify([r"so it is \boxed{\frac{2}{4}}"], ["0.5"])[0]
        >>> verdict.correct, verdict.reason
        (True, 'equal')
    """

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0) -> None:
        require(num_workers >= 1, f"verifier.num_workers is {num_workers}, but must be at least 1")
        require(time_limit > 0, f"verifier.time_limit is {time_limit}, but must be above 0 seconds")
        self.num_workers = num_workers
        self.time_limit = time_limit
        self._pool: ProcessPool | None = None

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        pool = self._started_pool()
        futures = [
            pool.schedule(_judge, args=[_answer_text(response), gold], timeout=self.time_limit)
            for response, gold in zip(responses, golds, strict=True)
        ]
        return [self._verdict(future) for future in futures]

    def _verdict(self, future: Any) -> Verdict:
        try:
            return Verdict(*future.result())
        except WorkerTimeoutError:
            return Verdict(False, None, "time limit")
        except (ProcessExpired, MemoryError):
            return Verdict(False, None, "worker died")
        except BrokenExecutor:  # no worker can start: not the answer's fault, and it must not pass for a wrong one
            raise
        except Exception as error:  # whatever a hostile answer makes math-verify raise is that answer's fault
            return Verdict(False, None, f"not understood ({type(error).__name__})")

    def _started_pool(self) -> ProcessPool:
        if self._pool is None:
            # Not forked: the parent holds torch's threads and perhaps a GPU.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(max_workers=self.num_workers, initializer=_start_worker, context=context)
            weakref.finalize(self, _stop, self._pool)
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _answer_text(response: str) -> str:
    boxed = last_boxed(response)
    return response[-_TAIL_CHARACTERS:] if boxed is None else f"\\boxed{{{boxed}}}"
