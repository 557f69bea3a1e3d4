"""Runs as submitit jobs: start a few at a time and watch them."""

import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import submitit
import torch
from jsonargparse import ArgumentError, ArgumentParser

from opdlab.errors import UsageError, require
from opdlab.locks import lock_holder
from opdlab.parser_messages import Explainer
from opdlab.processes import STOP_SIGNALS, catching_signals
from opdlab.studies.job import Job, RunSpec
from opdlab.studies.schema import FAILED, FINISHED, LAUNCH, RUNNING, WAITING

# Parameters of submitit's local executor, which looks at few of them before it starts a run.
_LOCAL: Mapping[str, Any] = {
    "timeout_min": float,
    "gpus_per_node": int,
    "visible_gpus": list[int],
    "setup": list[str],
    "signal_delay_s": int,
    "stderr_to_stdout": bool,
}
# In a folder's path submitit puts numbers of a job in their place.
_PLACES = ("%j", "%t", "%a", "%A")
# Parameters of submitit that a study sets for each run, and the keys of the variant's configuration that decide.
_FOLLOWING = dict.fromkeys(("nodes", "slurm_nodes"), "trainer.num_nodes") | dict.fromkeys(
    ("tasks_per_node", "slurm_tasks_per_node", "slurm_ntasks_per_node"), "trainer.devices"
)
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
        parameters: of submitit's executor, such as ``timeout_min``, ``gpus_per_node``, ``slurm_partition``. For
            ``local``, ``visible_gpus`` may be a number, or a text such as ``0,1``, and ``setup`` a single command.

    Raises:
        UsageError: submitit does not know the cluster or a parameter, a value is of the wrong type, or submitit cannot
            find the cluster here.

    Example:
        >>> Cluster("local", {"timeout_min": 5, "visible_gpus": "0,1"}).parameters
        {'timeout_min': 5.0, 'visible_gpus': [0, 1]}
    """

    name: str = "local"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "local":
            object.__setattr__(self, "parameters", _typed(self.parameters))
        elif "gpus_per_node" in self.parameters:  # read here too
            _typed({"gpus_per_node": self.parameters["gpus_per_node"]})

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Check that every run can be started on the cluster.

        Raises:
            UsageError: see :class:`Cluster`; or a run asks for more machines, or devices, than the cluster gives it, or
                the study's folder has a path in which submitit would put the number of a job.
        """
        for study in {spec.study for spec in specs}:
            place = next((place for place in _PLACES if place in str(study)), None)
            numbered = f"the folder of the study is '{study}', but submitit puts a number in place of {place}"
            require(place is None, f"{numbered}: give a --folder without it")
        key = next((key for key in self.parameters if key in _FOLLOWING), None)
        require(key is None, f"--parameters has {key}, which follows from {_FOLLOWING.get(key or '')}: leave it out")
        if self.name == "local":
            asked, visible = self.parameters.get("gpus_per_node", 0), len(_visible_gpus(self.parameters))
            few = f"--parameters.gpus_per_node is {asked}, but there are {visible} GPUs here: lower it"
            require(not 0 < visible < asked, few)
        for spec in specs:
            where = f"variants: '{spec.variant}': trainer"
            fault = f"{where}.num_nodes is {spec.nodes}, but "
            here = f"--cluster {self.name} starts a run on one machine: set it to 1, or give --cluster slurm"
            require(spec.nodes == 1 or self.name == "slurm", fault + here)
            number = "SLURM starts a task for each device: give trainer.devices, the number of those of a machine"
            require(spec.nodes == 1 or spec.devices is not None, fault + number)
            if spec.gpus:
                self._check_gpus(spec, f"{where}.devices is {'auto' if spec.devices is None else spec.devices}, but ")
        with TemporaryDirectory() as scratch:
            for tasks in {self.tasks(spec) for spec in specs}:
                self._executor(Path(scratch), tasks)

    def _check_gpus(self, spec: RunSpec, fault: str) -> None:
        wanted, each = spec.gpus, int(self.parameters.get("gpus_per_node") or 0)
        require(not 0 < each < wanted, f"{fault}--parameters.gpus_per_node is {each}: give at least {wanted}")
        if self.name != "local":
            return
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        numbers = all(part.strip().isdigit() for part in given.split(",") if part.strip())
        require(
            numbers or "visible_gpus" in self.parameters or not torch.cuda.device_count(),  # -1, say: none is visible
            f"CUDA_VISIBLE_DEVICES is '{given}', but --cluster local selects GPUs by number: set it to numbers, or "
            "give --cluster debug, which starts one run after the other on what is visible",
        )
        here = len(_visible_gpus(self.parameters))
        require(not 0 < here < wanted, f"{fault}there are {here} GPUs here: lower it, or give --cluster slurm")
        require(
            spec.devices is not None or here < 2 or each > 0,
            f"{fault}there are {here} GPUs here, and how many a run takes is not known: give a number",
        )

    def tasks(self, spec: RunSpec) -> tuple[int, int]:
        """Return the number of machines of a run's job, and of its tasks on each.

        SLURM starts all processes of a run, if their number is known. Otherwise the only task starts the others.
        """
        return (spec.nodes, spec.devices or 1) if self.name == "slurm" else (1, 1)

    def submit(self, spec: RunSpec, slot: int = 0, width: int = 1) -> Any:
        """Start a run, and return submitit's job.

        Args:
            spec: of the run.
            slot: number of the run among the concurrent ones; selects its GPUs on this machine.
            width: most GPUs of a run of the study.
        """
        nodes, each = self.tasks(spec)
        gpus = local_gpus(slot, self.parameters, spec.gpus, width) if self.name == "local" else {}
        tied = self.name == "local" and lock_holder(spec.study) is not None
        return self._executor(spec.path / LAUNCH, (nodes, each), gpus).submit(Job(tied, nodes * each), spec)

    def _executor(
        self, folder: Path, tasks: tuple[int, int], gpus: Mapping[str, Any] | None = None
    ) -> submitit.Executor:
        """Return submitit's executor for a single run.

        Args:
            folder: for logs and pickles.
            tasks: see :meth:`tasks`.
            gpus: parameters that select GPUs of this machine.
        """
        if self.name == "local":
            local = submitit.LocalExecutor(folder)
            local.update_parameters(**{"timeout_min": _LOCAL_TIMEOUT_MIN, **self.parameters, **(gpus or {})})
            return local
        parameters = dict(self.parameters)
        if self.name == "slurm":
            limited = {"timeout_min", "slurm_time"} & set(self.parameters)
            require(bool(limited), "--parameters has no timeout_min, without which SLURM ends runs after 5: give it")
            if tasks != (1, 1):
                srun = "srun starts the processes of a run: leave it out"
                require(parameters.get("slurm_use_srun", True), f"--parameters.slurm_use_srun is false, but {srun}")
                parameters |= {"nodes": tasks[0], "tasks_per_node": tasks[1]}
                # A task that dies without a word would leave the others waiting until the time limit.
                parameters["slurm_srun_args"] = [*parameters.get("slurm_srun_args", ()), "--kill-on-bad-exit=1"]
        try:
            executor = submitit.AutoExecutor(folder, cluster=self.name)
            executor.update_parameters(**parameters)
        except (ValueError, RuntimeError, NameError, AssertionError) as error:
            raise UsageError(f"--cluster {self.name} cannot be used: {' '.join(str(error).split())}") from error
        return executor


