"""Named sets of problems, read from local copies, without access to the hub."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest

from opdlab.data import Benchmark, ChatTemplate, DapoMath17k, Problem, PromptDataModule
from opdlab.data.templates import RawTemplate
from opdlab.errors import UsageError
from opdlab.rollouts import DemonstrationConfig
from opdlab.types import Part
from opdlab.verifiers import BoxedVerifier, MathVerifier

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write(folder: Path, *rows: Mapping[str, object]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("aime24", "025", "25"),
        ("aime24", "000", "0"),
        ("aime24", "204", "204"),
        ("aime25", r"336^\circ", "336"),
        ("aime25", r"336^{\circ}", "336"),
        ("amc23", "27.0", "27"),
        ("amc23", "100", "100"),
        ("amc23", "2.5", "2.5"),
        ("gsm8k", "so 5 * 3 = <<5*3=15>>15\n#### 1,234", "1234"),
        ("gsm8k", "-18", "-18"),
        ("math500", r" \left( 3, \frac{\pi}{2} \right)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("math500", "1,000", "1,000"),
        ("math500", "007", "007"),
    ],
)
def test_answers_are_brought_into_form(tmp_path: Path, name: str, answer: str, expected: str) -> None:
    path = write(tmp_path, {"id": "x", "problem": " p\n", "answer": answer})
    assert list(Benchmark(name, str(path)).problems()) == [Problem("x", "p", expected)]
    path = write(tmp_path, {"id": "x", "problem": "p", "answer": expected})
    assert next(Benchmark(name, str(path)).problems()).answer == expected  # applying it twice changes nothing


# The fields of each data set, as its card on the hub lists them.
HUB_ROWS: dict[str, tuple[str, dict[str, object], Problem]] = {
    "aime24": ("train", {"id": 60, "problem": "p", "solution": "s", "answer": "025"}, Problem("60", "p", "25")),
    "aime25": ("test", {"problem": "p", "answer": "70", "id": "0"}, Problem("0", "p", "70")),
    "amc23": ("test", {"id": 3, "question": "p", "answer": 27.0}, Problem("3", "p", "27")),
    "math500": (
        "test",
        {"problem": "p", "answer": "x", "unique_id": "test/a/1.json"},
        Problem("test/a/1.json", "p", "x"),
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_folder_with_the_hubs_files_is_read_by_the_hubs_fields(tmp_path: Path, name: str) -> None:
    split, row, expected = HUB_ROWS[name]
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert list(Benchmark(name, str(tmp_path)).problems()) == [expected]


def test_a_folder_with_subsets_is_read_by_its_card(tmp_path: Path) -> None:
    for subset, prompt in (("en", "no"), ("all", "yes")):
        (tmp_path / subset).mkdir()
        row = {"prompt": prompt, "solution": "34", "extra_info": {"index": "x"}}
        (tmp_path / subset / "train-0.jsonl").write_text(json.dumps(row) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train-*\n" for name in ("en", "all"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [(p.text, p.answer) for p in DapoMath17k(str(tmp_path)).problems()] == [("yes", "34")]


def test_defaults() -> None:
    benchmark, dapo = Benchmark("aime25"), DapoMath17k()
    assert isinstance(benchmark.template, RawTemplate)
    assert benchmark.template.suffix == "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert isinstance(benchmark.verifier, MathVerifier)
    assert benchmark.verifier is dapo.verifier  # one set of worker processes
    assert (benchmark.name, dapo.name) == ("math-ai/aime25 (test)", "open-r1/DAPO-Math-17k-Processed (train)")
    template, verifier = ChatTemplate(), BoxedVerifier()
    own = Benchmark("aime25", template=template, verifier=verifier)
    assert own.template is template
    assert own.verifier is verifier
    assert pickle.loads(pickle.dumps(benchmark)).name == benchmark.name


def test_limit_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path, *({"id": str(i), "problem": f"p{i}", "answer": "1"} for i in range(5)))
    assert [p.id for p in Benchmark("amc23", str(path), limit=2, offset=1).problems()] == ["1", "2"]
    assert [p.id for p in DapoMath17k(str(path), limit=1).problems()] == ["0"]


def test_what_dapo_puts_around_a_problem_is_cut_off(tmp_path: Path) -> None:
    before = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    )
    after = '\n\nRemember to put your answer on its own line after "Answer:".'
    path = write(
        tmp_path,
        {"id": "a", "problem": f"{before}What is 1 + 1?{after}", "answer": "2"},
        {"id": "b", "problem": "What is the last line?", "answer": "3"},
    )
    assert [p.text for p in DapoMath17k(str(path)).problems()] == ["What is 1 + 1?", "What is the last line?"]


def test_bad_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown benchmark 'amc32'; did you mean 'amc23'"):
        Benchmark("amc32")
    with pytest.raises(UsageError, match="unknown benchmark 'zzz'; Known: aime24, aime25, amc23, gsm8k, math500"):
        Benchmark("zzz")
    with pytest.raises(UsageError, match="revision is 'main', but path is"):
        Benchmark("amc23", "rows.jsonl", revision="main")
    with pytest.raises(UsageError, match="nowhere.jsonl does not exist"):
        list(Benchmark("amc23", str(tmp_path / "nowhere.jsonl")).problems())


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the benchmark files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        *(("aime24", "aime24", 30), ("aime25", "aime25", 30), ("math500", "math500", 500), ("amc23", "amc23", 40)),
        ("gsm8k", "gsm8k_test", 1319),
    ],
)
def test_real_benchmarks(name: str, file: str, size: int) -> None:
    path = REAL_DATA / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this checkout")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    problems = list(Benchmark(name, str(path)).problems())
    assert len(problems) == size
    assert [(p.id, p.answer) for p in problems] == [(row["id"], row["answer"]) for row in rows]
    assert [p.text for p in problems] == [row["problem"].strip() for row in rows]


def test_demonstrations_of_a_published_set_are_read_from_the_field_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, *({"id": str(n), "problem": f"{n} + 1?", "answer": str(n), "why": "So."} for n in range(4)))
    train = DapoMath17k(path=str(path))
    PromptDataModule(train, demonstrations=DemonstrationConfig(0.5, "why"))
    problems = [*train.problems(), *(problem for _, problem in train.places())]
    assert [problem.demonstration for problem in problems] == [(Part("So."),)] * 8
    assert train.problem_field == "problem"
