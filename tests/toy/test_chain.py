"""The toy world: its arithmetic, its splits and its tokenizer."""

import ast
import inspect
import itertools
import random
import re

import pytest

from opdlab.toy import ChainProblem, ChainProblems, chain_problems, chain_tokenizer, make_models
from opdlab.toy.task import Split
from opdlab.verifiers import BoxedVerifier

SPLITS: tuple[Split, ...] = ("sft", "train", "held_out")
STEP = re.compile(r"([a-k])([-+*])(\d): (\d{1,2})([-+*])(\d)=(\d{1,2})")


def take(split: Split, seed: int, count: int = 500) -> list[ChainProblem]:
    return list(itertools.islice(chain_problems(split, seed), count))


def operate(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 100


def wrong_results(problem: ChainProblem, trace: str) -> int:
    """Check a trace's form and chaining, and count the lines whose result is not what Python makes of them."""
    *lines, last = trace.split("\n")
    start, *operations = problem.prompt.split()
    assert len(lines) == len(operations) == 11
    value, wrong = int(start), 0
    for line, operation in zip(lines, operations, strict=True):
        match = STEP.fullmatch(line)
        assert match is not None, line
        letter, echoed, echoed_operand, left, operator, right, result = match.groups()
        assert letter + echoed + echoed_operand == operation
        assert (echoed, echoed_operand) == (operator, right)
        assert int(left) == value
        wrong += operate(int(left), operator, int(right)) != int(result)
        value = int(result)
    assert last == f"\\boxed{{{value}}}"
    return wrong


@pytest.mark.parametrize("split", SPLITS)
def test_traces_are_exact(split: Split) -> None:
    for problem in take(split, seed=3, count=200):
        trace = problem.trace()
        assert wrong_results(problem, trace) == 0
        assert trace.endswith(f"\\boxed{{{problem.answer}}}")
        assert BoxedVerifier(at_end=True).verify([trace], [problem.answer])[0].correct


def test_faulty_traces_have_the_asked_rate_of_errors() -> None:
    rng = random.Random(0)
    wrong = sum(wrong_results(problem, problem.trace(0.2, rng)) for problem in take("sft", 0))
    # A replaced result is right by chance once in a hundred. 5500 lines: a standard deviation of 0.0054.
    assert wrong / (500 * 11) == pytest.approx(0.2 * 0.99, abs=0.02)


def test_splits_are_disjoint() -> None:
    prompts = {split: {p.prompt for seed in (0, 1) for p in take(split, seed)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert prompts[one].isdisjoint(prompts[other])
    for split in SPLITS:
        assert all(problem.split == split for problem in take(split, 0))
        assert len(prompts[split]) > 990


def test_every_problem_has_one_split_in_the_stated_shares() -> None:
    rng = random.Random(0)
    drawn = [ChainProblem(rng.randrange(100), tuple(("+", rng.randrange(10)) for _ in range(11))) for _ in range(4000)]
    for split, sixteenths in (("held_out", 1), ("train", 4), ("sft", 11)):
        assert sum(p.split == split for p in drawn) / 4000 == pytest.approx(sixteenths / 16, abs=0.03)
    # The split follows from the text alone, however the problem was generated.
    assert ChainProblem(drawn[0].start, drawn[0].operations).split == drawn[0].split


@pytest.mark.parametrize("split", SPLITS)
def test_streams_are_decided_by_the_seed(split: Split) -> None:
    random.seed(0)
    first = take(split, seed=7, count=50)
    random.seed(1)
    assert take(split, seed=7, count=50) == first
    assert take(split, seed=8, count=50) != first


def test_source_of_problems() -> None:
    held_out, train = ChainProblems(200, "held_out", seed=5), ChainProblems(200, "train", seed=5)
    assert held_out.problems() == held_out.problems()
    assert {p.text for p in held_out.problems()}.isdisjoint(p.text for p in train.problems())
    assert len({p.id for p in held_out.problems() + train.problems()}) == 400
    assert [p.text for p in train.problems()] == [p.prompt for p in take("train", 5, 200)]
    assert [p.answer for p in train.problems()] == [p.answer for p in take("train", 5, 200)]


def test_shipped_models_were_trained_on_the_sft_split_only() -> None:
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(make_models.main))) if isinstance(node, ast.Call)]
    drawn = [ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "examples"]
    assert drawn
    assert set(drawn) == {"sft"}
    # Both streams of the recipe, longer than a user's evaluation and training sets.
    seen = {pair[0] for seed in (0, 1) for pair in itertools.islice(make_models.examples("sft", seed), 1000)}
    for split in ("train", "held_out"):
        for seed in (0, 1):
            assert seen.isdisjoint(problem.text for problem in ChainProblems(500, split, seed).problems())


def test_vocabulary() -> None:
    tokenizer = chain_tokenizer()
    assert len(tokenizer) == 38
    assert sorted(tokenizer.get_vocab().values()) == list(range(38))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("split", SPLITS)
def test_tokenizer_round_trip_and_lengths(split: Split) -> None:
    tokenizer = chain_tokenizer()
    for problem in take(split, seed=1, count=100):
        prompt, response = (tokenizer(text)["input_ids"] for text in (problem.prompt, problem.trace()))
        assert tokenizer.decode(prompt) == problem.prompt
        assert tokenizer.decode(response) == problem.trace()
        assert tokenizer.unk_token_id not in prompt + response
        assert 46 <= len(prompt) <= 47
        assert 115 <= len(response) + 1 <= 152
        # No token joins prompt and response: sampling continues exactly where training did.
        assert tokenizer(problem.prompt + problem.trace())["input_ids"] == prompt + response


def test_typical_lengths() -> None:
    tokenizer = chain_tokenizer()
    lengths = sorted(len(tokenizer(p.trace())["input_ids"]) + 1 for p in take("train", 0))
    # Nine in ten responses, including the stop token.
    assert lengths[25] >= 130
    assert lengths[-1] <= 152


def test_foreign_text_becomes_unknown() -> None:
    tokenizer = chain_tokenizer()
    assert tokenizer("x")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.decode([*tokenizer("7")["input_ids"], 1, 0, 0], skip_special_tokens=True) == "7"