def _typed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of the local executor in the types that it takes; those that are null are left out.

    Raises:
        UsageError: a parameter is not known, or its value is of another type or out of range.
    """
    unknown = next((key for key in parameters if key not in _LOCAL and key not in _FOLLOWING), None)
    require(unknown is None, f"--parameters has '{unknown}', but the local cluster knows: {', '.join(_LOCAL)}")
    given = {key: value for key, value in parameters.items() if value is not None}
    if isinstance(gpus := given.get("visible_gpus"), int | str):
        given["visible_gpus"] = str(gpus).split(",")
    if isinstance(setup := given.get("setup"), str):
        given["setup"] = [setup]
    parser = ArgumentParser(exit_on_error=False)
    for key in given.keys() & _LOCAL.keys():
        parser.add_argument(f"--{key}", type=_LOCAL[key])
    try:
        given |= parser.parse_object({key: given[key] for key in _LOCAL if key in given}).as_dict()
    except ArgumentError as error:
        raise UsageError(f"--parameters.{Explainer()(error)}") from error
    for key in ("timeout_min", "gpus_per_node", "signal_delay_s", "visible_gpus"):
        value = given.get(key, 0)
        sound = all(0 <= number < math.inf for number in (value if isinstance(value, list) else [value]))
        require(sound, f"--parameters.{key} is {value}: give a finite number, at least 0")
    return given


def _visible_gpus(parameters: Mapping[str, Any]) -> list[int]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    here = [int(part) for part in given.split(",") if part.strip().isdigit()] or range(torch.cuda.device_count())
    return list(parameters.get("visible_gpus", here))


def local_gpus(slot: int, parameters: Mapping[str, Any], gpus: int = 1, width: int = 1) -> dict[str, Any]:
    """Return parameters of the local executor with the GPUs of a run: those of this process, taken in turn.

    Without them submitit hides all GPUs.

    Args:
        slot: number of the run among the concurrent ones.
        parameters: of the executor.
        gpus: number of GPUs of the run, unless ``gpus_per_node`` gives it.
        width: most GPUs of a run, so that concurrent runs have no GPU in common.

    Example:
        >>> local_gpus(1, {"gpus_per_node": 2, "visible_gpus": [0, 1, 2, 3]})
        {'gpus_per_node': 2, 'visible_gpus': [2, 3]}
        >>> [local_gpus(1, {"visible_gpus": [0, 1, 2, 3]}, n, width=2)["visible_gpus"] for n in (1, 2)]
        [[2], [2, 3]]
    """
    visible = _visible_gpus(parameters)
    each = int(parameters.get("gpus_per_node", gpus))
    if not visible or each < 1:
        return dict(parameters)
    width = max(width, each)
    first = slot % max(len(visible) // width, 1) * width
    return {**parameters, "gpus_per_node": each, "visible_gpus": visible[first : first + each]}


def default_jobs(specs: Sequence[RunSpec], parameters: Mapping[str, Any]) -> int:
    """Return the number of concurrent runs here: each process has a GPU, or cores for its threads if it uses none.

    Args:
        specs: all runs.
        parameters: of the local executor, which may bound the GPUs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = max(spec.gpus for spec in specs)
    if wanted and torch.cuda.device_count():
        number = len(_visible_gpus(parameters)) // max(wanted, int(parameters.get("gpus_per_node", 0)))
    else:
        number = cores // max((spec.devices or 1) * (spec.threads or 1) for spec in specs)
    return max(1, min(number, len(specs)))


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
        last_lines: of the output of a failed run.
    """

    spec: RunSpec
    state: str = WAITING
    job: Any = None
    slot: int = 0
    since: float = 0.0
    forwarded: Counter[int] = field(default_factory=Counter)
    last_lines: Sequence[str] = ()

    def fail(self, last_lines: Sequence[str]) -> None:
        """Count the run as failed, also where its folder cannot be written."""
        self.state, self.last_lines = FAILED, last_lines
        with suppress(OSError):
            self.spec.write_record(FAILED, last_lines)


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
        self._width = max((spec.gpus for spec in specs), default=0)

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
            try:
                run.job = None if run.spec.holder is not None else self._submit(run.spec, slot)
                run.state, run.slot, run.since = RUNNING, slot, time.monotonic()
            except (OSError, RuntimeError) as error:  # of the system, or of the scheduler; the others go on
                run.fail(("it could not be started:", *(str(error) or type(error).__name__).splitlines()))
            yield run

    def _submit(self, spec: RunSpec, slot: int) -> Any:
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _MASKED)  # The signal mask is inherited; the job restores it.
        try:
            return self._cluster.submit(spec, slot, self._width)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)

    def _ended(self) -> Iterator[RunState]:
        for run in [each for each in self.runs if each.state == RUNNING]:
            spec = run.spec
            if not (run.job.done() if run.job is not None else spec.holder is None):
                continue
            if spec.finished or spec.record.state == FAILED:
                run.state, run.last_lines = FINISHED if spec.finished else FAILED, spec.record.last_lines
            elif self.signals or run.job is None or spec.holder is not None:
                run.state = WAITING
            else:
                run.fail((*spec.last_lines(), "its process ended without a result: was it killed?"))
            run.forwarded.clear()
            yield run

    def _forward_signals(self) -> None:
        """Forward each signal once: the first asks runs to save a checkpoint, a later one to stop at once."""
        for run in [each for each in self.runs if each.state == RUNNING and self.signals]:
            holder = run.spec.holder or {}
            pid = int(holder.get("pid", 0)) if holder.get("host") == socket.gethostname() else 0
            if run.job is None and not pid:  # of an earlier start, on another machine: it goes on without this process
                run.state = WAITING
                continue
            if run.forwarded[pid] == len(self.signals):
                continue
            signum = self.signals[run.forwarded[pid]]
            run.forwarded[pid] += 1
            with suppress(ProcessLookupError):
                if pid:
                    try:
                        os.kill(pid, signum)
                    except PermissionError:  # of another user: it goes on too
                        run.state = WAITING
                elif run.job is not None and self._cluster.name == "local":
                    os.kill(int(run.job.job_id), signal.SIGTERM)  # submitit's process; the run is still starting
                elif run.job is not None:
                    run.job.cancel(check=False)
