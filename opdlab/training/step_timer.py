"""Times of optimizer steps."""

import time


class StepTimer:
    """Timer of optimizer steps, whose metrics are those of the last one.

    Example:
        >>> timer = StepTimer()
        >>> timer.begin()
        >>> timer.end(num_tokens=100)
        >>> sorted(timer.metrics)
        ['time/update_seconds']
        >>> timer.end(num_tokens=100)
        >>> sorted(timer.metrics)
        ['time/update_seconds', 'train/tokens_per_second']
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        """Seconds of the update, and trained tokens per second since the step before, by name."""
        self._began = 0.0
        self._ended: float | None = None

    def begin(self) -> None:
        """Start the time of an update, which excludes sampling and scoring since the last step."""
        self._began = time.perf_counter()

    def end(self, num_tokens: int) -> None:
        """End the time of an update on ``num_tokens`` response tokens."""
        now = time.perf_counter()
        self.metrics = {"time/update_seconds": now - self._began}
        if self._ended is not None:
            self.metrics["train/tokens_per_second"] = num_tokens / (now - self._ended)
        self._ended = now
