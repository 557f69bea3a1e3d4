"""Files that are never half written, and full disks.

Only the standard library is imported, so that processes that only supervise others start at once.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from opdlab.errors import FullDiskError

PARTIAL = ".partial"
"""Suffix of a file that is being written."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces ``path`` when the block ends: a reader sees the old content or the new.

    The file is written beside ``path``, so that the last step is a rename within one file system, and is on the disk
    before it gets its name. A kill leaves ``path`` as it was, and at most ``path.partial``; an error leaves neither.

    Args:
        path: its folder is made if it is missing.

    Raises:
        FullDiskError: the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "folder" / "numbers.txt"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"1 2 3")
        ...     path.exists()
        False
        >>> path.read_bytes(), [file.name for file in path.parent.iterdir()]
        (b'1 2 3', ['numbers.txt'])
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(path.parent.parent)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and full_disk(error) is not None:
            raise FullDiskError(path) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that a new name survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse it for folders
        pass
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove what a kill left half written in ``folder`` and below; call it when no other process writes there."""
    for path in folder.rglob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def full_disk(error: BaseException | None) -> Path | None:
    """Return the path that could not be written because the disk is full; None for other errors.

    Libraries wrap the system's error, so the errors that ``error`` was raised from are looked at too. The path is empty
    if the system did not name it.

    Example:
        >>> full_disk(OSError(errno.ENOSPC, "No space left on device", "a.txt")), full_disk(ValueError())
        (PosixPath('a.txt'), None)
    """
    found: Path | None = None
    while error is not None:
        if isinstance(error, FullDiskError):
            return error.path
        if isinstance(error, OSError) and error.errno in _FULL:
            found = Path(error.filename or found or "")
        error = error.__cause__ or error.__context__
    return found
