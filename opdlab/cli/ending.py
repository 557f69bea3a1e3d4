"""What a run says when a signal, a full disk or an error of one of its processes ends it."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import subprocess_script

from opdlab.callbacks.stop_checkpoint import let_others_end
from opdlab.checkpoints import newest_checkpoint
from opdlab.errors import FullDiskError, OtherProcessError, signal_name, stop_signal
from opdlab.files import full_disk
from opdlab.out_of_memory import out_of_memory
from opdlab.processes import END_SECONDS, REPORTS, STOP, reported_error, write_error

# The first process of a run kills the others when it ends. One that loses its connection meanwhile has nothing to say.
_DYING_SECONDS = 3.0
# One that has an error waits as long, and then needs time to end, before the first one learns which error it had.
_REPORT_SECONDS = _DYING_SECONDS + 5.0
_WATCH_SECONDS = 0.25
_HUNG_SECONDS = 20.0


class OtherProcesses:
    """The processes that Lightning has started for this one, on this machine; empty in all others.

    A thread watches them. If one ends with an error, it is raised in the main thread. Lightning would kill this process
    without a word.

    Args:
        trainer: has started them, or will.
    """

    def __init__(self, trainer: Trainer) -> None:
        launcher = trainer.strategy.launcher
        self._launcher = launcher if isinstance(launcher, subprocess_script._SubprocessScriptLauncher) else None
        self._first_rank = trainer.global_rank
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the processes that are started in the block."""
        if self._launcher is None or self._launcher.cluster_environment.creates_processes_externally:
            yield
            return
        with TemporaryDirectory(prefix="opdlab-") as folder:
            self._folder = Path(folder)
            os.environ[REPORTS] = folder
            try:
                threading.Thread(target=self._watch, daemon=True).start()
                yield
            finally:
                self._ended.set()
                del os.environ[REPORTS]

    @property
    def _processes(self) -> list["subprocess.Popen[bytes]"]:
        return [] if self._launcher is None else self._launcher.procs

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            if self._processes:
                let_others_end()
            if (error := self.error()) is not None:
                self.end()  # they would wait for the one that has failed
                if not STOP.fail(error, self._ended, _HUNG_SECONDS):
                    write_error(f"\nopdlab: error: {error}")
                    shutil.rmtree(self._folder, ignore_errors=True)
                    os._exit(error.code)
                return

    def error(self, seconds: float = 0.0) -> OtherProcessError | None:
        """Return the error of a process that has ended with one, or does so within some seconds."""
        deadline = time.monotonic() + seconds if self._processes else 0.0
        while True:
            for local_rank, process in enumerate(self._processes, start=1):
                if code := process.poll():
                    return OtherProcessError(
                        self._first_rank + local_rank, *reported_error(self._folder, process.pid, code)
                    )
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)

    def behind(self, error: BaseException) -> OtherProcessError | None:
        """Return the error of another process that has caused an error of this one; None if there is none.

        A process that has lost its connection to another one has some RuntimeError, depending on the library.
        """
        self._ended.set()
        if isinstance(error, OtherProcessError):
            return error
        lost = isinstance(error, RuntimeError) and full_disk(error) is None and out_of_memory(error) is None
        return self.error(_REPORT_SECONDS) if lost else None

    def end(self, seconds: float = 0.0) -> None:
        """Wait for the processes, and kill those that do not end."""
        let_others_end()
        for process in self._processes:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_to_end(run: Callable[[], None], trainer: Trainer, folder: Path, how_to_go_on: Callable[[], str]) -> int:
    """Call a function that uses a trainer, and return the exit code: 0, or 128 plus the signal that stopped it.

    Args:
        run: the function.
        trainer: its trainer.
        folder: holds the files of the run; ``checkpoints`` in it are named if the disk is full.
        how_to_go_on: returns what is kept after a signal, and how to go on.

    Raises:
        FullDiskError: the disk is full; the message names file, step and newest checkpoint.
        OtherProcessError: another process of the run has ended with an error.
    """
    others = OtherProcesses(trainer)
    with _quiet_writers(), others.watched():
        try:
            run()
            STOP.check()  # a library may have dropped the exception of a signal
            others.end(END_SECONDS)
            if (failed := others.error()) is not None:
                raise failed
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            cause = others.behind(error)
            others.end()
            if cause is not None:
                raise cause from error
            if STOP.forward_to is not None and stop_signal(error) is None:
                time.sleep(_DYING_SECONDS)
            if (path := full_disk(error)) is not None:
                newest = newest_checkpoint(folder / "checkpoints")
                kept = "" if newest is None else f"; the newest checkpoint is {newest[0]}, of step {newest[1]}"
                path = folder if path == Path() else path
                raise FullDiskError(path, f" (at step {trainer.global_step}{kept})") from error
            if (signum := stop_signal(error)) is None:
                raise
            if STOP.forward_to is not None:
                return 0  # all processes have stopped together; Lightning kills the first one for another code
            if trainer.is_global_zero:
                print(f"opdlab: stopped by {signal_name(signum)}{how_to_go_on()}", file=sys.stderr)
            return 128 + signum
    return 0


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Do not print the traceback of a writer's thread that finds the disk full: the main thread raises its error."""
    before = threading.excepthook
    threading.excepthook = lambda args: before(args) if full_disk(args.exc_value) is None else None
    try:
        yield
    finally:
        threading.excepthook = before
