"""Cleaning of training problems: remove conflicting answers, duplicates, and benchmark problems."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opdlab.data.overlap import BenchmarkIndex, Suspect, normalized
from opdlab.data.repeats import RowHashes, text_digest
from opdlab.data.stores import OnDemand, ProblemStore, chosen, stored
from opdlab.errors import require
from opdlab.types import Problem

_REMEMBERED = 100_000  # texts whose repeats are not looked up among the benchmarks again


@dataclass(frozen=True)
class CleaningConfig:
    r"""Options for cleaning the training problems, applied in this order.

    Texts are compared after Unicode normalisation (NFKC), ignoring case and the amount of white space.

    1. ``drop_conflicting``: drop every row of a text that occurs with different golds, because it is unknown which is
       right. This comes before deduplication, which would hide the conflict.
    2. ``deduplicate``: drop all but the first row of a text, and of an id. The text of a chat is that of all its turns.
    3. ``decontaminate``: drop rows that are a problem of a configured benchmark, exactly or by runs of words; see
       :class:`opdlab.data.overlap.BenchmarkIndex`.

    The default of ``overlap`` comes from a manual review of the overlap of DAPO-Math-17k with AIME24, AIME25, MATH500
    and AMC23. Texts that share 0.3 or more are benchmark problems with another ending or other numbers. From 0.2 to 0.3
    about half are; the rest are unrelated problems that share a phrase. Without ``boilerplate`` five unrelated problems
    share more than 0.3. Lower ``overlap`` to be stricter. With ``overlap: 0`` and ``boilerplate: null`` one shared run
    is enough. This is the plain 13-gram rule, which drops ten times as many prompts, most for "where m and n are
    relatively prime positive integers".

    Args:
        deduplicate: drop duplicates.
        drop_conflicting: drop texts with different golds.
        decontaminate: drop problems of the benchmarks.
        ngram: words in a run, at least 1.
        overlap: minimum share, 0 to 1, of the shorter text's runs that both texts have.
        boilerplate: largest number of training texts, at least 1, that may have the same run; a run in more texts is a
            common phrase and does not count. Null counts every run.

    Raises:
        UsageError: a value is out of range.
    """

    deduplicate: bool = True
    drop_conflicting: bool = True
    decontaminate: bool = True
    ngram: int = 13
    overlap: float = 0.3
    boilerplate: int | None = 10

    def __post_init__(self) -> None:
        require(self.ngram >= 1, f"ngram is {self.ngram}, but must be at least 1 word")
        require(0 <= self.overlap <= 1, f"overlap is {self.overlap}, but must be a share from 0 to 1")
        require(
            self.boilerplate is None or self.boilerplate >= 1,
            f"boilerplate is {self.boilerplate}, but must be at least 1, or null to count every run",
        )


@dataclass(frozen=True)
class CleaningReport:
    """Cleaning report: number of rows read and dropped, by reason.

    Args:
        read: rows read.
        conflicting: rows whose text occurs with different golds.
        duplicate: repeated rows of a text.
        exact: rows that are a problem of a benchmark, by benchmark.
        by_ngrams: rows that share enough runs of words with a problem, by benchmark.
        too_long: rows with more prompt tokens than allowed.
        same_id: rows whose id an earlier row with another text has.
        teacher_too_long: rows of which only the prompt that the teacher sees has more tokens than allowed.

    Example:
        >>> print(CleaningReport(9, conflicting=2, duplicate=1, exact={"amc23": 1}, by_ngrams={"amc23": 3}))
        9 read, 2 conflicting, 1 duplicate, 4 contaminated (exact + by n-grams: amc23 1 + 3), 0 too long, 2 kept
    """

    read: int
    conflicting: int = 0
    duplicate: int = 0
    exact: Mapping[str, int] = field(default_factory=dict)
    by_ngrams: Mapping[str, int] = field(default_factory=dict)
    too_long: int = 0
    same_id: int = 0
    teacher_too_long: int = 0

    @property
    def contaminated(self) -> int:
        """Return the number of rows that are a problem of a benchmark, exactly or by n-grams."""
        return sum(self.exact.values()) + sum(self.by_ngrams.values())

    @property
    def kept(self) -> int:
        """Return the number of rows kept."""
        dropped = self.conflicting + self.duplicate + self.contaminated + self.same_id
        return self.read - dropped - self.too_long - self.teacher_too_long

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {self.exact[name]} + {self.by_ngrams[name]}" for name in self.exact)
        more = f"{self.same_id} with the id of another, " if self.same_id else ""
        more += f"{self.teacher_too_long} too long for the teacher, " if self.teacher_too_long else ""
        return (
            f"{self.read} read, {self.conflicting} conflicting, {self.duplicate} duplicate, {self.contaminated} "
            f"contaminated{parts and f' (exact + by n-grams: {parts})'}, {self.too_long} too long, {more}"
            f"{self.kept} kept"
        )


def asked_text(problem: Problem) -> str:
    """Return the normalised text that is compared with the benchmarks: that of the user's turns."""
    turns = [turn.content for turn in problem.messages if turn.role == "user"] or [problem.text]
    return normalized(" ".join(turns))


