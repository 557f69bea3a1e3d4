"""A rollout buffer, and the exchange of its rows between processes, through host memory.

Shapes: W processes, N rows of a buffer, n rows that one process holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, distributed

from opdlab.collectives import host_group
from opdlab.errors import require
from opdlab.types import Rollouts, Targets

PART_BYTES = 1 << 25
"""Bytes that a process exchanges at a time; beside its rows, it has as many on their way out and on their way in."""
_PARTS = ("rollouts", "targets")
_LEFT_PADDED = ("prompt_tokens", "prompt_mask", "teacher_prompt_tokens", "teacher_prompt_mask")
_ADDED_UP = ("cache_hits", "cache_misses", "retries")  # ends of names of metrics of the teacher
_RATE, _RATE_SECONDS = "rollout/sampled_tokens_per_second", "time/sample_seconds"


@dataclass(frozen=True)
class Pool:
    """A rollout buffer, or one process's share of it: rollouts with their targets, in host memory.

    Args:
        rollouts: all rollouts of the buffer.
        targets: the teacher's targets, computed once.
        metrics: metrics of sampling and scoring, by name.
        first_batch_unscored: True if the next training step fills in the behavior log-probabilities of the first
            optimizer batch, see :meth:`RolloutLoader.fill_behavior`.
        weights: for metrics that are means over something else than the rollouts, over how much: the metrics of
            several shares are averaged with it.
        pad_id: token id of padding, for a share that becomes as wide as the buffer.
    """

    rollouts: Rollouts
    targets: Targets
    metrics: dict[str, float] = field(default_factory=dict)
    first_batch_unscored: bool = False
    weights: dict[str, float] = field(default_factory=dict)
    pad_id: int = 0

    def rows(self, index: Tensor) -> Self:
        """Return the selected rows."""
        return replace(self, rollouts=self.rollouts.rows(index), targets=self.targets.rows(index))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as tensors and plain values."""
        return {
            "rollouts": self.rollouts.state_dict(),
            "targets": self.targets.state_dict(),
            "metrics": self.metrics,
            "first_batch_unscored": self.first_batch_unscored,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the object of a :meth:`state_dict`."""
        tensors = Rollouts.from_state_dict(state["rollouts"]), Targets.from_state_dict(state["targets"])
        return cls(*tensors, state["metrics"], state["first_batch_unscored"])


def join_shares(state: dict[str, Any], weights: Mapping[str, float], pad_id: int) -> None:
    """Give a share of a buffer the widths and the metrics of the whole buffer, in place.

    All processes call it together, each with its share. Tensors are padded as those of the whole buffer would be:
    prompts on the left, responses on the right.

    Args:
        state: :meth:`Pool.state_dict` of the share.
        weights: :attr:`Pool.weights` of the share.
        pad_id: token id of padding.

    Raises:
        UsageError: the shares have not the same fields.
    """
    shapes = {
        (part, name): (str(value.dtype), *value.shape[1:])
        for part in _PARTS
        for name, value in state[part].items()
        if isinstance(value, Tensor)
    }
    own = (shapes, len(state["rollouts"]["tokens"]), state["metrics"], weights, state["first_batch_unscored"])
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, own, group=host_group())
    for part, name in dict.fromkeys(key for share in shares for key in share[0]):
        found = [share[0].get((part, name)) for share in shares]
        require(
            all(each is not None and each[2:] == found[0][2:] and each[0] == found[0][0] for each in found),
            f"the processes have other {part}.{name} of one rollout buffer ({', '.join(map(str, found))}): a teacher "
            "must return the same fields for every share of a buffer",
        )
        if len(found[0]) > 1:
            width, fill = max(each[1] for each in found), pad_id if name.endswith("tokens") else 0
            state[part][name] = _padded(state[part][name], width, fill, left=name in _LEFT_PADDED)
    assert len({share[4] for share in shares}) == 1, "the processes have different weights"
    state["metrics"] = _joined_metrics([share[1:4] for share in shares])


def _padded(tensor: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    if (old := tensor.shape[1]) == width:
        return tensor
    new = torch.full((len(tensor), width, *tensor.shape[2:]), fill, dtype=tensor.dtype)
    (new[:, width - old :] if left else new[:, :old]).copy_(tensor)
    return new


def _joined_metrics(shares: Sequence[tuple[int, Mapping[str, float], Mapping[str, float]]]) -> dict[str, float]:
    """Return the metrics of a buffer from the rows, metrics and weights of its shares.

    Times are those of the slowest process, numbers of rollouts are added up, and all others are means.
    """
    joined = {}
    for name in dict.fromkeys(name for _, metrics, _ in shares for name in metrics):
        values = [metrics.get(name, 0.0) for _, metrics, _ in shares]
        if name.startswith("time/") or name.endswith("/seconds"):
            joined[name] = max(values)
        elif name.startswith("targets/") and name.endswith(_ADDED_UP):
            joined[name] = sum(values)
        else:
            # A process without rollouts of a teacher has no time of its requests; its share of them is 0.
            timed = name.endswith("/request_seconds")
            weights = [
                0.0 if timed and name not in metrics else weights.get(name, float(rows))
                for rows, metrics, weights in shares
            ]
            total = sum(value * weight for value, weight in zip(values, weights, strict=True))
            joined[name] = total / max(sum(weights), 1e-9)
    if _RATE in joined:  # of all processes, until the slowest is done
        tokens = sum(metrics.get(_RATE, 0.0) * metrics.get(_RATE_SECONDS, 0.0) for _, metrics, _ in shares)
        joined[_RATE] = tokens / max(joined.get(_RATE_SECONDS, 0.0), 1e-9)
    return joined


class RowExchange:
    """An exchange of rows of tensors between all processes, which use it together, tensor by tensor.

    Args:
        before: for each process, the rows of the buffer that it holds, [n] long, in the order of its tensors.
        after: for each process, the rows that it holds then, in that order.
    """

    def __init__(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        rank, count = distributed.get_rank(), sum(map(len, before))
        owner, place = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        for process, rows in enumerate(after):
            owner[rows] = process
        place[after[rank]] = torch.arange(len(after[rank]))
        target = owner[before[rank]]
        self._order = target.argsort(stable=True)
        self._sent = target.bincount(minlength=len(after)).tolist()
        arriving = [rows[owner[rows] == rank] for rows in before]
        self._received = list(map(len, arriving))
        self._places = place[torch.cat(arriving)]
        self._most = max(map(len, (*before, *after)))  # the same in all processes

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor that this process holds after the exchange.

        Args:
            tensor: [n, …], in host memory; any type, and as wide as the tensors of the other processes.
        """
        group = host_group()
        old = tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8)  # gloo knows few types
        new = torch.empty(len(self._places), old.shape[1], dtype=torch.uint8)
        step = min(max(1, PART_BYTES // self._most), old.shape[1])
        # Made once: the allocator of the C library keeps much of what is freed in between.
        leaving = torch.empty(len(old) * step, dtype=torch.uint8)
        arriving = torch.empty(len(new) * step, dtype=torch.uint8)
        for start in range(0, old.shape[1], step):
            part = old[:, start : start + step]
            width = part.shape[1]
            out, into = leaving[: len(old) * width].view(-1, width), arriving[: len(new) * width].view(-1, width)
            torch.index_select(part, 0, self._order, out=out)
            distributed.all_to_all_single(into, out, self._received, self._sent, group=group)
            new[:, start : start + step].index_copy_(0, self._places, into)
        return new.view(tensor.dtype).view(len(new), *tensor.shape[1:])


def exchange_rows(state: dict[str, Any], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Exchange the rows of a buffer between all processes, which call it together; see :class:`RowExchange`.

    Args:
        state: :meth:`Pool.state_dict` of this process's rows; changed in place, tensor by tensor, so that no more than
            one tensor is in memory twice if the state alone holds them.
        before: for each process, the rows that it holds.
        after: for each process, the rows that it holds then.
    """
    exchange = RowExchange(before, after)
    for part in _PARTS:
        for name, value in state[part].items():
            if isinstance(value, Tensor):
                state[part][name] = exchange(value)
            del value
