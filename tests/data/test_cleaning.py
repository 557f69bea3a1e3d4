"""Cleaning of training problems, against rules written out naively, and on real data if it is available."""

import json
import random
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opdlab.data import Benchmark, CleaningConfig, CleaningReport, DapoMath17k, JsonlProblems, Problem
from opdlab.data.cleaning import clean
from opdlab.data.overlap import BenchmarkIndex, ngram_hashes, normalized
from opdlab.errors import UsageError
from opdlab.toy import ChainProblems

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"
real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the benchmark files are not beside this checkout")
PAPER = ("aime24", "aime25", "math500", "amc23")


def rows(*pairs: tuple[str, str | None]) -> list[Problem]:
    return [Problem(str(i), text, gold) for i, (text, gold) in enumerate(pairs)]


def cleaned(problems: Iterable[Problem], **options: Any) -> tuple[str, CleaningReport]:
    benchmarks = options.pop("benchmarks", {})
    left, account = clean(problems, CleaningConfig(**options), benchmarks)
    return "".join(problem.id for problem in left), account


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


@pytest.mark.parametrize(
    ("one", "other"),
    [("Find $x$.", "find  $x$.\n"), ("x\u00b2", "x2"), ("\uff12\u3000+ 2", "2 + 2"), ("STRASSE", "Straße")],
)
def test_texts_that_are_the_same(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)
    assert cleaned(rows((one, "1"), (other, "1"))) == ("0", CleaningReport(2, duplicate=1))


@pytest.mark.parametrize(("one", "other"), [("a + b", "a - b"), ("1 12", "11 2"), ("x", "x."), ("$x_1$", "$x_{1}$")])
def test_texts_that_are_not_the_same(one: str, other: str) -> None:
    assert cleaned(rows((one, "1"), (other, "2")))[0] == "01"


def test_every_row_of_a_conflicting_text_goes_even_its_repeats() -> None:
    problems = rows(("a", "1"), ("b", "1"), ("A", "1"), ("a ", "2"), ("b", " 1 "), ("a", "1"), ("c", None), ("c", None))
    assert cleaned(problems) == ("16", CleaningReport(8, conflicting=4, duplicate=2))
    assert cleaned(problems, drop_conflicting=False) == ("016", CleaningReport(8, duplicate=5))
    assert cleaned(problems, deduplicate=False) == ("1467", CleaningReport(8, conflicting=4))
    assert cleaned(problems, deduplicate=False, drop_conflicting=False) == ("01234567", CleaningReport(8))


def test_a_gold_beside_none_is_a_conflict() -> None:
    assert cleaned(rows(("a", "1"), ("a", None)))[1].conflicting == 2


def test_exact_problems_of_a_benchmark() -> None:
    benchmarks = {"first": ["One?", "Two?"], "second": ["two?", "Three?"]}
    left, account = cleaned(rows(("one?", "1"), ("TWO?", "2"), ("three?", "3"), ("Four?", "4")), benchmarks=benchmarks)
    assert left == "3"
    assert account == CleaningReport(4, exact={"first": 2, "second": 1}, by_ngrams={"first": 0, "second": 0})
    assert account.contaminated == 3
    assert cleaned(rows(("one?", "1")), benchmarks=benchmarks, decontaminate=False) == ("0", CleaningReport(1))


def test_the_steps_come_in_the_order_that_is_stated() -> None:
    problems = rows(("one?", "1"), ("one?", "2"), ("two?", "1"), ("two?", "1"))
    account = cleaned(problems, benchmarks={"b": ["One?", "Two?"]})[1]
    assert (account.conflicting, account.duplicate, account.contaminated, account.kept) == (2, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "contaminated"),
    [
        (words(0, 30), True),
        (words(0, 30) + " give the answer as an integer", True),
        (words(100, 190) + " " + words(0, 30), True),  # the whole problem inside a long text
        (words(0, 14), True),  # a part of the problem: 2 of its own 2 runs
        (words(5, 18) + " " + words(100, 103), False),  # 1 of 4: below 0.3
        (words(5, 18) + " " + words(100, 102), True),  # 1 of 3
        (words(0, 12), False),  # shorter than a run, and not the same problem
        (words(100, 130), False),
        ("\\(w0\\): " + words(1, 29) + ", {W29}?", True),  # except for punctuation and case
    ],
)
def test_shared_runs_of_words(text: str, contaminated: bool) -> None:
    account = cleaned(rows((text, "1")), benchmarks={"b": [words(0, 30) + "."]})[1]
    assert account.by_ngrams == {"b": int(contaminated)}
    assert account.exact == {"b": 0}


def test_common_phrases_prove_nothing() -> None:
    phrase = words(0, 15)  # three runs
    texts = [f"{phrase} x{i}" for i in range(11)]
    benchmarks = {"b": [f"{phrase} y1 y2"]}
    assert cleaned(rows(*((t, "1") for t in texts[:10])), benchmarks=benchmarks)[1].contaminated == 10
    assert cleaned(rows(*((t, "1") for t in texts)), benchmarks=benchmarks)[1].contaminated == 0
    assert cleaned(rows(*((t, "1") for t in texts)), benchmarks=benchmarks, boilerplate=None)[1].contaminated == 11
    # Repeats do not make a phrase.
    assert cleaned(rows(*((texts[0], "1") for _ in range(20))), benchmarks=benchmarks)[1].contaminated == 1
    account = cleaned(rows(*((texts[0], "1") for _ in range(20))), benchmarks=benchmarks, deduplicate=False)[1]
    assert account.contaminated == 20