class _Suspects:
    """The rows whose text shares something with a benchmark.

    Args:
        index: of the benchmarks; None if there are none.
    """

    def __init__(self, index: BenchmarkIndex | None) -> None:
        self._index = index
        self._by_text: dict[bytes, Suspect] = {}
        self._remembered: set[bytes] = set()
        self._rows: dict[int, Suspect] = {}

    def look_up(self, row: int, problem: Problem, digest: bytes) -> None:
        """Look for a row's text among the benchmarks; for repeats of a text, the n-grams are not counted again."""
        if self._index is None:
            return
        if digest not in self._remembered:
            if digest not in self._by_text and (found := self._index.look_up(asked_text(problem))) is not None:
                self._by_text[digest] = found
            if len(self._remembered) == _REMEMBERED:  # a text without overlap counts nothing if it is looked up again
                self._remembered.clear()
            self._remembered.add(digest)
        if digest in self._by_text:
            self._rows[row] = self._by_text[digest]

    def drop(self, kept: NDArray[np.bool_], exact: dict[str, int], by_ngrams: dict[str, int]) -> None:
        """Unset and count the rows that are benchmark problems, once all rows are read and common phrases are known."""
        for row, suspect in self._rows.items():
            if self._index is not None and kept[row] and (benchmark := self._index.match(suspect)) is not None:
                kept[row] = False
                (by_ngrams if suspect.exact is None else exact)[benchmark] += 1


def clean(
    problems: Iterable[Problem] | ProblemStore, config: CleaningConfig, benchmarks: Mapping[str, Iterable[str]]
) -> tuple[OnDemand[Problem], CleaningReport]:
    """Return the problems that pass the rules of :class:`CleaningConfig`.

    The problems are read once, one at a time. They are not held: this needs 32 bytes a row, more at its end, for
    sorting, and 8 bytes for each row that it returns. See :class:`opdlab.data.repeats.RowHashes`.

    Args:
        problems: problems in the order of their source; the order is kept.
        config: rules to apply.
        benchmarks: texts of problems, by benchmark; a text of two benchmarks counts for the first.

    Returns:
        The remaining problems, which are read when they are needed, and the cleaning report.

    Example:
        >>> rows = [("1 + 1?", "2"), ("1 +  1?", "2"), ("2 + 2?", "4"), ("2 + 2?", "5"), ("What is 7?", "7")]
        >>> problems = [Problem(str(i), text, gold) for i, (text, gold) in enumerate(rows)]
        >>> kept, report = clean(problems, CleaningConfig(), {"sevens": ["what is 7?"]})
        >>> [problem.id for problem in kept], report.conflicting, report.duplicate, report.contaminated
        (['0'], 2, 1, 1)
    """
    store = stored(problems)
    compared = benchmarks if config.decontaminate else {}
    index = BenchmarkIndex(compared, config.ngram, config.overlap, config.boilerplate) if compared else None
    rows, suspects = RowHashes(store.read), _Suspects(index)
    for row, (key, problem) in enumerate(store.scan()):
        digest = text_digest(problem)
        rows.add(key, problem, digest)
        suspects.look_up(row, problem, digest)
    # Conflicts and common phrases are known only after all rows are read.
    kept, conflicting, duplicate = np.ones(len(rows), bool), 0, 0
    if config.drop_conflicting or config.deduplicate:
        first = rows.first_of_text()
        if config.drop_conflicting:
            kept = ~rows.conflicting(first)
            conflicting = len(rows) - int(kept.sum())
        if config.deduplicate:
            repeats = kept & (first != np.arange(len(rows)))
            kept, duplicate = kept & ~repeats, int(repeats.sum())
    exact, by_ngrams = dict.fromkeys(compared, 0), dict.fromkeys(compared, 0)
    suspects.drop(kept, exact, by_ngrams)
    chosen_rows, same_id = np.flatnonzero(kept), 0
    if config.deduplicate:
        repeats = rows.repeats_id(chosen_rows)
        chosen_rows, same_id = chosen_rows[~repeats], int(repeats.sum())
    keys = array("Q", np.frombuffer(rows.keys, np.uint64)[chosen_rows].tobytes())
    return chosen(store, keys), CleaningReport(len(rows), conflicting, duplicate, exact, by_ngrams, same_id=same_id)
