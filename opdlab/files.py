"""Files that are never half written, and full disks.

Only the standard library is imported, so that processes that only supervise others start at once.
"""

import errno
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from opdlab.errors import FullDiskError, UsageError

PARTIAL = ".partial"
"""Suffix of a file that is being written."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def below(path: Path) -> str:
    """Return where a path that does not exist was looked for, to follow it in a message; empty if it says so itself.

    Args:
        path: as the user wrote it.

    Example:
        >>> below(Path("/models/student")), below(Path("models/student")).startswith(" in /")
        ('', True)
    """
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def expanded(path: str, field: str) -> Path:
    """Return a path with the home folder in place of ``~``.

    Args:
        path: as the user wrote it.
        field: name of the option, for the message.

    Raises:
        UsageError: it begins with ``~name``, and there is no such user, or it cannot be looked at.

    Example:
        >>> expanded("./weights", "folder").name
        'weights'
        >>> expanded("~no one/weights", "folder")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: folder is '~no one/weights', but its home folder is not known: give the whole path
    """
    try:
        found = Path(path).expanduser()
        found.is_file()
    except RuntimeError as error:
        raise UsageError(f"{field} is '{path}', but its home folder is not known: give the whole path") from error
    except OSError as error:  # a folder that may not be searched, in some versions of Python, or a name too long
        raise UsageError(f"{field} is '{path}', which cannot be looked at ({error.strerror}): give another") from error
    return found


def output_folder(path: Path, option: str, files: Sequence[str]) -> Path:
    """Return a folder that results can be written to; called before they are computed.

    Args:
        path: made if it is missing.
        option: that names it, for messages.
        files: names or patterns of the files that will be written.

    Raises:
        UsageError: it cannot be made or written to, or a folder has the name of one of the files.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "results"
        >>> output_folder(out, "--out", ["table.csv"]) == out, out.is_dir()
        (True, True)
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path, prefix=".opdlab-").close()
    except OSError as error:
        raise UsageError(f"{option} '{path}' cannot be written to ({error.strerror}): give another folder") from error
    for found in (found for pattern in files for found in path.glob(pattern) if found.is_dir()):
        raise UsageError(
            f"{option} '{path}' has a folder '{found.name}' where a file is to be written: move it, or give another one"
        )
    return path


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces ``path`` when the block ends: a reader sees the old content or the new.

    The file is written beside ``path``, so that the last step is a rename within one file system, and is on the disk
    before it gets its name. A kill leaves ``path`` as it was, and at most ``path.partial``; an error leaves neither.

    Args:
        path: its folder is made if it is missing.
        shared: other processes may write the same path at the same time; the last one to end stays.

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
    writer = f".{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}" if shared else ""
    partial = path.with_name(f"{path.name}{writer}{PARTIAL}")
    with naming_full_disk(path):
        try:
            _make_folder(path.parent)
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def replacing_files(folder: Path, stale: Sequence[str] = (), last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder whose files move into ``folder`` when the block ends; other files there stay.

    The files are written beside ``folder`` and are all on the disk before the first one moves. A kill while they are
    written leaves ``folder`` as it was, and ``folder.partial``; an error leaves only the first. A kill in the instant
    in which they move leaves old files beside new ones, and those of ``last`` are missing.

    Args:
        folder: made if it is missing.
        stale: patterns of files to delete in ``folder`` unless they are replaced.
        last: patterns of files without which the others cannot be used; they move last.

    Raises:
        FullDiskError: the disk is full.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "model"
        >>> for name in ("weights-1.bin", "weights-2.bin"):
        ...     with replacing_files(folder, stale=["weights-*"]) as new:
        ...         (new / name).touch()
        >>> [file.name for file in folder.iterdir()]
        ['weights-2.bin']
    """
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    with naming_full_disk(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
            for name in files:
                with (partial / name).open("rb") as file:
                    os.fsync(file.fileno())
            old = {path.relative_to(folder) for pattern in stale for path in folder.glob(pattern)}
            files.sort(key=lambda name: any(name.match(pattern) for pattern in last))
            for name in (name for name in files if any(name.match(pattern) for pattern in last)):
                (folder / name).unlink(missing_ok=True)
            for name in files:
                _make_folder((folder / name).parent)
                (partial / name).replace(folder / name)
            for name in old.difference(files):
                (folder / name).unlink()
            _sync_folder(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raise a :class:`FullDiskError` that names ``path`` if the block finds the disk full."""
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if full_disk(error) is not None:
            raise FullDiskError(path) from error
        raise


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


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
    for path in list(folder.rglob(f"*{PARTIAL}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def full_disk(error: BaseException | None) -> Path | None:
    """Return the path that could not be written because the disk is full; None for other errors.

    Libraries wrap the system's error or quote it, so the errors that ``error`` was raised from and the messages are
    looked at too; the first error counts. The path is empty if nothing named it.

    Example:
        >>> full_disk(OSError(errno.ENOSPC, "No space left on device", "a.txt")), full_disk(ValueError())
        (PosixPath('a.txt'), None)
    """
    found: Path | None = None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a writer's thread raises one error twice, perhaps in a circle
        seen.add(id(error))
        if isinstance(error, FullDiskError):
            found = error.path
        elif isinstance(error, OSError) and error.errno in _FULL:
            found = Path(error.filename or found or "")
        elif any(os.strerror(code) in str(error) for code in _FULL):
            found = found or Path()
        error = error.__cause__ or error.__context__
    return found
