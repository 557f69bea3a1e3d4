"""When the behavior snapshot is refreshed."""

from abc import ABC, abstractmethod

import lightning.pytorch as pl


class RefreshSchedule(pl.Callback, ABC):
    """Base of callbacks that refresh the behavior snapshot: where a trainer has one, nothing else refreshes it.

    Without one, the module refreshes the snapshot before each rollout buffer is sampled.
    """

    @property
    @abstractmethod
    def schedule(self) -> str:
        """Return when the snapshot is refreshed, to follow the word "refreshed" in the first line of a run."""
