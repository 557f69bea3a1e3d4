"""One run of a study: ``opdlab fit`` in a child process, and the files of its folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import Checkpointable

from opdlab.errors import UsageError, require
from opdlab.locks import LOCK, lock_holder, locked
from opdlab.processes import LIFELINE, catching_signals
from opdlab.studies import schema
from opdlab.studies.schema import FAILED, FINISHED, Record, StudyRun
from opdlab.studies.tasks import Tasks

# Of the study's own environment: runs side by side would share a port, or take each other's ranks.
_RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT", "STANDALONE_PORT", "TORCHELASTIC_RUN_ID"} | {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class RunSpec(StudyRun):
    """Settings of a job, and the folder of its run.

    Args:
        path: of the run's folder.
        evaluated_at: optimizer steps after which the run is evaluated.
        variant: name.
        seed: of the run.
        arguments: of ``opdlab fit``, without a checkpoint.
        threads: CPU threads of each process; None leaves them to PyTorch.
        accelerator: value of ``trainer.accelerator``.
        devices: of each machine, and so of its processes; None if the machine decides.
        nodes: number of machines.
        keep_checkpoints: keep the checkpoints after the run has finished.
        digest: of all settings that determine the run's results, see :class:`opdlab.studies.plan.Plan`.
        siblings: folders of the runs with the same seed, whose evaluation before training is the same.
    """

    variant: str
    seed: int
    arguments: tuple[str, ...]
    threads: int | None
    accelerator: str
    devices: int | None
    nodes: int
    keep_checkpoints: bool
    digest: str
    siblings: tuple[Path, ...]

    @property
    def study(self) -> Path:
        """Return the folder of the study."""
        return self.path.parents[2]

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of a machine that the run may use: none on CPUs, 1 if it is not known."""
        return 0 if self.accelerator == "cpu" else self.devices or 1

    def write_record(self, state: str, last_lines: Sequence[str] = ()) -> None:
        """Write ``run.json``."""
        Record(
            variant=self.variant,
            seed=self.seed,
            state=state,
            command=("opdlab", "fit", *self.arguments),
            seconds=round(self.seconds, 3),
            threads=self.threads,
            digest=self.digest,
            last_lines=last_lines,
        ).write(self.path)


class Job(Checkpointable):
    """Runs ``opdlab fit`` from where an earlier attempt stopped. A scheduler that preempts it may start it again.

    The run is a child process in a process group of its own, so that a terminal's signals do not reach it twice.
    Signals of this process are forwarded to it. After it has written its checkpoint, they go to the previous handler,
    such as that of submitit, which queues a preempted job again; those of a tied job do not. The child ends with this
    process, see :mod:`opdlab.processes`. All results are in the run's folder, so that they survive the process that
    started the job.

    Args:
        tied: kill the run when the study's process has ended, which releases its lock; and leave it to the study to
            start the job again after a signal.
        tasks: number of the job's tasks, one a process of the run. A single task starts a run whose other processes are
            started by Lightning, on this machine and in the child's group.
    """

    def __init__(self, tied: bool = False, tasks: int = 1) -> None:
        super().__init__()
        self._tied = tied
        self._tasks = tasks

    def __call__(self, spec: RunSpec) -> None:
        """Run, unless another process holds the folder's lock or the run has finished."""
        signals: list[int] = []
        with catching_signals(lambda signum, _: signals.append(signum)) as before:
            # The launcher has masked some signals, so that a terminal's do not end this process while it loads.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
            tasks = Tasks.of_this_job(spec.path) if self._tasks > 1 else Tasks(spec.path)
            if tasks.rank > 0:
                options = tasks.wait(signals)
                tasks.end(int(bool(signals)) if options is None else _fit(spec, tasks, signals, self._tied, options))
            else:
                with locked(spec.path) as mine:
                    tasks.end(_attempt(spec, tasks, signals, self._tied) if mine and not spec.finished else 0)
        for signum in dict.fromkeys(() if self._tied else signals):
            if callable(handler := before.get(signum)):
                handler(signum, None)


def _attempt(spec: RunSpec, tasks: Tasks, signals: list[int], tied: bool) -> int:
    """Train from the newest checkpoint, and write the outcome unless a signal stopped it; return the exit code.

    Args:
        spec: of the run.
        tasks: of which this one is the first.
        signals: received so far; the list grows.
        tied: see :class:`Job`.
    """
    (spec.path / schema.RUN).unlink(missing_ok=True)
    if spec.is_complete(spec.evaluations):  # an earlier attempt was killed after its work, before it wrote its record
        _settle(spec)
        return 0
    started, earlier = time.monotonic(), spec.seconds
    try:
        options = _prepare(spec)
        tasks.start(options)
        code = _fit(spec, tasks, signals, tied, options)
    except Exception as error:
        with tasks.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            if isinstance(error, UsageError):
                print(f"opdlab: error: {error}", file=log)
            else:
                traceback.print_exc(file=log)
        code = 1
    spec.write_progress(spec.step, earlier + time.monotonic() - started)
    if code == 0:
        tasks.wait_for_others()
        _settle(spec)
    elif not signals:
        spec.write_record(FAILED, (*spec.last_lines(), *tasks.reasons()))
    return code


