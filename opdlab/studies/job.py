"""One run of a study: ``opdlab fit`` in a child process, and the files of its folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from submitit.helpers import Checkpointable

from opdlab.locks import LOCK, lock_holder, locked
from opdlab.processes import LIFELINE, catching_signals
from opdlab.studies import schema
from opdlab.studies.schema import FAILED, FINISHED, Record, StudyRun

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
        threads: CPU threads; None leaves them to PyTorch.
        keep_checkpoints: keep the checkpoints after the run has finished.
        digest: of all settings that determine the run's results, see :class:`opdlab.studies.plan.Plan`.
        siblings: folders of the runs with the same seed, whose evaluation before training is the same.
    """

    variant: str
    seed: int
    arguments: tuple[str, ...]
    threads: int | None
    keep_checkpoints: bool
    digest: str
    siblings: tuple[Path, ...]

    @property
    def study(self) -> Path:
        """Return the folder of the study."""
        return self.path.parents[2]

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
    such as that of submitit, which queues a preempted job again. The child ends with this process, see
    :mod:`opdlab.processes`. All results are in the run's folder, so that they survive the process that started the job.

    Args:
        tied: kill the run when the study's process has ended, which releases its lock.
    """

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self._tied = tied

    def __call__(self, spec: RunSpec) -> None:
        """Run, unless another process holds the folder's lock or the run has finished."""
        signals: list[int] = []
        with catching_signals(lambda signum, _: signals.append(signum)) as before:
            # The launcher has masked some signals, so that a terminal's do not end this process while it loads.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
            with locked(spec.path) as mine:
                if mine and not spec.finished:
                    _attempt(spec, signals, self._tied)
        for signum in dict.fromkeys(signals):
            if callable(handler := before.get(signum)):
                handler(signum, None)


def _attempt(spec: RunSpec, signals: list[int], tied: bool) -> None:
    """Train from the newest checkpoint, and write the outcome unless a signal stopped it.

    Args:
        spec: of the run.
        signals: received so far; the list grows.
        tied: see :class:`Job`.
    """
    (spec.path / schema.RUN).unlink(missing_ok=True)
    started, earlier = time.monotonic(), spec.seconds
    try:
        code = _train(spec, partial(_fit, spec, signals, tied))
    except Exception:
        with (spec.path / schema.LOG).open("a") as log:
            traceback.print_exc(file=log)
        code = 1
    spec.write_progress(spec.step, earlier + time.monotonic() - started)
    if code == 0:
        _settle(spec)
    elif not signals:
        spec.write_record(FAILED, spec.last_lines())


def _train(spec: RunSpec, fit: Callable[..., int]) -> int:
    """Start or resume the run with ``fit(*options)``; return its exit code."""
    from opdlab.checkpoints import newest_checkpoint  # here, because it imports torch

    if (checkpoint := newest_checkpoint(spec.path / schema.VERSION / "checkpoints")) is not None:
        return fit("--ckpt_path", str(checkpoint[0]))
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
    return fit()


def _fit(spec: RunSpec, signals: list[int], tied: bool, *options: str) -> int:
    """Run ``opdlab fit`` in a child process; return its exit code, -n after signal n."""
    reading, writing = os.pipe()
    threads = {} if spec.threads is None else dict.fromkeys(_THREADS, str(spec.threads))
    # Under SLURM, Lightning queues the job again by itself; this name disables that.
    others = {LIFELINE: str(reading), "PYTHONUNBUFFERED": "1", "SLURM_JOB_NAME": "interactive"}
    sent = 0
    try:
        with (spec.path / schema.LOG).open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "opdlab", "fit", *spec.arguments, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads, **others},
                pass_fds=(reading,),
                process_group=0,
            )
        while child.poll() is None:
            for signum in signals[sent:]:
                child.send_signal(signum)
                sent += 1
            if tied and lock_holder(spec.study) is None:
                signals.append(signal.SIGKILL)
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
        return child.returncode
    finally:
        os.close(reading)
        os.close(writing)


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
