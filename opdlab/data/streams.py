"""Training prompts of a source without a length, which is read while training goes on."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import overload

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from opdlab.data.cleaning import CleaningConfig, CleaningReport, asked_text
from opdlab.data.facts import PromptFacts
from opdlab.data.overlap import BenchmarkIndex
from opdlab.data.prompts import ProblemSource, PromptSet, Recipe, look_for_unknown
from opdlab.data.repeats import row_hashes, text_digest
from opdlab.data.unknown import UnknownTexts
from opdlab.errors import require
from opdlab.types import Problem, Prompt

_RECENT = 65_536  # hashes in a dict, before they join the sorted ones


class SeenHashes:
    """Pairs of hashes of 64 bits, 16 bytes a pair: what was seen first with the first hash.

    Example:
        >>> seen = SeenHashes()
        >>> seen.add(7, 1), seen.add(7, 2), seen.add(8, 2)
        (None, 1, None)
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._keys, self._values = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def add(self, key: int, value: int) -> int | None:
        """Return the value with which a key was added before; if it is new, add it and return None."""
        if key in self._recent:
            return self._recent[key]
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        if place < len(self._keys) and int(self._keys[place]) == key:
            return int(self._values[place])
        self._recent[key] = value
        if len(self._recent) == _RECENT:
            keys = np.concatenate([self._keys, np.frombuffer(array("Q", self._recent), np.uint64)])
            values = np.concatenate([self._values, np.frombuffer(array("Q", self._recent.values()), np.uint64)])
            order = np.argsort(keys)
            self._keys, self._values, self._recent = keys[order], values[order], {}
        return None


