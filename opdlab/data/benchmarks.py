"""Named sets of mathematical problems: the benchmarks that papers report, and DAPO's training prompts."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from opdlab.data.jsonl import JsonlProblems
from opdlab.data.prompts import ProblemSource
from opdlab.data.rows import RowProblems
from opdlab.data.stores import ChangedStore, ProblemStore
from opdlab.data.table_problems import TableProblems
from opdlab.data.templates import REASONING_SUFFIX, RawTemplate, Template
from opdlab.errors import require
from opdlab.files import expanded
from opdlab.registry import suggestion
from opdlab.types import Problem
from opdlab.verifiers.math.math_verifier import MathVerifier
from opdlab.verifiers.verifier import Verifier


def _integer(answer: str) -> str:
    r"""Return ``25``, ``27`` and ``336`` for ``025``, ``27.0`` and ``336^\circ``; other answers unchanged."""
    match = re.fullmatch(r"0*(\d+)(?:\.0+)?(?:\^\{?\\circ\}?)?", answer.strip())
    return match[1] if match else answer.strip()


def _after_hashes(answer: str) -> str:
    """Return the answer after ``####`` in a GSM8K solution, without commas."""
    return answer.rpartition("####")[2].replace(",", "").strip()


@dataclass(frozen=True)
class _Published:
    """Location of a set on the hub, its field names, and the changes to their text."""

    hub_id: str
    split: str
    subset: str | None = None
    problem_field: str = "problem"
    answer_field: str = "answer"
    id_field: str = "id"
    answer: Callable[[str], str] = str.strip
    prefix: str = ""  # removed from the problem
    suffix: str = ""  # removed from the problem

    def cleaned(self, problem: Problem) -> Problem:
        text = problem.text.strip().removeprefix(self.prefix.strip()).removesuffix(self.suffix.strip()).strip()
        return replace(problem, text=text, answer=None if problem.answer is None else self.answer(problem.answer))


_BENCHMARKS = {
    "aime24": _Published("HuggingFaceH4/aime_2024", "train", answer=_integer),
    "aime25": _Published("math-ai/aime25", "test", answer=_integer),
    "amc23": _Published("math-ai/amc23", "test", problem_field="question", answer=_integer),
    "gsm8k": _Published("openai/gsm8k", "test", subset="main", problem_field="question", answer=_after_hashes),
    "math500": _Published("HuggingFaceH4/MATH-500", "test", id_field="unique_id"),
}
_DAPO = _Published(
    "open-r1/DAPO-Math-17k-Processed",
    "train",
    subset="all",
    problem_field="prompt",
    answer_field="solution",
    # Prefix and suffix of the original release; processed sets may lack them.
    prefix="Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
    suffix='Remember to put your answer on its own line after "Answer:".',
)

# All presets without their own verifier share one set of worker processes.
_shared_verifier = functools.cache(MathVerifier)


class PublishedProblems(ProblemSource):
    r"""Problems of a published set, from the hub or from a local copy.

    Args:
        path: read this instead of the hub: a JSON Lines file with the fields ``id``, ``problem`` and ``answer``, or a
            folder with a copy of the hub's data set.
        revision: branch, tag or commit on the hub.
        template: turns a problem into a prompt; by default plain text, a new line and "Please reason step by step, and
            put your final answer within \boxed{}."
        verifier: checks answers; by default a :class:`opdlab.verifiers.MathVerifier` that all presets share.
        limit: use at most this many problems.
        offset: skip this many problems first.

    Raises:
        UsageError: both ``path`` and ``revision`` are given; on reading, the file or the hub cannot be read.
    """

    _published: _Published

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        template: Template | None = None,
        verifier: Verifier | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> None:
        require(
            path is None or revision is None,
            f"revision is '{revision}', but path is '{path}': a local copy has no revisions, so leave one of them out",
        )
        known = self._published
        self._rows: RowProblems
        if path is not None and not expanded(path, "path").is_dir():
            self._rows = JsonlProblems(path, limit=limit, offset=offset)
        else:
            self._rows = TableProblems(
                known.hub_id if path is None else path,
                known.subset,
                known.split,
                revision,
                problem_field=known.problem_field,
                answer_field=known.answer_field,
                id_field=known.id_field,
                limit=limit,
                offset=offset,
            )
        super().__init__(template, verifier or _shared_verifier())
        self.problem_field = self._rows.problem_field

    @property
    def demonstration_field(self) -> str | None:
        """Return the field that holds the given response, which the rows are read with."""
        return self._rows.demonstration_field

    @demonstration_field.setter
    def demonstration_field(self, name: str | None) -> None:
        self._rows.demonstration_field = name

    def default_template(self) -> Template:
        """Return plain text with the usual request to reason step by step."""
        return RawTemplate(suffix=REASONING_SUFFIX)

    def problems(self) -> Iterator[Problem]:
        """Yield the problems without the prefix and suffix of the published set."""
        return map(self._published.cleaned, self._rows.problems())

    def places(self) -> Iterator[tuple[str, Problem]]:
        """See :meth:`ProblemSource.places`."""
        return ((place, self._published.cleaned(problem)) for place, problem in self._rows.places())

    def store(self) -> ProblemStore:
        """See :meth:`ProblemSource.store`."""
        return ChangedStore(self._rows.store(), self._published.cleaned)

    @property
    def name(self) -> str:
        """Return the file, or the data set and its split."""
        return self._rows.name


class Benchmark(PublishedProblems):
    r"""Problems of a named benchmark.

    ========= ======== ===================================== =========================================
    name      problems hub id, split                         done to answers
    ========= ======== ===================================== =========================================
    aime24    30       ``HuggingFaceH4/aime_2024``, train    ``025`` becomes ``25``
    aime25    30       ``math-ai/aime25``, test              ``336^\circ`` becomes ``336``
    amc23     40       ``math-ai/amc23``, test               ``27.0`` becomes ``27``
    gsm8k     1319     ``openai/gsm8k`` (main), test         text after ``####``, without commas
    math500   500      ``HuggingFaceH4/MATH-500``, test
    ========= ======== ===================================== =========================================

    Args:
        name: see the table.
        path: local copy, read instead of the hub; see :class:`PublishedProblems`.
        kwargs: see :class:`PublishedProblems`.

    Raises:
        UsageError: the name is unknown; on reading, the file or the hub cannot be read.

    Example:
        >>> Benchmark("aime24").name
        'HuggingFaceH4/aime_2024 (train)'
        >>> Benchmark("math50")
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: unknown benchmark 'math50'; did you mean 'math500'? Known: aime24, aime25, amc23, ...
    """

    def __init__(self, name: str, path: str | None = None, **kwargs: Any) -> None:
        require(
            name in _BENCHMARKS,
            f"unknown benchmark '{name}'{suggestion(name, _BENCHMARKS) or ';'} Known: {', '.join(_BENCHMARKS)}",
        )
        self._published = _BENCHMARKS[name]
        super().__init__(path, **kwargs)


class DapoMath17k(PublishedProblems):
    r"""Prompts of DAPO-Math-17k, in English and Chinese, with integer answers.

    The released set repeats its 17,398 prompts a hundred times; the hub's processed copy
    (``open-r1/DAPO-Math-17k-Processed``, subset ``all``) has each once. The instructions that DAPO puts around a
    problem are removed. :class:`opdlab.data.CleaningConfig` removes its overlap with benchmarks.
    The options are those of :class:`PublishedProblems`.

    Raises:
        UsageError: on reading, the file or the hub cannot be read.

    Reference:
        Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476.
    """

    _published = _DAPO
