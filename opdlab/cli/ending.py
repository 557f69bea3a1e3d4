"""What a run says when a signal or a full disk ends it."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from opdlab.callbacks.stop_checkpoint import let_others_end
from opdlab.checkpoints import newest_checkpoint
from opdlab.errors import FullDiskError, signal_name, stop_signal
from opdlab.files import full_disk
from opdlab.processes import END_SECONDS, STOP

# The first process of a run kills the others when it ends. One that loses its connection meanwhile has nothing to say.
_DYING_SECONDS = 3.0


def run_to_end(run: Callable[[], None], trainer: Trainer, folder: Path, how_to_go_on: Callable[[], str]) -> int:
    """Call a function that uses a trainer, and return the exit code: 0, or 128 plus the signal that stopped it.

    Args:
        run: the function.
        trainer: its trainer.
        folder: holds the files of the run; ``checkpoints`` in it are named if the disk is full.
        how_to_go_on: returns what is kept after a signal, and how to go on.

    Raises:
        FullDiskError: the disk is full; the message names file, step and newest checkpoint.
    """
    with _quiet_writers():
        try:
            run()
            STOP.check()  # a library may have dropped the exception of a signal
            _end_others(trainer, END_SECONDS)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            _end_others(trainer)
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


def _end_others(trainer: Trainer, seconds: float = 0.0) -> None:
    """Kill the processes that Lightning has started for this one, which they may wait for, if they do not end."""
    let_others_end()
    for process in getattr(trainer.strategy.launcher, "procs", ()):
        if not isinstance(process, subprocess.Popen):  # a fork
            continue
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Do not print the traceback of a writer's thread that finds the disk full: the main thread raises its error."""
    before = threading.excepthook
    threading.excepthook = lambda args: before(args) if full_disk(args.exc_value) is None else None
    try:
        yield
    finally:
        threading.excepthook = before