class StreamCleaner:
    """The rules of :class:`opdlab.data.CleaningConfig` for rows that come one by one, and are not read again.

    The first row of a text stays, also if a later one has another gold, which is dropped as conflicting. A common
    phrase is one of the rows so far. 32 bytes are kept for each row that stays; a collision of 64 bits drops a row,
    which among n rows has the probability n^2 / 2^65.

    Args:
        config: rules to apply.
        benchmarks: texts of problems, by benchmark.
    """

    def __init__(self, config: CleaningConfig, benchmarks: Mapping[str, Iterable[str]]) -> None:
        self._config = config
        self._names = list(benchmarks) if config.decontaminate else []
        self._index = BenchmarkIndex(
            {name: benchmarks[name] for name in self._names}, config.ngram, config.overlap, config.boilerplate
        )
        self._texts, self._ids = SeenHashes(), SeenHashes()
        self._contaminated: dict[bytes, tuple[str, str]] = {}  # texts of benchmark problems
        self.counts: Counter[tuple[str, str]] = Counter()  # rows by what became of them, and the benchmark

    def kept(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Yield the problems that pass the rules."""
        for problem in problems:
            why = self._why_not(problem)
            self.counts["read", ""] += 1
            if why is None:
                yield problem
            else:
                self.counts[why] += 1

    def _why_not(self, problem: Problem) -> tuple[str, str] | None:
        digest, config = text_digest(problem), self._config
        text, gold, id_ = row_hashes(problem, digest)
        before = self._texts.add(text, gold)
        if before is not None and before != gold and config.drop_conflicting:
            return "conflicting", ""
        if before is not None and config.deduplicate:
            return "duplicate", ""
        if digest in self._contaminated:
            return self._contaminated[digest]
        # Once for each text, or the n-grams of one that is repeated would count as a common phrase.
        if self._names and before is None and (suspect := self._index.look_up(asked_text(problem))) is not None:
            benchmark = self._index.match(suspect)
            if benchmark is not None:
                self._contaminated[digest] = "by_ngrams" if suspect.exact is None else "exact", benchmark
                return self._contaminated[digest]
        if config.deduplicate and self._ids.add(id_, 0) is not None:
            return "same_id", ""
        return None

    def report(self, too_long: int, teacher_too_long: int) -> CleaningReport:
        """Return the report on the rows so far."""
        counts = self.counts
        return CleaningReport(
            counts["read", ""],
            counts["conflicting", ""],
            counts["duplicate", ""],
            {name: counts["exact", name] for name in self._names},
            {name: counts["by_ngrams", name] for name in self._names},
            too_long,
            counts["same_id", ""],
            teacher_too_long,
        )


class StreamedPrompts(Sequence[Prompt]):
    """Training prompts of a source without a length: windows of equally many prompts, one for each pass.

    The loader shuffles within the window of its pass, so a seeded order and an exact resume need no more than the
    number of the pass: the windows before it are read again. When the source ends, the window is filled from its
    beginning. The index of a prompt counts on from window to window.

    Args:
        source: with a ``window``.
        recipe: makes its prompts.
        cleaner: returns a new cleaner, at the source's beginning.

    Raises:
        UsageError: no prompt is left of the source.
    """

    def __init__(self, source: ProblemSource, recipe: Recipe, cleaner: Callable[[], StreamCleaner]) -> None:
        assert source.window is not None
        self._source, self._recipe, self._new_cleaner = source, recipe, cleaner
        self._size = source.window
        self._checks: list[Callable[[PromptFacts], None]] = []
        self._restart()
        self._size = len(self._prompts)  # of a source that ends before its first window is full

    def _restart(self) -> None:
        self._windows, self._number = self._read_windows(), -1
        self._before: list[Prompt] = []
        self._prompts: list[Prompt] = []
        self._next()

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Return prompts of this window or the one before."""
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number, place = divmod(index, self._size)
        if number == self._number:
            return self._prompts[place]
        if number == self._number - 1:
            return self._before[place]
        raise IndexError(f"prompt {index} is in another window of {self._source.name}")

    def of_pass(self, number: int) -> Sequence[Prompt]:
        """Return the prompts of a pass, and read the source up to there."""
        if number < self._number:
            self._restart()
        while self._number < number:
            self._next()
        return self._prompts

    def watch(self, check: Callable[[PromptFacts], None]) -> None:
        """Call a function, which raises a UsageError for prompts that cannot be used, for each later window."""
        self._checks.append(check)

    def _next(self) -> None:
        prompts = next(self._windows)
        self._number += 1
        first = self._number * self._size
        self._before, self._prompts = self._prompts, [replace(p, index=first + i) for i, p in enumerate(prompts)]
        self.facts = PromptFacts()
        for prompt in self._prompts:
            self.facts.look(prompt)
        for check in self._checks:
            check(self.facts)
        rank_zero_info(
            f"train: window {self._number + 1}, of {len(prompts)} prompts, of {self._source.name}, which is read as a "
            f"stream: {self.report}; of conflicting rows the first one stays"
        )

    def _read_windows(self) -> Iterator[list[Prompt]]:
        window: list[Prompt] = []
        while True:
            cleaner, too_long, found = self._new_cleaner(), Counter[str](), 0
            for prompt in self._recipe.prompts(cleaner.kept(self._source.problems())):
                if kind := self._recipe.too_long(prompt):
                    too_long[kind] += 1
                    continue
                window.append(prompt)
                found += 1
                if len(window) == self._size:
                    self.report = cleaner.report(too_long["prompt"], too_long["teacher"])
                    yield window
                    window = []
            self.report = cleaner.report(too_long["prompt"], too_long["teacher"])
            require(
                found > 0,
                f"no prompt is left of {self._source.name} ({self.report}): give another source, or raise "
                "data.max_prompt_tokens",
            )
            if self._number == -1:  # it ends before the first window is full
                yield window
                window = []


def streamed_prompts(
    source: ProblemSource,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
    config: CleaningConfig,
    benchmarks: Mapping[str, Sequence[str]],
) -> tuple[PromptSet, CleaningReport]:
    """Return the prompts of a source without a length, and the report on the rows of the first window.

    Args:
        source: with a ``window``.
        tokenizer: the student's.
        limits: ``max_prompt_tokens`` and ``max_teacher_prompt_tokens``.
        config: rules to apply.
        benchmarks: texts of problems, by benchmark.
    """
    prompts = StreamedPrompts(source, Recipe(source, tokenizer, *limits), lambda: StreamCleaner(config, benchmarks))
    report, unknown = prompts.report, UnknownTexts(tokenizer)
    for prompt in prompts.of_pass(0):
        look_for_unknown(prompt, unknown)
    num_too_long = report.too_long, report.teacher_too_long
    return PromptSet(prompts, num_too_long[0], source.verifier, num_too_long[1], unknown.found, prompts.facts), report
