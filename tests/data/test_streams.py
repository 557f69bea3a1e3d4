"""Sources that are read while training goes on: windows, cleaning row by row, and an exact resume."""

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opdlab.data import CleaningConfig, CleaningReport, Problem, ProblemSource, TableProblems, streams
from opdlab.data.streams import SeenHashes, StreamCleaner, streamed_prompts
from opdlab.errors import UsageError
from opdlab.toy import ChainProblems, chain_tokenizer
from opdlab.types import Prompt
from tests.toy_run import Run


class Stream(ProblemSource):
    """Problems that come one by one; counts them."""

    name = "the stream"

    def __init__(self, problems: Sequence[Problem], window: int, **options: Any) -> None:
        super().__init__(**options)
        self._problems, self.window, self.num_read = problems, window, 0

    def problems(self) -> Iterator[Problem]:
        for problem in self._problems:
            self.num_read += 1
            yield problem


def numbered(*texts: str, answer: str = "1") -> list[Problem]:
    return [Problem(str(n), text, answer) for n, text in enumerate(texts)]


def windows(source: Stream, limit: int = 9, **options: Any) -> Any:
    found, _ = streamed_prompts(source, chain_tokenizer(), (limit, limit), CleaningConfig(), options)
    return found.prompts


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.problem.text for prompt in prompts]


@pytest.mark.parametrize("recent", [4, 65_536])
def test_hashes_are_found_again(monkeypatch: pytest.MonkeyPatch, recent: int) -> None:
    monkeypatch.setattr(streams, "_RECENT", recent)
    rng, seen, expected = random.Random(0), SeenHashes(), dict[int, int]()
    for _ in range(300):
        key, value = rng.randrange(100) * (2**64 // 100), rng.randrange(2**64)
        before = expected.get(key)
        assert seen.add(key, value) == before
        expected.setdefault(key, value)


def test_the_first_of_conflicting_rows_stays() -> None:
    problems = [
        *(Problem("1", "a", "1"), Problem("2", "A ", "2"), Problem("3", "a", "1"), Problem("1", "b", "1")),
        *(Problem("5", "seven?", "7"), Problem("6", "c", None)),
    ]
    cleaner = StreamCleaner(CleaningConfig(), {"sevens": ["Seven?"]})
    assert [problem.id for problem in cleaner.kept(problems)] == ["1", "6"]
    report = CleaningReport(6, 1, 1, {"sevens": 1}, {"sevens": 0}, same_id=1)
    assert cleaner.report(0, 0) == report
    every = StreamCleaner(CleaningConfig(False, False, False), {"sevens": ["Seven?"]})
    assert list(every.kept(problems)) == problems


def test_repeats_of_a_benchmark_problem_are_no_common_phrase() -> None:
    """It has a word more, so that only its runs of words are those of the benchmark."""
    asked = " ".join(f"word{number}" for number in range(30))
    problems = [Problem(str(number), f"{asked} more", "1") for number in range(30)]
    cleaner = StreamCleaner(CleaningConfig(deduplicate=False), {"b": [asked]})
    assert list(cleaner.kept(problems)) == []
    assert cleaner.report(0, 0).by_ngrams == {"b": 30}


def test_windows_follow_each_other_and_the_source_begins_again() -> None:
    source = Stream(numbered("1", "2", "3", "1", "12345678901", "4", "5"), window=2)
    prompts = windows(source)
    assert (len(prompts), texts(prompts.of_pass(0))) == (2, ["1", "2"])
    expected = [["1", "2"], ["3", "4"], ["5", "1"], ["2", "3"]]
    assert [texts(prompts.of_pass(number)) for number in range(4)] == expected
    assert [prompt.index for prompt in prompts.of_pass(3)] == [6, 7]
    assert [prompts[index].problem.text for index in (4, 7)] == ["5", "3"]  # of this window and the one before
    with pytest.raises(IndexError):
        prompts[3]
    assert texts(prompts.of_pass(1)) == ["3", "4"]
    assert texts(windows(source).of_pass(3)) == ["2", "3"]


def test_unknown_characters_of_the_first_window_are_found() -> None:
    source = Stream(numbered("1", "\N{SNOWMAN}", "2"), window=2)
    found, _ = streamed_prompts(source, chain_tokenizer(), (9, 9), CleaningConfig(), {})
    (unknown,) = found.unknown
    assert (unknown.kind, unknown.count, unknown.problem.id) == ("prompts", 1, "1")


def test_a_short_source_is_one_window() -> None:
    prompts = windows(Stream(numbered("1", "2", "3"), window=100))
    assert len(prompts) == 3
    assert texts(prompts.of_pass(5)) == ["1", "2", "3"]


def test_nothing_left() -> None:
    with pytest.raises(UsageError, match=r"no prompt is left of the stream \(1 read, .* 1 too long, 0 kept\)"):
        windows(Stream(numbered("12345678901"), window=2))


def test_only_streams_of_the_hub_without_limit_have_a_window(tmp_path: Path) -> None:
    assert TableProblems("someone/huge", streaming=True).window == 10_000
    assert TableProblems("someone/huge", streaming=True, window=7).window == 7
    assert TableProblems("someone/huge", streaming=True, limit=5).window is None
    assert TableProblems("someone/huge").window is None
    assert TableProblems(str(tmp_path), streaming=True).window is None
    with pytest.raises(UsageError, match="window is 0"):
        TableProblems("someone/huge", streaming=True, window=0)


def test_a_run_goes_on_exactly_in_a_later_window(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    problems = ChainProblems(40).problems()

    def run(folder: str) -> Run:
        source = Stream([*problems, *problems[:3]], window=8, verifier=ChainProblems(1).verifier)
        return Run(tmp_path / folder, max_new_tokens=12, data={"train": source})

    whole, first, second = run("whole"), run("first"), run("second")
    with caplog.at_level(logging.INFO):
        whole.fit(11)
    said = [record.getMessage() for record in caplog.records if "window" in record.getMessage()]
    assert said[0].startswith(
        "train: window 1, of 8 prompts, of the stream, which is read as a stream: 43 read, 0 conf"
    )
    assert said[0].endswith("of conflicting rows the first one stays")
    assert len(said) == 3
    trainer = first.fit(6)
    trainer.save_checkpoint(tmp_path / "inside.ckpt", weights_only=False)
    second.fit(11, ckpt_path=tmp_path / "inside.ckpt")
    assert [whole.recorder.steps[step]["train/loss"] for step in range(7, 12)] == second.recorder.losses
    for name, value in whole.module.student.state_dict().items():
        assert torch.equal(value, second.module.student.state_dict()[name])


def test_later_windows_are_checked(tmp_path: Path) -> None:
    good, bad = ChainProblems(8).problems(), ChainProblems(4, seed=3).problems()
    named = [Problem(f"x{n}", each.text, each.answer, teacher="nobody") for n, each in enumerate(bad)]
    source = Stream([*good, *named], window=8, verifier=ChainProblems(1).verifier)
    with pytest.raises(UsageError, match="row 9 of the stream, the problem 'x0' names the teacher 'nobody'"):
        Run(tmp_path, max_new_tokens=12, data={"train": source}).fit(6)
