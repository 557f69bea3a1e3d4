"""A check that all processes of a run see its folder, which processes on several machines have to share."""

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer
from torch import distributed

from opdlab.errors import UsageError, first_line

_LATE_SECONDS = 5.0
"""Seconds until a file is visible on other machines: a network file system may show an older state of a folder."""


def check_shared_folder(trainer: Trainer, folder: Path | None) -> None:
    """Check that all processes see a folder, by a file with a random name; with one process, do nothing.

    Each process looks for the file in its own ``default_root_dir``, and at the absolute path of the first process,
    where checkpoints, samples and metrics are written. All processes call this together, once they are connected.

    Args:
        trainer: with its processes connected, as in the hook ``setup``.
        folder: of the run, in ``default_root_dir``, which is taken for None; only the first process's counts.

    Raises:
        UsageError: a process does not see the folder, or the first one cannot write it; in all processes.
    """
    if trainer.world_size == 1:
        return
    root = Path(trainer.default_root_dir)
    token = (folder or root) / f".seen-{secrets.token_hex(8)}"
    fault: str | None = None
    if trainer.is_global_zero:
        try:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            fault = f"trainer.default_root_dir is '{root}', which cannot be written ({first_line(error)}): give another"
    host = socket.gethostname()
    told = (str(token.absolute()), os.path.relpath(token, root), host, fault)
    path, inside, first_host, fault = trainer.strategy.broadcast(told)
    if fault is None and not (_appears(root / inside) and _appears(Path(path))):
        own = (root / inside).parent.absolute()
        fault = (
            f"trainer.default_root_dir: process {trainer.global_rank} on {host} does not see the folder "
            f"{Path(path).parent} of the first process, on {first_host}; its own is {own}: give a folder that all "
            "machines share, and start all processes in the same place with the same value"
        )
    faults: list[str | None] = [None] * trainer.world_size
    distributed.all_gather_object(faults, fault)
    if trainer.is_global_zero:
        with suppress(OSError):  # it may not have been made
            token.unlink()
    if (found := next(filter(None, faults), None)) is not None:
        raise UsageError(found)


def _appears(path: Path) -> bool:
    """True if a file is there, or appears in time."""
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        with suppress(OSError):  # without the right to look, other processes must still hear that it is not seen
            if path.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # makes NFS read the folder again
