"""Mathematical equality of answers, judged by math-verify in processes that can be killed."""

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from opdlab.errors import require
from opdlab.verifiers.math.worker_pool import WorkerPool
from opdlab.verifiers.verifier import Verdict, Verifier, bounded_form, boxes

# Without a box only this many characters at the end are searched, because more text only costs time.
_TAIL_CHARACTERS = 400
# Real answers are shorter; parsing longer text only costs time.
_MAX_CHARACTERS = 5000
_MIN_MEMORY = 512
# Global, because a verifier must pickle.
_STARTING = threading.Lock()


class MathVerifier(Verifier):
    r"""Verifier that accepts an answer mathematically equal to the gold answer.

    The answer is the text in the last ``\boxed{…}``, or without a box the expression that math-verify finds at the end
    of the response. Plain numbers, with or without units, are compared exactly (see
    :mod:`opdlab.verifiers.quantities`), all other answers by math-verify. ``extracted`` is the canonical form from
    SymPy, of the gold answer for a right answer and of the answer itself for a wrong one. ``\frac{2}{4}`` and ``0.5``
    are both ``1/2``, so that a majority vote counts equal answers together. Without a form in time, ``extracted`` is
    the text. Wrong answers are not compared with each other, so equal ones may have different forms.

    Answers are untrusted and never parsed in this process. An answer that exceeds the time or memory limit is wrong,
    and its process is replaced. Processes start with the first answers and end with the verifier.

    Args:
        num_workers: number of processes, at least 1.
        time_limit: seconds per answer, above 0, without the start of a process and the wait for a free one.
        memory_limit: MiB of address space per process, at least 512.

    Raises:
        UsageError: a value is out of range.

    Example:
        >>> verdict = MathVerifier(num_workers=1).verify([r"so it is \boxed{\frac{2}{4}}"], ["0.5"])[0]
        >>> verdict
        Verdict(correct=True, extracted='1/2', reason='equal')
    """

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0, memory_limit: int = 1024) -> None:
        require(num_workers >= 1, f"verifier.num_workers is {num_workers}, but must be at least 1")
        require(
            time_limit > 0 and math.isfinite(time_limit),
            f"verifier.time_limit is {time_limit}, but must be above 0 seconds and finite",
        )
        require(
            memory_limit >= _MIN_MEMORY,
            f"verifier.memory_limit is {memory_limit}, but must be at least {_MIN_MEMORY} MiB, what SymPy itself needs",
        )
        self.num_workers = num_workers
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self._pool: WorkerPool | None = None

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return self.submit(responses, golds)()

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        """See :meth:`Verifier.submit`; repeated answers are judged once."""
        pool = self._started_pool()
        keys = []
        for response, gold in zip(responses, golds, strict=True):
            found = boxes(response)
            unboxed = () if found is None else (response[-_TAIL_CHARACTERS:],)  # an open box is no answer
            keys.append((tuple(box.text for box in found) if found else unboxed, gold, bool(found)))
        futures = {
            key: pool.submit(*key) for key in dict.fromkeys(keys) if key[0] and sum(map(len, key[0])) <= _MAX_CHARACTERS
        }

        def wait() -> list[Verdict]:
            assert self._pool is not None  # the closure keeps the verifier and its processes alive
            verdicts = []
            for key in keys:
                answers, gold, boxed = key
                if key in futures:
                    verdict = Verdict(*futures[key].result())
                else:
                    verdict = Verdict(False, None, "too long" if answers else "no answer")
                if verdict.extracted is None and verdict.reason != "no answer" and (verdict.correct or boxed):
                    # Without a canonical form the text counts in a majority vote.
                    text = bounded_form(" ".join((gold if verdict.correct else answers[-1])[:_MAX_CHARACTERS].split()))
                    verdict = Verdict(verdict.correct, text or None, verdict.reason)
                verdicts.append(verdict)
            return verdicts

        return wait

    def _started_pool(self) -> WorkerPool:
        with _STARTING:
            # A forked process inherits the pool, but not the threads that feed it.
            if self._pool is None or self._pool.owner != os.getpid():
                self._pool = WorkerPool(self.num_workers, self.time_limit, self.memory_limit)
                weakref.finalize(self, self._pool.stop)
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}
