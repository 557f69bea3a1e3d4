"""How long work reports that it goes on, whatever shows it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Something that can show a bar."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a bar called ``name`` for ``total`` units while the block runs; yields a function that advances it."""


class SilentProgress:
    """Shows nothing.

    Example:
        >>> with SilentProgress().task("sampling", total=10) as advance:
        ...     advance(1)
    """

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`Progress`."""
        del name, total
        yield lambda num_units: None
