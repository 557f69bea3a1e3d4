"""A thread with an event loop of its own."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_END_SECONDS = 5.0


class LoopThread(threading.Thread):
    """A thread that runs a coroutine in an event loop of its own.

    Args:
        work: the coroutine.
        failed: receives the exception that ends it.
    """

    def __init__(self, work: Any, failed: Callable[[BaseException], None]) -> None:
        super().__init__(name="requests to servers", daemon=True)
        self._failed = failed
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(work)

    def run(self) -> None:
        """Run the coroutine to its end."""
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failed(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def end(self) -> None:
        """Cancel what is under way, and wait for the end of the thread."""
        if self.is_alive():
            with suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._task.cancel)
        self.join(_END_SECONDS)
