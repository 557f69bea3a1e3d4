"""Runs as submitit jobs: start a few at a time and watch them."""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
import torch

from opdlab.errors import UsageError, require
from opdlab.locks import lock_holder
from opdlab.processes import STOP_SIGNALS, catching_signals
from opdlab.studies.job import Job, RunSpec
from opdlab.studies.schema import FAILED, FINISHED, LAUNCH, RUNNING, WAITING

_LOCAL = ("timeout_min", "gpus_per_node", "visible_gpus", "setup", "signal_delay_s", "stderr_to_stdout")
_LOCAL_TIMEOUT_MIN = 60 * 24 * 365  # submitit's default ends a run after 2 minutes
_POLL_SECONDS = 0.25
# A terminal sends signals to all processes of the group, which would end submitit's within a second. Only this process
# handles them and tells the job. submitit's process forwards SIGTERM.
_MASKED = set(STOP_SIGNALS) - {signal.SIGTERM}


@dataclass(frozen=True)
class Cluster:
    """Cluster on which runs are started.

    Args:
        name: ``local``, ``slurm``, ``debug`` (in this process, one after the other), or another name known to submitit.
        parameters: of submitit's executor, such as ``timeout_min``, ``gpus_per_node``, ``slurm_partition``.

    Raises:
        UsageError: submitit does not know the cluster or a parameter, or cannot find the cluster here.
    """

    name: str = "local"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def executor(self, folder: Path, slot: int = 0) -> submitit.Executor:
        """Return an executor for a single run.

        Args:
            folder: for logs and pickles.
            slot: number of the run among the concurrent ones; selects its GPUs on this machine.
        """
        if self.name == "local":
            unknown = next((key for key in self.parameters if key not in _LOCAL), None)
            known = ", ".join(_LOCAL)
            require(unknown is None, f"--parameters has '{unknown}', but the local cluster knows: {known}")
            local = submitit.LocalExecutor(folder)
            local.update_parameters(**{"timeout_min": _LOCAL_TIMEOUT_MIN, **local_gpus(slot, self.parameters)})
            return local
        if self.name == "slurm":
            limited = {"timeout_min", "slurm_time"} & set(self.parameters)
            require(bool(limited), "--parameters has no timeout_min, without which SLURM ends runs after 5: give it")
        try:
            executor = submitit.AutoExecutor(folder, cluster=self.name)
            executor.update_parameters(**self.parameters)
        except (ValueError, RuntimeError, NameError, AssertionError) as error:
            raise UsageError(f"--cluster {self.name} cannot be used: {' '.join(str(error).split())}") from error
        return executor


def local_gpus(slot: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of the local executor with the GPUs of a run: those of this process, taken in turn.

    Without them submitit hides all GPUs.

    Example:
        >>> local_gpus(1, {"gpus_per_node": 2, "visible_gpus": [0, 1, 2, 3]})
        {'gpus_per_node': 2, 'visible_gpus': [2, 3]}
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    here = [int(part) for part in given.split(",") if part.strip().isdigit()] or range(torch.cuda.device_count())
    gpus = list(parameters.get("visible_gpus", here))
    each = int(parameters.get("gpus_per_node", 1))
    if not gpus or each < 1:
        return dict(parameters)
    groups = max(len(gpus) // each, 1)
    first = slot % groups * each
    return {**parameters, "gpus_per_node": each, "visible_gpus": gpus[first : first + each]}


def default_jobs(num_runs: int) -> int:
    """Return the number of concurrent runs on this machine: one per GPU, or one per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.cuda.device_count() or cores, num_runs))


@dataclass
class RunState:
    """Current state of a run.

    Args:
        spec: of the run.
        state: ``waiting``, ``running``, ``finished`` or ``failed``.
        job: submitit's job, if this process has started it.
        slot: its number among the concurrent runs.
        since: start time on the monotonic clock.
        forwarded: number of signals that were forwarded, by process.
    """

    spec: RunSpec
    state: str = WAITING
    job: Any = None
    slot: int = 0
    since: float = 0.0
    forwarded: Counter[int] = field(default_factory=Counter)


class Launcher:
    """Starts runs that have not finished, ``jobs`` at a time.

    A run whose process is still alive, left over from a killed study, is not started again; the launcher waits for it.

    Args:
        specs: all runs, in the order of their start.
        cluster: see :class:`Cluster`.
        jobs: runs at a time.
    """

    def __init__(self, specs: Sequence[RunSpec], cluster: Cluster, jobs: int) -> None:
        self.runs = [RunState(spec, FINISHED if spec.finished else WAITING) for spec in specs]
        self.jobs = jobs
        self.signals: list[int] = []
        """Signals to stop that were received while the runs were watched."""
        self._cluster = cluster

    def count(self) -> Counter[str]:
        """Return the number of runs by state."""
        return Counter(run.state for run in self.runs)

    def run(self) -> Iterator[RunState | None]:
        """Run until all have ended, or a signal stops it.

        Yields:
            Each run whose state has changed, and None at regular intervals.
        """
        with catching_signals(lambda signum, _: self.signals.append(signum)):
            while self.count()[RUNNING] or (self.count()[WAITING] and not self.signals):
                yield from self._ended()
                self._forward_signals()
                yield from self._started()
                yield None
                if self.count()[RUNNING] or self.signals:
                    time.sleep(_POLL_SECONDS)

    def _started(self) -> Iterator[RunState]:
        taken = {run.slot for run in self.runs if run.state == RUNNING}
        free = [slot for slot in range(self.jobs) if slot not in taken]
        # Runs whose process is still alive come first: they use a core already.
        waiting = sorted((run for run in self.runs if run.state == WAITING), key=lambda run: run.spec.holder is None)
        for run, slot in zip(waiting, free, strict=False):
            if self.signals:
                return
            run.job = None if run.spec.holder is not None else self._submit(run.spec, slot)
            run.state, run.slot, run.since = RUNNING, slot, time.monotonic()
            yield run

    def _submit(self, spec: RunSpec, slot: int) -> Any:
        executor = self._cluster.executor(spec.path / LAUNCH, slot)
        tied = self._cluster.name == "local" and lock_holder(spec.study) is not None
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _MASKED)  # The signal mask is inherited; the job restores it.
        try:
            return executor.submit(Job(tied), spec)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def _ended(self) -> Iterator[RunState]:
        for run in [each for each in self.runs if each.state == RUNNING]:
            spec = run.spec
            if not (run.job.done() if run.job is not None else spec.holder is None):
                continue
            if spec.finished or spec.record.state == FAILED:
                run.state = FINISHED if spec.finished else FAILED
            elif self.signals or run.job is None or spec.holder is not None:
                run.state = WAITING
            else:
                spec.write_record(FAILED, (*spec.last_lines(), "its process ended without a result: was it killed?"))
                run.state = FAILED
            run.forwarded.clear()
            yield run

    def _forward_signals(self) -> None:
        """Forward each signal once: the first asks runs to save a checkpoint, a later one to stop at once."""
        for run in [each for each in self.runs if each.state == RUNNING and self.signals]:
            holder = run.spec.holder or {}
            pid = int(holder.get("pid", 0)) if holder.get("host") == socket.gethostname() else 0
            if run.forwarded[pid] == len(self.signals):
                continue
            signum = self.signals[run.forwarded[pid]]
            run.forwarded[pid] += 1
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signum)
                elif run.job is not None and self._cluster.name == "local":
                    os.kill(int(run.job.job_id), signal.SIGTERM)  # submitit's process; the run is still starting
                elif run.job is not None:
                    run.job.cancel(check=False)
