"""Parts of a run that send a signal to their own process, from any place of it, or fill the disk."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from opdlab.errors import UsageError
from opdlab.toy import ChainProblems
from opdlab.types import Problem


class Stopper(Callback):
    """Sends a signal at the n-th call of a hook, or at the n-th unit of work that a progress bar would show.

    Args:
        place: name of a hook, or of a bar, such as ``sampling``.
        name: of the signal.
        count: n.
        rank: process that sends it.
    """

    def __init__(self, place: str, name: str = "SIGTERM", count: int = 1, rank: int = 0) -> None:
        self.place, self.name, self.left, self.rank, self.own_rank = place, name, count, rank, 0
        if hasattr(Callback, place):
            setattr(self, place, self.send)

    def send(self, *arguments: Any, **options: Any) -> None:
        """Count, and send the signal when it is time."""
        self.left -= 1
        rank = getattr(arguments[0], "global_rank", 0) if arguments else 0
        if self.left == 0 and rank == self.rank:
            signal.raise_signal(getattr(signal, self.name))

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`."""
        yield lambda _: self.send() if name == self.place else None


def stopper(place: str, name: str = "SIGTERM", count: int = 1, rank: int = 0) -> list[str]:
    """Return the arguments of the command line for a :class:`Stopper`."""
    flag = "--trainer.callbacks"
    values = {"place": place, "name": name, "count": count, "rank": rank}
    return [f"{flag}+=tests.stops.Stopper", *(f"{flag}.{key}={value}" for key, value in values.items())]


class Breaker(Stopper):
    """Raises an error in one process instead of sending a signal.

    Args:
        place: see :class:`Stopper`.
        kind: UsageError; KeyError, which is a fault of the code; or SIGKILL, which ends the process.
        count: see :class:`Stopper`.
        rank: see :class:`Stopper`.
    """

    def __init__(self, place: str, kind: str = "UsageError", count: int = 1, rank: int = 0) -> None:
        super().__init__(place, count=count, rank=rank)
        self.kind = kind

    def send(self, *arguments: Any, **options: Any) -> None:
        """Count, and raise the error when it is time."""
        self.left -= 1
        if self.left == 0 and arguments[0].global_rank == self.rank:
            if self.kind == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UsageError("broken on purpose") if self.kind == "UsageError" else KeyError("broken on purpose")


class BreakingProblems(ChainProblems):
    """Problems that only the second process cannot read, before it has joined the first one."""

    def problems(self) -> list[Problem]:
        if os.environ.get("LOCAL_RANK") == "1":
            raise UsageError("broken on purpose")
        return super().problems()


class StoppingProblems(ChainProblems):
    """Problems whose reading sends SIGTERM to the second process, before it has joined the first one."""

    def problems(self) -> list[Problem]:
        if os.environ.get("LOCAL_RANK") == "1":
            signal.raise_signal(signal.SIGTERM)
        return super().problems()


class Filler(Stopper):
    """Fills the disk of a folder instead of sending a signal.

    Args:
        place: see :class:`Stopper`.
        count: see :class:`Stopper`.
        folder: on the disk.
    """

    def __init__(self, place: str, folder: str, count: int = 1) -> None:
        super().__init__(place, count=count)
        self.folder = folder

    def send(self, *arguments: Any, **options: Any) -> None:
        """Count, and fill the disk when it is time."""
        self.left -= 1
        if self.left == 0:
            with (Path(self.folder) / "filler").open("wb", buffering=0) as file, suppress(OSError):
                for _ in range(1 << 16):  # 256 MiB; a file system that ignores the size of its mount ends the test
                    file.write(bytes(4096))
                raise RuntimeError(f"{self.folder} is not full")
