"""Progress reports of long work, independent of the display."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from opdlab.processes import STOP


@runtime_checkable
class Progress(Protocol):
    """Interface of a progress display."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a bar called ``name`` for ``total`` units while the block runs; yields a function that advances it."""


class SilentProgress:
    """Progress display that shows nothing.

    Example:
        >>> with SilentProgress().task("sampling", total=10) as advance:
        ...     advance(1)
    """

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`Progress`."""
        del name, total
        yield lambda num_units: None


class StoppableProgress:
    """Progress display that stops the work if a signal has requested it, see :class:`opdlab.processes.StopRequest`.

    Args:
        shown: the display.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See :class:`Progress`."""
        with self._shown.task(name, total) as advance:

            def checked(num_units: int) -> None:
                advance(num_units)
                STOP.check()

            yield checked
