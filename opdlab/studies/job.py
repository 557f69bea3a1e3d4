"""One run of a study: ``opdlab fit`` in a child process, and the files of its folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from submitit.helpers import Checkpointable

from opdlab.locks import lock_holder, locked
from opdlab.processes import LIFELINE, catching_signals
from opdlab.studies import schema
from opdlab.studies.schema import FAILED, FINISHED, Record, RunFolder

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class RunSpec:
    """Settings of a job.

    Args:
        variant: name.
        seed: of the run.
        folder: of the run.
        arguments: of ``opdlab fit``, without a checkpoint.
        evaluated_at: optimizer steps after which the run is evaluated.
        threads: CPU threads; None leaves them to PyTorch.
        keep_checkpoints: keep the checkpoints after the run has finished.
        digest: of all settings that determine the run's results, see :class:`opdlab.studies.plan.Plan`.
        siblings: folders of the runs with the same seed, whose evaluation before training is the same.
    """

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    evaluated_at: tuple[int, ...]
    threads: int | None
    keep_checkpoints: bool
    digest: str
    siblings: tuple[Path, ...] = ()

    @property
    def run_folder(self) -> RunFolder:
        """Return the paths of the run's folder."""
        return RunFolder(self.folder, self.evaluated_at)

    @property
    def study(self) -> Path:
        """Return the folder of the study."""
        return self.folder.parents[2]

    def write_record(self, state: str, last_lines: tuple[str, ...] = ()) -> None:
        """Write ``run.json``."""
        Record(
            variant=self.variant,
            seed=self.seed,
            state=state,
            command=("opdlab", "fit", *self.arguments),
            seconds=round(self.run_folder.seconds, 3),
            threads=self.threads,
            digest=self.digest,
            last_lines=last_lines,
        ).write(self.folder)


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

        def note(signum: int, frame: FrameType | None) -> None:
            signals.append(signum)

        with catching_signals(note) as before:
            # The launcher has masked some signals, so that a terminal's do not end this process while it loads.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
            with locked(spec.folder) as mine:
                if mine and not spec.run_folder.finished:
                    _Attempt(spec, signals, self._tied).make()
        for signum in dict.fromkeys(signals):
            if callable(handler := before.get(signum)):
                handler(signum, None)


class _Attempt:
    """One attempt to finish a run.

    Args:
        spec: of the run.
        signals: received so far; the list grows.
        tied: see :class:`Job`.
    """

    def __init__(self, spec: RunSpec, signals: list[int], tied: bool) -> None:
        self._spec, self._signals, self._tied = spec, signals, tied
        self._folder = spec.run_folder

    def make(self) -> None:
        """Train from the newest checkpoint, and write the outcome unless it was stopped."""
        (self._spec.folder / schema.RUN).unlink(missing_ok=True)
        started, earlier = time.monotonic(), self._folder.seconds
        try:
            code = self._train()
        except Exception:
            with self._folder.log.open("a") as log:
                traceback.print_exc(file=log)
            code = 1
        seconds = earlier + time.monotonic() - started
        self._folder.write_progress(self._folder.step, seconds)
        if code == 0:
            self._settle()
        elif not self._signals:
            self._spec.write_record(FAILED, tuple(self._folder.last_lines()))

    def _train(self) -> int:
        from opdlab.checkpoints import newest_checkpoint  # here, because it imports torch

        checkpoint = newest_checkpoint(self._folder.checkpoints)
        if checkpoint is None:
            self._folder.clean()
            self._share_first_evaluation()
            return self._opdlab("fit")
        path, step = checkpoint
        evaluation = schema.evaluation_path(self._folder.samples, step)
        if step in self._spec.evaluated_at[:-1] and not schema.evaluation_is_complete(evaluation):
            # Lightning skips the evaluation that was due when the checkpoint was written.
            options = ("--model.evaluation.samples", str(evaluation), "--ckpt_path", str(path))
            if (code := self._opdlab("validate", *options)) != 0:
                return code
        return self._opdlab("fit", "--ckpt_path", str(path))

    def _opdlab(self, command: str, *options: str) -> int:
        """Run a command of opdlab in a child process; return its exit code, -n after signal n."""
        spec = self._spec
        reading, writing = os.pipe()
        threads = {} if spec.threads is None else dict.fromkeys(_THREADS, str(spec.threads))
        # Under SLURM, Lightning queues the job again by itself; this name disables that.
        others = {LIFELINE: str(reading), "PYTHONUNBUFFERED": "1", "SLURM_JOB_NAME": "interactive"}
        sent = 0
        try:
            with self._folder.log.open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "opdlab", command, *spec.arguments, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **threads, **others},
                    pass_fds=(reading,),
                    process_group=0,
                )
            while child.poll() is None:
                for signum in self._signals[sent:]:
                    child.send_signal(signum)
                    sent += 1
                if self._tied and lock_holder(spec.study) is None:
                    self._signals.append(signal.SIGKILL)
                    os.killpg(child.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
            return child.returncode
        finally:
            os.close(reading)
            os.close(writing)

    def _share_first_evaluation(self) -> None:
        """Copy the evaluation before training from another run with this seed.

        The evaluation compares weights and settings, and samples again if they differ.
        """
        for sibling in self._spec.siblings:
            places = (RunFolder(sibling, ()).evaluations, *sibling.glob(f"{schema.SAMPLES}/*"))
            for first in (schema.evaluation_path(place, 0) for place in places):
                if schema.evaluation_is_complete(first):
                    with suppress(OSError, shutil.Error):  # The other run may move it at this moment.
                        shutil.copytree(first, self._folder.samples / first.name, dirs_exist_ok=True)
                    return

    def _settle(self) -> None:
        """Write the outcome of the run, after moving its samples to their final folder if all are there."""
        final = self._folder.evaluations
        if self._folder.is_complete(self._folder.samples):
            shutil.rmtree(final, ignore_errors=True)
            self._folder.samples.replace(final)
        if not self._folder.is_complete(final):
            self._spec.write_record(FAILED, ("it ended, but its evaluations are not complete: see its log",))
            return
        shutil.rmtree(self._spec.folder / schema.SAMPLES, ignore_errors=True)
        if not self._spec.keep_checkpoints:
            shutil.rmtree(self._folder.checkpoints, ignore_errors=True)
        self._spec.write_record(FINISHED)
