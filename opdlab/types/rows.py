"""Base of the dataclasses of tensors with one row per rollout."""

from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Rows:
    """Base of dataclasses whose tensors share their first dimension and are sliced and moved together."""

    def map(self, function: Any) -> Self:
        """Return a copy with ``function`` applied to every tensor field."""
        changed = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}  # type: ignore[arg-type]
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with every tensor on the device; Lightning calls this for minibatches."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def rows(self, index: Tensor) -> Self:
        """Return the selected rows."""
        return self.map(lambda tensor: tensor[index])

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as tensors and plain values, so that a checkpoint loads with ``weights_only=True``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Return the object of a :meth:`state_dict`."""
        return cls(**state)