def _prepare(spec: RunSpec) -> Sequence[str]:
    """Return the options with which ``opdlab fit`` resumes; without a checkpoint, empty the folder for a new start.

    Raises:
        UsageError: there are checkpoints, but none that a run can go on from.
    """
    from opdlab.checkpoints import newest_checkpoint  # here, because it imports torch

    checkpoints = spec.path / schema.VERSION / "checkpoints"
    skipped: list[str] = []
    if (checkpoint := newest_checkpoint(checkpoints, skipped)) is not None:
        # The name of the folder of samples is that of the run's folder, which may have been moved since.
        earlier = [path for path in spec.path.glob(f"{schema.SAMPLES}/*") if path != spec.samples]
        if len(earlier) == 1 and not spec.samples.exists():
            earlier[0].replace(spec.samples)
        return "--ckpt_path", str(checkpoint[0])
    require(
        not skipped,
        f"no checkpoint in {checkpoints} is sound: {'; '.join(skipped)}; delete that folder to start the run over",
    )
    for path in spec.path.iterdir():
        if path.name not in (LOCK, schema.LOG, schema.LAUNCH):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The evaluation before training is the same in all runs with this seed. It compares weights and settings, and
    # samples again if they differ.
    places = [
        place for run in spec.siblings for place in (StudyRun(run, ()).evaluations, *run.glob(f"{schema.SAMPLES}/*"))
    ]
    first = next(filter(schema.evaluation_is_complete, (schema.evaluation_path(place, 0) for place in places)), None)
    if first is not None:
        with suppress(OSError, shutil.Error):  # The other run may move it at this moment.
            shutil.copytree(first, spec.samples / first.name, dirs_exist_ok=True)
    return ()


def _fit(spec: RunSpec, tasks: Tasks, signals: list[int], tied: bool, options: Sequence[str]) -> int:
    """Run ``opdlab fit`` in a child process; return its exit code, -n after signal n.

    Args:
        spec: of the run.
        tasks: of the job; each runs the same command.
        signals: received so far; the list grows.
        tied: see :class:`Job`.
        options: of the command, besides those of ``spec``.
    """
    reading, writing = os.pipe()
    sent = 0
    try:
        with tasks.log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "opdlab", "fit", *spec.arguments, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_environment(spec, tasks), LIFELINE: str(reading)},
                pass_fds=(reading,),
                process_group=0,
            )
        while child.poll() is None:
            for signum in signals[sent:]:
                child.send_signal(signum)
                sent += 1
            if left_behind := tied and lock_holder(spec.study) is None:
                signals.append(signal.SIGKILL)
            if left_behind or tasks.others_failed():
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
        return child.returncode
    finally:
        os.close(reading)
        os.close(writing)


def _environment(spec: RunSpec, tasks: Tasks) -> dict[str, str]:
    """Return the environment of the run, in which its processes meet at a port of their own.

    Lightning takes rank and size of one of several tasks from SLURM's variables, unless the job's name is
    ``interactive``. That name hides them from a single task: Lightning starts the other processes then.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _RENDEZVOUS}
    threads = {} if spec.threads is None else dict.fromkeys(_THREADS, str(spec.threads))
    name = "interactive" if tasks.count == 1 else "opdlab"
    return {**kept, **threads, "PYTHONUNBUFFERED": "1", "SLURM_JOB_NAME": name}


def _settle(spec: RunSpec) -> None:
    """Write the outcome of the run, after moving its samples to their final folder if all are there."""
    if spec.is_complete(spec.samples):
        shutil.rmtree(spec.evaluations, ignore_errors=True)
        spec.samples.replace(spec.evaluations)
    if not spec.is_complete(spec.evaluations):
        spec.write_record(FAILED, ("it ended, but its evaluations are not complete: see its log",))
        return
    shutil.rmtree(spec.path / schema.SAMPLES, ignore_errors=True)
    if not spec.keep_checkpoints:
        shutil.rmtree(spec.path / schema.VERSION / "checkpoints", ignore_errors=True)
    spec.write_record(FINISHED)
