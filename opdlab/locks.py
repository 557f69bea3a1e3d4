"""Locks of folders, which name the process that holds them and are free after it has ended."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opdlab.records import read_json

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock for this process; yield True if it was free. The lock names its process.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield True
        file.truncate(0)


def lock_holder(folder: Path) -> dict[str, Any] | None:
    """Return process and host that hold a folder's lock; None if it is free, as it is after they have ended."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_json(folder / LOCK)
    except FileNotFoundError:
        pass
    return None
