"""Base of the verifiers that judge in worker processes with a time limit and a memory limit."""

import os
import threading
import warnings
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdlab.errors import require
from opdlab.verifiers.verifier import Verdict, Verifier
from opdlab.verifiers.worker_pool import WorkerPool

_MIN_MEMORY, _MAX_MEMORY = 512, 1 << 30  # MiB; the system counts bytes in 63 bits
_MAX_SECONDS = 86_400  # the system's clocks take no more than some days
# Global, because a verifier must pickle.
_STARTING = threading.Lock()


class WorkerVerifier(Verifier):
    """Base of verifiers whose judging may hang, crash or exhaust memory.

    A subclass sets :attr:`task`, and :meth:`task_options` if the task has options. An answer that exceeds the time or
    memory limit is wrong, and its process is replaced; :meth:`report` says so once. Processes start with the first
    answers and end with the verifier.

    Args:
        num_workers: number of processes, at least 1.
        time_limit: seconds per answer, above 0 and at most a day, without the start of a process and the wait for a
            free one.
        memory_limit: MiB of address space per process, at least 512.

    Raises:
        UsageError: a value is out of range.
    """

    is_changeable = True
    """True if what it runs is the user's, such as a function or an expression."""

    def __init__(self, num_workers: int = 2, time_limit: float = 5.0, memory_limit: int = 1024) -> None:
        require(num_workers >= 1, f"num_workers is {num_workers}, but must be at least 1")
        require(
            0 < time_limit <= _MAX_SECONDS,
            f"time_limit is {time_limit}, but must be above 0 and at most {_MAX_SECONDS} seconds",
        )
        require(
            _MIN_MEMORY <= memory_limit <= _MAX_MEMORY,
            f"memory_limit is {memory_limit}, but must lie between {_MIN_MEMORY} MiB, what a process itself "
            f"needs, and {_MAX_MEMORY}",
        )
        self.num_workers = num_workers
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self._pool: WorkerPool | None = None
        self._reported: set[str] = set()

    @property
    @abstractmethod
    def task(self) -> str:
        """``module:function``, see :class:`opdlab.verifiers.worker_pool.WorkerPool`; usually a class attribute."""

    def task_options(self) -> Mapping[str, Any]:
        """Return the options of the task; none by default."""
        return {}

    @property
    def label(self) -> str:
        """Return the name in warnings."""
        return type(self).__name__

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """See :meth:`Verifier.verify`."""
        return self.submit(responses, golds)()

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        """See :meth:`Verifier.submit`; a response that is repeated with its gold answer is judged once."""
        pool = self.started_pool()
        keys = list(zip(responses, golds, strict=True))
        futures = {key: pool.submit(*key) for key in dict.fromkeys(keys)}

        def wait() -> list[Verdict]:
            verdicts = {key: future.result() for key, future in futures.items()}
            self.report([verdicts[key] for key in keys])  # the closure keeps the verifier and its processes alive
            return [verdicts[key] for key in keys]

        return wait

    def report(self, verdicts: Sequence[Verdict]) -> None:
        """Warn of answers that count as wrong because they were not judged, once for each reason."""
        change = (", or change it", ": change it") if self.is_changeable else ("", "")
        mends = {
            "time limit": f"did not end within {self.time_limit:g} s: raise verifier.time_limit{change[0]}",
            "memory limit": f"needs more than {self.memory_limit} MiB: raise verifier.memory_limit{change[0]}",
            "worker died": f"ended its process{change[1]}",
        }
        for reason, count in Counter(verdict.reason for verdict in verdicts).items():
            said = mends.get(reason) or reason.removeprefix("failed: ")
            if (reason in mends or reason.startswith("failed: ")) and (kind := reason[:6]) not in self._reported:
                self._reported.add(kind)
                answers = "an answer, which counts" if count == 1 else f"{count} answers, which count"
                warnings.warn(
                    f"the verifier {self.label} did not judge {answers} as wrong, as later ones will: it {said}",
                    stacklevel=2,
                )

    def started_pool(self) -> WorkerPool:
        """Return the processes, which are started once."""
        with _STARTING:
            # A forked process inherits the pool, but not the threads that feed it.
            if self._pool is None or self._pool.owner != os.getpid():
                limits = self.num_workers, self.time_limit, self.memory_limit
                self._pool = WorkerPool(self.task, self.task_options(), *limits)
                weakref.finalize(self, self._pool.stop)
            return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}