def test_chinese_has_a_word_a_character() -> None:
    problem = "甲乙两人从相距四十五公里的两地同时出发,相向而行"
    account = cleaned(rows((problem + "。求时间。", "1")), benchmarks={"b": [problem]})[1]
    assert account.by_ngrams == {"b": 1}


def naive_contaminated(texts: Sequence[str], benchmark: Sequence[str], config: CleaningConfig) -> list[bool]:
    """The rule as its words say it, with strings and loops."""

    def runs(text: str) -> set[tuple[str, ...]]:
        split = text.split()
        return {tuple(split[i : i + config.ngram]) for i in range(len(split) - config.ngram + 1)}

    counts = Counter(run for text in set(texts) for run in runs(text))
    verdicts = []
    for text in texts:
        own = {run for run in runs(text) if config.boilerplate is None or counts[run] <= config.boilerplate}
        shares = [
            len(own & runs(problem)) / max(1, min(len(runs(text)), len(runs(problem)))) if own & runs(problem) else -1
            for problem in benchmark
        ]
        verdicts.append(text in benchmark or max(shares) >= config.overlap)
    return verdicts


@pytest.mark.parametrize("seed", range(5))
def test_against_the_rule_written_out(seed: int) -> None:
    rng = random.Random(seed)
    config = CleaningConfig(ngram=3, overlap=rng.choice([0.0, 0.25, 0.5, 1.0]), boilerplate=rng.choice([None, 1, 4]))
    texts = [" ".join(rng.choices("abcd", k=rng.randrange(1, 9))) for _ in range(200)]
    benchmark = [" ".join(rng.choices("abcd", k=rng.randrange(2, 12))) for _ in range(6)] + texts[:1]
    unique = list(dict.fromkeys(texts))
    left, account = clean(rows(*((text, "1") for text in texts)), config, {"b": benchmark})
    expected = naive_contaminated(unique, benchmark, config)
    assert [p.text for p in left] == [text for text, bad in zip(unique, expected, strict=True) if not bad]
    assert 0 < account.contaminated == sum(expected) < len(unique)
    assert account.exact["b"] == len(set(unique) & set(benchmark))
    assert account.duplicate == len(texts) - len(unique)
    assert account.kept == len(left)


def test_rejected_rows_are_not_held() -> None:
    """Repeats can be many times the rest: DAPO's release has each prompt a hundred times."""
    alive: list[weakref.ref[Problem]] = []

    def repeating() -> Iterable[Problem]:
        for i in range(2_000):
            problem = Problem(str(i), f"text {i % 3}", "1")
            alive.append(weakref.ref(problem))
            yield problem
            assert i % 500 or sum(ref() is not None for ref in alive) <= 4

    assert cleaned(repeating())[1] == CleaningReport(2_000, duplicate=1_997)


@pytest.mark.parametrize(("key", "value"), [("ngram", 0), ("overlap", -0.1), ("overlap", 1.5), ("boilerplate", 0)])
def test_bad_values(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{key} is {value}, but must be"):
        CleaningConfig(**{key: value})  # type: ignore[arg-type]


def test_the_quickstart_keeps_every_problem() -> None:
    train, held_out = ChainProblems(2048), ChainProblems(64, "held_out")
    started = time.perf_counter()
    left, account = clean(train.problems(), CleaningConfig(), {"toy": [p.text for p in held_out.problems()]})
    assert time.perf_counter() - started < 20
    assert list(left) == train.problems()
    assert (account.read, account.kept) == (2048, 2048)


def paper_benchmarks() -> dict[str, list[str]]:
    return {name: [p.text for p in Benchmark(name, str(REAL_DATA / f"{name}.jsonl")).problems()] for name in PAPER}


@real_data
def test_dapo_against_the_papers_benchmarks() -> None:
    path = REAL_DATA / "dapo_math_17k.jsonl"
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    left, account = clean(DapoMath17k(str(path)).problems(), CleaningConfig(), paper_benchmarks())
    assert account == CleaningReport(
        17255,
        duplicate=70,
        exact={"aime24": 0, "aime25": 0, "math500": 4, "amc23": 5},
        by_ngrams={"aime24": 0, "aime25": 0, "math500": 26, "amc23": 29},
    )
    assert len(left) == account.kept == 17121
    # The file marks overlaps by another rule. The AIME ones were read, and are phrases only; all others must go.
    kept = {problem.id for problem in left}
    marked = {row["id"]: row["overlap"] for row in read if row.get("overlap")}
    assert len(marked) == 65
    assert {name.split("/")[0] for key, name in marked.items() if key in kept} == {"13gram:aime24", "13gram:aime25"}
    assert sum(key in kept for key in marked) == 5


@real_data
def test_dapos_conflicts() -> None:
    """The file has one row for each of them, with the golds that the release gave; here they are rows again."""
    path = REAL_DATA / "dapo_math_17k.jsonl"
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    release = [
        Problem(row["id"], row["problem"], gold)
        for row in read
        for gold in row.get("conflicting_answers", [row["answer"]])
    ]
    left, account = clean(release, CleaningConfig(), {})
    conflicts = {normalized(row["problem"]) for row in read if "conflicting_answers" in row}
    assert len(conflicts) == 12
    assert account.conflicting >= 24
    assert conflicts.isdisjoint(normalized(problem.text) for problem in left)
    plain = clean(JsonlProblems(str(path)).problems(), CleaningConfig(), {})[0]
    assert len(plain) - len(left) == 12


def test_ngrams_of_short_texts() -> None:
    assert ngram_hashes(words(0, 12), 13) == set()
    assert len(ngram_hashes(words(0, 13), 13)) == 1
    index = BenchmarkIndex({"b": [words(0, 5)]})
    assert index.look_up(words(0, 4)) is None
    assert index.look_up(words(0, 5)) is not None
