"""Problems that can be read again one by one, so that a run need not hold them all in memory."""

import os
import pickle
import tempfile
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar, overload

from opdlab.files import naming_full_disk
from opdlab.types import Problem

CHUNK = 1024  # problems that are read, or tokenized, together

_LENGTH_BYTES = 8

Item = TypeVar("Item")


class ProblemStore(ABC):
    """Problems in the order of their source, each of which can be read again by a key of 64 bits."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[int, Problem]]:
        """Yield the key and the problem of each row, reading lazily."""

    @abstractmethod
    def read(self, keys: Sequence[int]) -> list[Problem]:
        """Return the problems of some keys of the last :meth:`scan`."""


class ListStore(ProblemStore):
    """Problems that their source holds in memory; a key is a position.

    Args:
        problems: the problems.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems

    def scan(self) -> Iterator[tuple[int, Problem]]:
        """See :meth:`ProblemStore.scan`."""
        return enumerate(self._problems)

    def read(self, keys: Sequence[int]) -> list[Problem]:
        """See :meth:`ProblemStore.read`."""
        return [self._problems[key] for key in keys]


class SpooledStore(ProblemStore):
    """Problems that can only be read from first to last: they are copied to a temporary file; a key is a place in it.

    The file is deleted when the store, or the process, ends.

    Args:
        problems: returns the problems.
    """

    def __init__(self, problems: Callable[[], Iterable[Problem]]) -> None:
        self._problems = problems
        self._file: IO[bytes] | None = None

    def scan(self) -> Iterator[tuple[int, Problem]]:
        """See :meth:`ProblemStore.scan`."""
        self._file = file = tempfile.TemporaryFile(prefix="opdlab-problems-")  # noqa: SIM115 - read until the run ends
        weakref.finalize(self, file.close)
        for problem in self._problems():
            content = pickle.dumps(problem, pickle.HIGHEST_PROTOCOL)
            with naming_full_disk(Path(tempfile.gettempdir())):
                key = file.tell()
                file.write(len(content).to_bytes(_LENGTH_BYTES) + content)
            yield key, problem
        with naming_full_disk(Path(tempfile.gettempdir())):
            file.flush()

    def read(self, keys: Sequence[int]) -> list[Problem]:
        """See :meth:`ProblemStore.read`."""
        assert self._file is not None
        self._file.flush()
        descriptor, problems = self._file.fileno(), []
        for key in keys:  # without moving the file's position, which forked processes share
            length = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, key))
            problems.append(pickle.loads(os.pread(descriptor, length, key + _LENGTH_BYTES)))
        return problems


class ChangedStore(ProblemStore):
    """Problems of another store, changed.

    Args:
        store: the other one.
        change: returns a problem's new form.
    """

    def __init__(self, store: ProblemStore, change: Callable[[Problem], Problem]) -> None:
        self._store, self._change = store, change

    def scan(self) -> Iterator[tuple[int, Problem]]:
        """See :meth:`ProblemStore.scan`."""
        return ((key, self._change(problem)) for key, problem in self._store.scan())

    def read(self, keys: Sequence[int]) -> list[Problem]:
        """See :meth:`ProblemStore.read`."""
        return [self._change(problem) for problem in self._store.read(keys)]


class OnDemand(Sequence[Item]):
    """Items that are made when they are read, from a key of eight bytes each.

    Args:
        keys: key of each item.
        make: returns the items of some keys; also receives their positions. Many at a time are faster.

    Example:
        >>> items = OnDemand(array("Q", [7, 8, 9]), lambda keys, at: [f"{i}:{key}" for i, key in zip(at, keys)])
        >>> len(items), items[1], items[-1], items[1:], list(items)
        (3, '1:8', '2:9', ['1:8', '2:9'], ['0:7', '1:8', '2:9'])
        >>> items.__getitems__([2, 0])
        ['2:9', '0:7']
    """

    def __init__(self, keys: "array[int]", make: Callable[[Sequence[int], Sequence[int]], list[Item]]) -> None:
        self.keys, self.make = keys, make

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return self.make(self.keys[index], range(len(self))[index])
        position = range(len(self))[index]
        return self.make(self.keys[position : position + 1], range(position, position + 1))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return the items at several positions; PyTorch's data loaders call this too."""
        return self.make([self.keys[index] for index in indices], indices)

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]


def stored(problems: Iterable[Problem] | ProblemStore) -> ProblemStore:
    """Return a store of problems; those that are no sequence are copied to a temporary file when they are read."""
    if isinstance(problems, ProblemStore):
        return problems
    return ListStore(problems) if isinstance(problems, Sequence) else SpooledStore(lambda: problems)


def chosen(store: ProblemStore, keys: "array[int]") -> OnDemand[Problem]:
    """Return problems of a store, which are read when they are needed."""
    return OnDemand(keys, lambda some, _: store.read(some))


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield lists of :data:`CHUNK` items; the last one may be shorter."""
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk
