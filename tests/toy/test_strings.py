"""The string programs: their operations, their splits and their tokenizer."""

import itertools
import random
from collections import Counter

import pytest

from opdlab.toy import StringProblem, StringProblems, string_problems, string_tokenizer
from opdlab.toy.task import Split
from opdlab.verifiers import BoxedVerifier

SPLITS: tuple[Split, ...] = ("sft", "train", "held_out")
# Where each letter of the result comes from.
SOURCES = {"<": [1, 2, 3, 4, 5, 6, 7, 8, 0], ">": [8, 0, 1, 2, 3, 4, 5, 6, 7], "~": [1, 0, 3, 2, 5, 4, 7, 6, 8]}


def take(split: Split, seed: int, count: int = 200) -> list[StringProblem]:
    return list(itertools.islice(string_problems(split, seed), count))


def operate(value: str, operation: str) -> str:
    if operation == "^":
        return "".join(chr((ord(letter) - 96) % 8 + 97) for letter in value)
    return "".join(value[source] for source in SOURCES[operation])


def wrong_results(problem: StringProblem, trace: str) -> int:
    """Check a trace's form and chaining, and count the lines whose result is not what the operation makes."""
    *lines, last = trace.split("\n")
    value, *operations = problem.prompt.split()
    assert len(lines) == len(operations) == 17
    wrong = 0
    for label, line, operation in zip("ABCDEFGHIJKLMNOPQ", lines, operations, strict=True):
        echoed, result = line.split(": ")
        assert echoed == operation
        assert echoed[0] == label
        wrong += operate(value, operation[1]) != result
        value = result
    assert last == f"\\boxed{{{value}}}"
    return wrong


@pytest.mark.parametrize("split", SPLITS)
def test_traces_are_exact(split: Split) -> None:
    for problem in take(split, seed=3):
        trace = problem.trace()
        assert wrong_results(problem, trace) == 0
        assert trace.endswith(f"\\boxed{{{problem.answer}}}")
        assert BoxedVerifier(at_end=True).verify([trace], [problem.answer])[0].correct


def test_faulty_traces_have_the_asked_rate_of_errors() -> None:
    rng = random.Random(0)
    wrong = sum(wrong_results(problem, problem.trace(0.2, rng)) for problem in take("sft", 0, 500))
    # A replaced letter is right by chance once in eight. 8500 lines: a standard deviation of 0.004.
    assert wrong / (500 * 17) == pytest.approx(0.2 * 7 / 8, abs=0.015)


def test_all_operations_and_letters_occur_equally_often() -> None:
    problems = take("train", 0)
    operations = Counter(itertools.chain.from_iterable(problem.operations for problem in problems))
    letters = Counter(itertools.chain.from_iterable(problem.start for problem in problems))
    assert len(operations) == 4
    assert max(operations.values()) < 1.15 * min(operations.values())
    assert len(letters) == 8
    assert max(letters.values()) < 1.5 * min(letters.values())


def test_splits_are_disjoint() -> None:
    prompts = {split: {p.prompt for seed in (0, 1) for p in take(split, seed)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert prompts[one].isdisjoint(prompts[other])
    assert all(len(each) == 400 for each in prompts.values())


def test_source_of_problems() -> None:
    source = StringProblems(50, "held_out", seed=5, teacher_text="{solution}\n{problem}")
    assert source.name == "toy strings (held_out)"
    assert [problem.text for problem in source.problems()] == [each.prompt for each in take("held_out", 5, 50)]
    one, first = source.problems()[0], take("held_out", 5, 1)[0]
    assert one.teacher_text == f"{first.trace()}\n{first.prompt}"


@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_round_trip_and_lengths(split: Split) -> None:
    tokenizer = string_tokenizer()
    for problem in take(split, seed=1, count=50):
        prompt, response = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.trace()))
        assert tokenizer.decode(prompt) == problem.prompt
        assert tokenizer.decode(response) == problem.trace()
        assert tokenizer.unk_token_id not in prompt + response
        assert (len(prompt), len(response) + 1) == (61, 250)
