"""Find training texts that are problems of a benchmark, exactly or nearly.

A benchmark that is part of the training data measures memorisation. :class:`BenchmarkIndex` defines the rule for texts
that are nearly equal.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# A word is one Chinese or Japanese character, or a maximal run of other letters and digits.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def normalized(text: str) -> str:
    r"""Return ``text`` with Unicode variants (NFKC), case and white space normalised.

    Example:
        >>> normalized("Find  $X$,\nif \uff38\uff1d\uff12.")
        'find $x$, if x=2.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def ngram_hashes(text: str, size: int) -> set[int]:
    r"""Return a hash of every run of ``size`` words of a normalised text; empty for a shorter text.

    Words are letters and digits, so texts that differ only in punctuation, such as ``$x$`` and ``\(x\)``, are equal.
    Python's hash has 64 bits: the probability of a collision between the 18,000 runs of four benchmarks and the 640,000
    of DAPO's prompts is below 1e-9.

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
    """Overlap of a training text with benchmarks.

    Args:
        num_ngrams: number of distinct n-grams of the text.
        shared: hashes of its n-grams that a benchmark problem also has.
        exact: the benchmark with the same text, or None.
    """

    num_ngrams: int
    shared: frozenset[int]
    exact: str | None


class BenchmarkIndex:
    """Finds training texts that are benchmark problems, exactly or by shared runs of words.

    A text is contaminated by a benchmark problem if the two are equal after normalisation, or if the runs of ``ngram``
    words that they share are at least ``overlap`` of the runs of the *shorter* one. The shorter one is used because
    a problem stays the same with a sentence added ("Give the answer as an integer.") or removed. A single shared run is
    no evidence: phrases such as "can be written as m/n, where m and n are relatively prime positive integers" are
    longer than 13 words. So a run that is in more than ``boilerplate`` training texts does not count; GPT-3 used this
    rule with the same number.

    Args:
        benchmarks: texts of problems, by benchmark; a text of two benchmarks counts for the first.
        ngram: words in a run.
        overlap: share of the shorter text's runs, 0 to 1; at 0 a single shared run is enough.
        boilerplate: a run in more training texts than this is a common phrase; None counts all runs.

    Reference:
        Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, appendix C.
    """

    def __init__(
        self,
        benchmarks: Mapping[str, Iterable[str]],
        ngram: int = 13,
        overlap: float = 0.3,
        boilerplate: int | None = 10,
    ) -> None:
        self._ngram, self._overlap, self._boilerplate = ngram, overlap, boilerplate
        self._texts: dict[str, str] = {}  # normalised text -> benchmark
        self._problems: list[tuple[str, int]] = []  # benchmark, number of n-grams
        self._by_ngram: dict[int, list[int]] = defaultdict(list)  # n-gram -> indices into _problems
        self._num_texts: Counter[int] = Counter()  # n-gram -> number of training texts that have it
        for benchmark, problems in benchmarks.items():
            for text in map(normalized, problems):
                self._texts.setdefault(text, benchmark)
                ngrams = ngram_hashes(text, self._ngram)
                for ngram in ngrams:
                    self._by_ngram[ngram].append(len(self._problems))
                self._problems.append((benchmark, len(ngrams)))

    def look_up(self, text: str) -> Suspect | None:
        """Return the overlap of a normalised training text with the benchmarks, or None; count its n-grams.

        Call it once per distinct text.
        """
        ngrams = ngram_hashes(text, self._ngram)
        shared = ngrams & self._by_ngram.keys()
        self._num_texts.update(shared)
        exact = self._texts.get(text)
        return Suspect(len(ngrams), frozenset(shared), exact) if shared or exact else None

    def match(self, suspect: Suspect) -> str | None:
        """Return the benchmark that a text is a problem of, or None for a clean text.

        Call it after all training texts were looked up, because only then are common phrases known.
        """
        if suspect.exact is not None:
            return suspect.exact
        limit = self._boilerplate
        telling = [ngram for ngram in suspect.shared if limit is None or self._num_texts[ngram] <= limit]
        num_shared = Counter(problem for ngram in telling for problem in self._by_ngram[ngram])
        for problem in sorted(num_shared):
            benchmark, num_ngrams = self._problems[problem]
            if num_shared[problem] >= self._overlap * min(suspect.num_ngrams, num_ngrams):
                return benchmark
        return None
