"""Sampling the next rollout buffer beside training."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdlab.policies import BehaviorPolicy
from opdlab.policies.decoding import naming_step
from opdlab.progress import Progress
from opdlab.rollouts.collector import Autocast, Collector, Sampled
from opdlab.types import Prompt

JOIN_SECONDS = 20.0
"""Seconds that a worker has to end when it is stopped; a part of :data:`opdlab.processes.END_SECONDS`."""
_CUDA: Any = torch.cuda  # partly without types
_LOOK_SECONDS = 0.05  # seconds between two looks at a worker that is waited for


class SamplingAhead:
    """Sampling of the next rollout buffer beside training, by one worker thread, from a copy of the snapshot.

    The copy has the snapshot's weights as they are when training on a buffer begins. It samples the next buffer and
    scores it. All methods are called by the main thread. The worker uses the sampler, the copy and host memory: no
    collective of the processes, no global random number and nothing that training changes. While it runs, nothing
    else may use the sampler, so an evaluation first calls :meth:`wait`.

    Args:
        behavior: the snapshot.
        collector: collects from it.
        autocast: see :meth:`Collector.sample`; the worker enters its own, because a thread has its own state.
    """

    def __init__(self, behavior: BehaviorPolicy, collector: Collector, autocast: Autocast) -> None:
        self._behavior, self._collector, self._autocast = behavior, collector, autocast
        self._copy: BehaviorPolicy | None = None
        self._step = 0  # optimizer steps taken when the weights were copied
        self._worker: _Worker | None = None
        self._stream: Any = None  # of an accelerator
        self._restored: dict[str, Any] | None = None  # not in the copy yet: devices are set up after a state is loaded

    def copy_weights(self, step: int) -> None:
        """Copy the snapshot; its worker must have been taken or stopped.

        Args:
            step: optimizer steps taken so far.
        """
        self._restored = None
        if self._copy is None:
            self._copy = self._behavior.twin()
        else:
            self._copy.refresh(self._behavior.policy, int(self._behavior.step))
        self._step = step

    def start(self, prompts: Sequence[Prompt], *, seed: int, **options: Any) -> None:
        """Begin to sample a buffer from the copy; without one, which no buffer has made yet, nothing happens.

        Args:
            prompts: prompts of the buffer.
            seed: of the buffer.
            **options: further arguments of :meth:`Collector.sample`.
        """
        self._restore()
        if self._copy is None:
            return
        self.stop()
        collector, step = self._collector.sampling_from(self._copy), self._step
        device = self._copy.device
        if device.type == "cuda":
            self._stream = self._stream or _CUDA.Stream(device)  # one: memory is cached for each stream
            self._stream.wait_stream(_CUDA.current_stream(device))  # which copies the weights

        def sample(progress: Progress) -> Sampled:
            with _on_stream(self._stream):
                return collector.sample(
                    prompts, seed=seed, step=step, autocast=self._autocast, progress=progress, **options
                )

        self._worker = _Worker(sample, seed)
        self._worker.start()

    def take(self, prompts: Sequence[Prompt], *, seed: int, progress: Progress, **options: Any) -> Sampled | None:
        """Return the rollouts of a buffer, for which it waits; None without a copy, for the first buffer.

        Args:
            prompts: see :meth:`start`, which is called if the buffer has not been begun.
            seed: see there.
            progress: shows the worker's progress during the wait, and may end it.
            **options: see :meth:`start`.

        Raises:
            BaseException: the worker's.
        """
        started = time.perf_counter()
        if self._worker is None or self._worker.seed != seed:
            self.start(prompts, seed=seed, **options)
        if self._worker is None:
            return None
        self.wait(progress)
        worker, self._worker = self._worker, None
        if worker.error is not None:
            with naming_step(self._step):
                raise worker.error
        assert worker.sampled is not None
        return replace(worker.sampled, waited=time.perf_counter() - started)

    def wait(self, progress: Progress) -> None:
        """Wait until the worker has nothing to do; its rollouts are kept for :meth:`take`, and so is its error.

        Args:
            progress: shows the worker's progress, and may end the wait.
        """
        while self._worker is not None and self._worker.is_alive():
            task, shown = self._worker.current, 0
            with progress.task(task.name, task.total) as advance:
                while self._worker.current is task and self._worker.is_alive():
                    self._worker.join(_LOOK_SECONDS)
                    done = task.done
                    advance(done - shown)
                    shown = done

    def stop(self) -> None:
        """Ask the worker to end, and wait for that, but no longer than :data:`JOIN_SECONDS`; its rollouts are lost."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stopped.set()
            worker.join(JOIN_SECONDS)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the copy, whose weights are left out where they are the snapshot's; None without a copy.

        Rollouts that are sampled already are not kept: they are sampled again, from the same weights and streams.
        """
        if self._copy is None or self._restored is not None:
            return self._restored
        snapshot = self._behavior
        same = torch.equal(self._copy.step, snapshot.step) and self._copy.equals(snapshot.policy)
        return {"step": self._step, "copy": None if same else self._copy.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore the copy from a :meth:`state_dict`; the snapshot must have been restored when it is first used."""
        self._restored = state

    def _restore(self) -> None:
        if (state := self._restored) is not None:
            self.copy_weights(state["step"])
            if state["copy"] is not None:
                assert self._copy is not None
                self._copy.load_state_dict(state["copy"])


class _Stopped(BaseException):
    """Ends a worker; not an Exception, which a sampler may catch to try again."""


@dataclass
class _Task:
    name: str
    total: int
    done: int = 0


class _Worker(threading.Thread):
    """Thread that samples one buffer; also the progress display of its work, which others read.

    It does not keep the process from ending: a sampler may wait for a server.

    Args:
        sample: samples the buffer.
        seed: of the buffer.
    """

    def __init__(self, sample: Callable[[Progress], Sampled], seed: int) -> None:
        super().__init__(name="sampling ahead", daemon=True)
        self._sample, self.seed = sample, seed
        self.stopped = threading.Event()
        self.current = _Task("sampling", 1)
        self.sampled: Sampled | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Sample, and keep the rollouts or the error."""
        try:
            self.sampled = self._sample(self)
        except BaseException as error:  # raised in the main thread
            self.error = error

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`; also the place where the worker stops."""
        self.current = task = _Task(name, total)

        def advance(num_units: int) -> None:
            task.done += num_units
            if self.stopped.is_set():
                raise _Stopped

        yield advance


@contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    """Queue the work of this thread in a stream of its own, so that it runs beside that of the main thread."""
    if stream is None:
        yield
        return
    with _CUDA.stream(stream):  # it also chooses the stream's device
        try:
            yield
        finally:
            stream.synchronize()  # the copy may be overwritten now
