"""Repeats and conflicts found from hashes, against the rule written out with whole texts, also where hashes collide."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opdlab.data import CleaningConfig, CleaningReport, DapoMath17k, JsonlProblems, Problem, repeats
from opdlab.data.cleaning import clean
from opdlab.data.overlap import BenchmarkIndex, normalized
from opdlab.data.stores import ListStore, ProblemStore
from opdlab.types import Message

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def naive_clean(
    problems: Iterable[Problem], config: CleaningConfig, benchmarks: dict[str, list[str]]
) -> tuple[list[Problem], CleaningReport]:
    """The rules as their words say them, with all texts in memory."""
    read = list(problems)
    turns = [problem.messages or (Message("user", problem.text),) for problem in read]
    texts = [tuple(normalized(part) for turn in each for part in turn) for each in turns]
    golds = [None if problem.answer is None else normalized(problem.answer) for problem in read]
    golds_of = {text: {gold for other, gold in zip(texts, golds, strict=True) if other == text} for text in texts}
    conflicts = [config.drop_conflicting and len(golds_of[text]) > 1 for text in texts]
    first = [texts.index(text) for text in texts]
    compared = benchmarks if config.decontaminate else {}
    index = BenchmarkIndex(compared, config.ngram, config.overlap, config.boilerplate)
    asked = [normalized(" ".join(turn.content for turn in each if turn.role == "user")) for each in turns]
    suspects = [index.look_up(asked[row]) if row == first[row] else None for row in range(len(read))]
    kept: list[Problem] = []
    counts = {"duplicate": 0, "same_id": 0}
    exact, by_ngrams = dict.fromkeys(compared, 0), dict.fromkeys(compared, 0)
    for row, problem in enumerate(read):
        suspect = suspects[first[row]]
        benchmark = None if suspect is None else index.match(suspect)
        if conflicts[row]:
            continue
        if config.deduplicate and row != first[row]:
            counts["duplicate"] += 1
        elif suspect is not None and benchmark is not None:
            (by_ngrams if suspect.exact is None else exact)[benchmark] += 1
        elif config.deduplicate and problem.id in {other.id for other in kept}:
            counts["same_id"] += 1
        else:
            kept.append(problem)
    return kept, CleaningReport(len(read), sum(conflicts), exact=exact, by_ngrams=by_ngrams, **counts)


def some_problems(rng: random.Random, count: int) -> list[Problem]:
    """Texts, golds and ids that often repeat, with variants of white space and case, chats among them."""

    def one() -> Problem:
        text = " ".join(rng.choices("abcd", k=rng.randrange(1, 6)))
        text = rng.choice([text, text.upper(), f" {text}", text.replace(" ", "  ")])
        system = (Message("system", rng.choice("xy")), Message("user", text)) if rng.random() < 0.2 else ()
        return Problem(str(rng.randrange(2 * count)), text, rng.choice(["1", " 1", "2", None, ""]), system)

    return [one() for _ in range(count)]


@pytest.mark.parametrize("bits", [64, 8])
@pytest.mark.parametrize("seed", range(12))
def test_against_the_rules_written_out(monkeypatch: pytest.MonkeyPatch, seed: int, bits: int) -> None:
    monkeypatch.setattr(repeats, "HASH_BYTES", bits // 8)  # with 8 bits many different texts have one hash
    rng = random.Random(seed)
    first, second, third = (rng.random() < 0.7 for _ in range(3))
    config = CleaningConfig(first, second, third, 2, rng.choice([0.0, 0.5, 1.0]), rng.choice([None, 1, 5]))
    problems = some_problems(rng, rng.choice([0, 1, 30, 300]))
    benchmarks = {name: [" ".join(rng.choices("abcd", k=4)) for _ in range(3)] for name in ("one", "two")}
    left, report = clean(problems, config, benchmarks)
    assert (list(left), report) == naive_clean(problems, config, benchmarks)


class Counting(ListStore):
    """Counts the problems that are read again."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.keys: list[int] = []

    def read(self, keys: Any) -> list[Problem]:
        self.keys += keys
        return super().read(keys)


def test_only_conflicts_and_repeated_ids_are_read_again() -> None:
    plain = [Problem(str(n), f"text {n % 50}", f"{n % 50}") for n in range(200)]
    store = Counting([*plain, Problem("200", "text 7", "8"), Problem("3", "another text", "9")])
    left, report = clean(store, CleaningConfig(), {})
    assert set(store.keys) == {7, 57, 107, 157, 200, 3, 201}
    assert report == CleaningReport(202, conflicting=5, duplicate=147, same_id=1)
    assert [problem.id for problem in left] == [str(n) for n in range(50) if n != 7]


def stored_as(kind: str, folder: Path, problems: list[Problem]) -> ProblemStore | Iterable[Problem]:
    if kind == "list":
        return problems
    if kind == "generator":
        return (problem for problem in problems)
    rows = [{"id": each.id, "problem": each.text, "answer": each.answer} for each in problems]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return JsonlProblems(str(folder / "rows.jsonl")).store()


@pytest.mark.parametrize("kind", ["list", "generator", "file"])
def test_problems_are_the_same_from_every_kind_of_source(tmp_path: Path, kind: str) -> None:
    rng = random.Random(5)
    problems = [Problem(str(n), f"{rng.randrange(900)} é", str(rng.randrange(2))) for n in range(3000)]
    left, report = clean(stored_as(kind, tmp_path, problems), CleaningConfig(), {})
    expected, _ = clean(problems, CleaningConfig(), {})
    assert 0 < len(left) == report.kept < 900
    assert list(left) == list(expected)
    order = random.Random(1).sample(range(len(left)), len(left))
    assert [left[n] for n in order] == [expected[n] for n in order]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize("name", ["gsm8k_train", "math_train", "dapo_math_17k", "math500"])
def test_real_files_lose_the_rows_that_they_should(name: str) -> None:
    path = REAL_DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this checkout")
    make: Callable[[str], Any] = DapoMath17k if name.startswith("dapo") else JsonlProblems
    source = make(str(path))
    texts = [problem.text for problem in JsonlProblems(str(REAL_DATA / "math500.jsonl"), limit=100).problems()]
    left, report = clean(source.store(), CleaningConfig(), {"math500": texts})

    seen: dict[str, set[str | None]] = {}
    for problem in source.problems():
        seen.setdefault(normalized(problem.text), set()).add(normalized(problem.answer))
    assert report.conflicting + report.duplicate >= report.read - len(seen)
    assert len({normalized(problem.text) for problem in left}) == len(left) == report.kept
    assert all(len(seen[normalized(problem.text)]) == 1 for problem in left)


def test_a_store_of_an_iterator_reads_it_once() -> None:
    read: list[int] = []

    def problems() -> Iterator[Problem]:
        for n in range(10):
            read.append(n)
            yield Problem(str(n), f"text {n}", "1")

    left, _ = clean(problems(), CleaningConfig(), {})
    assert [left[9].id, left[0].id, left[9].id] == ["9", "0", "9"]
    assert read == list(range(10))
