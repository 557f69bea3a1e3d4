"""Find rows with the same text or the same id from hashes of eight bytes."""

import hashlib
from array import array
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from opdlab.data.overlap import normalized
from opdlab.types import Message, Problem

HASH_BYTES = 8  # of the hash of a text, and of that of an id

Rows = NDArray[np.int64]


def text_digest(problem: Problem) -> bytes:
    """Return a digest of 16 bytes of a problem's normalised text; that of a chat is the text of all its turns."""
    turns = problem.messages or (Message("user", problem.text),)
    whole = "\0".join(normalized(part) for turn in turns for part in turn)
    return hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def row_hashes(problem: Problem, digest: bytes) -> tuple[int, int, int]:
    """Return hashes of a problem's text, of text and gold, and of the id.

    Args:
        problem: the problem.
        digest: its :func:`text_digest`.
    """
    gold = b"none" if problem.answer is None else b"gold" + _bytes(normalized(problem.answer))
    return int.from_bytes(digest[:HASH_BYTES]), _hash(digest + gold, 8), _hash(_bytes(problem.id), HASH_BYTES)


class RowHashes:
    r"""Keys and hashes of rows, 32 bytes a row: the key, a hash of the text, one of text and gold, one of the id.

    Rows with the same two hashes of text and gold repeat each other: 128 bits agree, so among n rows the probability
    of an error is n^2 / 2^129. Rows with the same hash of the text and another gold, and rows with the same hash of the
    id, agree in 64 bits only, by chance with the probability n^2 / 2^65 (3e-8 for a million rows). They are few, so
    they are read again and compared: a collision of 64 bits drops no row.

    Args:
        read: returns the problems of some keys.
    """

    def __init__(self, read: Callable[[Sequence[int]], list[Problem]]) -> None:
        self.keys, self._texts, self._golds, self._ids = (array("Q") for _ in range(4))
        self._read = read

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: int, problem: Problem, digest: bytes) -> None:
        """Add a row.

        Args:
            key: its key.
            problem: its problem.
            digest: the problem's :func:`text_digest`.
        """
        self.keys.append(key)
        for hashes, value in zip((self._texts, self._golds, self._ids), row_hashes(problem, digest), strict=True):
            hashes.append(value)

    def first_of_text(self) -> Rows:
        """Return for each row the first row with the same text, [n]."""
        golds = np.frombuffer(self._golds, np.uint64)
        return self._first(np.arange(len(self)), self._texts, lambda first: golds != golds[first], text_digest)

    def conflicting(self, first: Rows) -> NDArray[np.bool_]:
        """Return for each row whether its text occurs with different golds, [n].

        Args:
            first: :meth:`first_of_text`.
        """
        golds = np.frombuffer(self._golds, np.uint64)
        differs = np.zeros(len(self), bool)
        differs[first[golds != golds[first]]] = True
        return differs[first]

    def repeats_id(self, rows: Rows) -> NDArray[np.bool_]:
        """Return for each of some rows whether one before it has the same id, [k]."""
        position = np.arange(len(rows))
        first = self._first(rows, self._ids, lambda first: first != position, lambda problem: problem.id)
        repeats: NDArray[np.bool_] = first != position
        return repeats

    def _first(
        self,
        rows: Rows,
        hashes: "array[int]",
        doubtful: Callable[[Rows], NDArray[np.bool_]],
        name: Callable[[Problem], Hashable],
    ) -> Rows:
        """Return for each of some rows the position in ``rows`` of the first one of the same name, [k].

        Args:
            rows: [k].
            hashes: of the names, of all rows.
            doubtful: for the result as the hashes alone give it, which positions must be read again.
            name: what is hashed.
        """
        own = np.frombuffer(hashes, np.uint64)[rows]
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        begins = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
        sizes = np.diff(begins, append=len(rows))
        first = np.empty(len(rows), np.int64)
        first[order] = np.repeat(order[begins], sizes)
        for value in np.unique(own[first[doubtful(first)]]):
            group = order[np.searchsorted(ordered, value, "left") : np.searchsorted(ordered, value, "right")]
            first_of: dict[Hashable, int] = {}
            for position in group.tolist():
                (problem,) = self._read([self.keys[rows[position]]])
                first[position] = first_of.setdefault(name(problem), position)
        return first


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _hash(value: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(value, digest_size=size).digest())
