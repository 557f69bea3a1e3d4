"""The teacher's targets for rollouts, and the request for them.

Shapes: B rollouts, T response tokens, K support, G the teacher's hidden size. Log-probabilities are in nats, at the
sampling temperature.
"""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from opdlab.types.rows import Rows

_ABSENT = "absent"  # in the metadata of a field: its value in rows whose teacher leaves the field out


@dataclass(frozen=True)
class Targets(Rows):
    """The teacher's scores of rollouts, computed once per rollout buffer and never changed.

    Args:
        logprobs: [B, T] float32, nats: of the sampled tokens; 0 at masked positions. NaN if the teacher cannot compute
            them and the request does not require them; then ``support_mass`` is None, see :attr:`known_logprobs`.
        support_ids: [B, T, K]: the tokens on which student and teacher are compared, or None if none are requested: the
            teacher's most likely ones, most likely first; or the behavior policy's; or both, the teacher's first. The
            dtype is the smallest that holds every id (:func:`id_dtype`); many operations do not support it, so call
            ``.long()``.
        support_logits: [B, T, K] float32: their logits at the sampling temperature, or None.
        support_mass: [B, T] float32: the teacher's probability of the support, 0 to 1, or None.
        entropy: [B, T] float32, nats: of the teacher's next-token distribution, or None if it is not requested.
        support_valid: [B, T, K] bool: False at an id that stands in the support a second time; None if ids are unique.
        log_normalizer: [B, T] float32: log-sum-exp of the teacher's logits over the vocabulary, or None.
        log_tail: [B, T] float32: log-sum-exp of its logits outside the support, or None.
        hidden: [B, T, G]: the teacher's last hidden states, from which its head makes the logits, or None.
        support_overlap: [B, T] float32: share of a support of the behavior policy's tokens that is among the teacher's
            most likely ones, on a few positions of each rollout; -1 on the other valid positions. Or None.

    Example:
        A support of two tokens at each of the three positions of one rollout.

        >>> targets = Targets(
        ...     logprobs=torch.tensor([[-0.2, -1.9, -0.4]]),
        ...     support_ids=torch.tensor([[[7, 4], [8, 3], [1, 2]]], dtype=torch.uint8),
        ...     support_logits=torch.tensor([[[3.1, 0.4], [1.0, 0.9], [2.2, 0.1]]]),
        ...     support_mass=torch.tensor([[0.97, 0.71, 0.92]]),
        ... )
        >>> targets.support_logits.shape
        torch.Size([1, 3, 2])
    """

    logprobs: Tensor
    support_ids: Tensor | None = None
    support_logits: Tensor | None = None
    support_mass: Tensor | None = None
    entropy: Tensor | None = None
    support_valid: Tensor | None = field(default=None, metadata={_ABSENT: True})
    log_normalizer: Tensor | None = None
    log_tail: Tensor | None = None
    hidden: Tensor | None = None
    support_overlap: Tensor | None = field(default=None, metadata={_ABSENT: -1.0})

    @property
    def known_logprobs(self) -> Tensor | None:
        """Return ``logprobs``; None if the teacher knows probabilities only relative to others of the support.

        Example:
            >>> ratios = Targets(torch.full((1, 1), torch.nan), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
            >>> ratios.known_logprobs, Targets(torch.zeros(1, 1)).known_logprobs
            (None, tensor([[0.]]))
        """
        return None if self.support_logits is not None and self.support_mass is None else self.logprobs


@dataclass(frozen=True)
class TeacherRequest:
    """The required teacher outputs.

    Args:
        top_k: K, number of the teacher's most likely tokens whose ids and logits are required; 0 for none.
        vocab_size: number of tokens shared with the student, over which the teacher's distribution is taken; None for
            all tokens of the teacher.
        entropy: True if the entropy of the teacher's distribution is required.
        behavior_top_k: number of the behavior policy's most likely tokens, :attr:`Rollouts.behavior_support_ids`, whose
            logits under the teacher are required; 0 for none. With ``top_k`` too, the support is the union.
        tail: True if ``log_normalizer`` and, with a support, ``log_tail`` are required.
        hidden: True if the hidden states are required.
        logprobs: True if the log-probabilities of the sampled tokens and the mass of the support are required; False if
            they are only logged, so that a teacher that cannot compute them may leave them out.

    Example:
        >>> TeacherRequest(top_k=32).top_k
        32
    """

    top_k: int = 0
    vocab_size: int | None = None
    entropy: bool = False
    behavior_top_k: int = 0
    tail: bool = False
    hidden: bool = False
    logprobs: bool = True


class MergedTargets:
    """The targets of rollouts, put together from those of parts.

    A field that the targets of a part lack is None for all rollouts, because its teacher cannot compute it. Two fields
    have a value that says the same: ids are unique, and the overlap is not measured.

    Args:
        count: B, number of rollouts.
        width: T, number of columns.

    Example:
        >>> merged = MergedTargets(2, 3)
        >>> merged.put(torch.tensor([1]), Targets(torch.ones(1, 2)))
        >>> merged.put(torch.tensor([0]), Targets(torch.ones(1, 3), entropy=torch.ones(1, 3)))
        >>> merged.targets()
        Targets(logprobs=tensor([[1., 1., 1.],
                [1., 1., 0.]]), support_ids=None, ..., entropy=None, ...)
    """

    def __init__(self, count: int, width: int) -> None:
        self._size = (count, width)
        self._found: dict[str, Tensor] = {}
        self._lacking: set[str] = set()

    def put(self, rows: Tensor, part: Targets) -> None:
        """Add the targets of a part.

        Args:
            rows: [b] long, the rows of ``part``.
            part: b rows of at most T columns.
        """
        for each in fields(part):
            value, absent = getattr(part, each.name), each.metadata.get(_ABSENT)
            if value is not None:
                size = (*self._size, *value.shape[2:])
                into = self._found.get(each.name)
                if into is None:
                    into = torch.full(size, absent or 0, dtype=value.dtype)
                elif value.dtype.itemsize > into.dtype.itemsize:
                    into = into.to(value.dtype)
                self._found[each.name] = into
                bits = torch.int16 if into.dtype == torch.uint16 else into.dtype  # as in assign_rows
                view, width = into.view(bits), value.shape[1]
                view[rows, :width], view[rows, width:] = value.to(into.dtype).view(bits), 0
            elif absent is None:
                self._lacking.add(each.name)

    def targets(self) -> Targets:
        """Return the targets of all rollouts."""
        return Targets(**{name: value for name, value in self._found.items() if name not in self._lacking})


def id_dtype(vocab_size: int) -> torch.dtype:
    """Return the smallest integer dtype that holds the ids of a vocabulary.

    Example:
        >>> id_dtype(256), id_dtype(49152), id_dtype(151936)
        (torch.uint8, torch.uint16, torch.int32)
    """
    return next((t for t in (torch.uint8, torch.uint16) if vocab_size - 1 <= torch.iinfo(t).max), torch.int32)


def assign_rows(into: Tensor, rows: Tensor, values: Tensor) -> None:
    """Assign ``into[rows] = values``; uses a view as int16, because torch does not support this for uint16.

    Example:
        >>> ids = torch.zeros(3, 2, dtype=torch.uint16)
        >>> assign_rows(ids, torch.tensor([2]), torch.tensor([[7, 40_000]]))
        >>> ids[2].tolist()
        [7, 40000]
    """
    bits = torch.int16 if into.dtype == torch.uint16 else into.dtype
    into.view(bits)[rows] = values.to(into.dtype).view(bits)
