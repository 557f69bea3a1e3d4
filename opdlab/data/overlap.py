"""Training texts that are problems of a benchmark, word for word or nearly.

A benchmark that was trained on measures memory. Finding it takes a rule for texts that are not quite equal; see
:class:`BenchmarkIndex`.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# A Chinese or Japanese character is a word of its own; elsewhere, letters and digits up to the next other character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def normalized(text: str) -> str:
    r"""Return ``text`` without what does not tell problems apart: Unicode variants (NFKC), case, amount of white space.

    Example:
        >>> normalized("Find  $X$,\nif \uff38\uff1d\uff12.")
        'find $x$, if x=2.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def ngram_hashes(text: str, size: int) -> set[int]:
    r"""Hash every run of ``size`` words of a normalised text; none where the text is shorter.

    Words are letters and digits: ``\frac{1}{2}``, ``\tfrac12`` and ``$x$`` against ``\(x\)`` differ in punctuation
    alone. Python's own hash has 64 bits: that two of the 18,000 runs of four benchmarks and the 640,000 of DAPO's
    prompts meet by accident has a chance below 1e-9.

    Example:
        >>> len(ngram_hashes("Let $x = 1$ and $y = 2$.", 3)), ngram_hashes("Let x be 1.", 5)
        (4, set())
        >>> ngram_hashes("$x = 1$, $y$", 3) == ngram_hashes(r"\(x=1\) y", 3)
        True
    """
    words = _WORD.findall(text)
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


@dataclass(frozen=True)
class Suspect:
    """What a training text shares with benchmarks.

    Args:
        num_ngrams: different n-grams of the text.
        shared: hashes of those that a benchmark problem has too.
        exact: the benchmark that holds the very text, or None.
    """

    num_ngrams: int
    shared: frozenset[int]
    exact: str | None


@dataclass(frozen=True)
class Contamination:
    """What a training text was found to be.

    Args:
        benchmark: the one whose problem it is.
        exact: whether word for word, or by shared n-grams.
    """

    benchmark: str
    exact: bool


@dataclass
class BenchmarkIndex:
    """Finds training texts that are benchmark problems, exactly or by shared runs of words.

    A text is contaminated by a benchmark problem where the two are equal once normalised, or where the runs of
    ``ngram`` words that they share are at least ``overlap`` of the runs of the *shorter* one. Of the shorter, because a
    problem is as well known with a sentence added ("Give the answer as an integer.") or left out. A single shared run
    proves nothing: phrases such as "can be written as m/n, where m and n are relatively prime positive integers" are
    longer than 13 words. So a run that is found in more than ``boilerplate`` training texts does not count, a rule
    that GPT-3 used with the same figure.

    Args:
        ngram: words in a run.
        overlap: share of the shorter text's runs, 0 to 1; at 0 a single shared run is enough.
        boilerplate: training texts with the same run, beyond which it is a common phrase; None to count all runs.

    Reference:
        Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C.
    """

    ngram: int = 13
    overlap: float = 0.3
    boilerplate: int | None = 10
    benchmarks: list[str] = field(default_factory=list, init=False)
    _texts: dict[str, str] = field(default_factory=dict, init=False)  # normalised text -> benchmark
    _problems: list[tuple[str, int]] = field(default_factory=list, init=False)  # benchmark, number of n-grams
    _by_ngram: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list), init=False)  # -> _problems
    _num_texts: Counter[int] = field(default_factory=Counter, init=False)  # n-gram -> training texts that have it

    def add(self, benchmarks: Mapping[str, Iterable[str]]) -> None:
        """Take in the problems of benchmarks, by name."""
        for benchmark, problems in benchmarks.items():
            self.benchmarks.append(benchmark)
            for text in map(normalized, problems):
                self._texts.setdefault(text, benchmark)
                ngrams = ngram_hashes(text, self.ngram)
                for ngram in ngrams:
                    self._by_ngram[ngram].append(len(self._problems))
                self._problems.append((benchmark, len(ngrams)))

    def look_up(self, text: str) -> Suspect | None:
        """Return what a normalised training text shares with the benchmarks, and count its n-grams; None for nothing.

        Call it once for each different text.
        """
        ngrams = ngram_hashes(text, self.ngram)
        shared = ngrams & self._by_ngram.keys()
        self._num_texts.update(shared)
        exact = self._texts.get(text)
        return Suspect(len(ngrams), frozenset(shared), exact) if shared or exact else None

    def verdict(self, suspect: Suspect) -> Contamination | None:
        """Say what a text was found to be; None for a clean one.

        Call it once all training texts were looked up, since only then are common phrases known.
        """
        if suspect.exact is not None:
            return Contamination(suspect.exact, exact=True)
        limit = self.boilerplate
        telling = [ngram for ngram in suspect.shared if limit is None or self._num_texts[ngram] <= limit]
        num_shared = Counter(problem for ngram in telling for problem in self._by_ngram[ngram])
        for problem in sorted(num_shared):
            benchmark, num_ngrams = self._problems[problem]
            if num_shared[problem] >= self.overlap * min(suspect.num_ngrams, num_ngrams):
                return Contamination(benchmark, exact=False)
        return None
