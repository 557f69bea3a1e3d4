"""Teachers and demonstrations from configurations: the documentation's examples run, and the estimate counts them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlab.cli import EXIT_USAGE, main
from opdlab.cli.memory_parts import estimate
from opdlab.cli.parsing import parse_fit
from opdlab.toy import ChainProblems
from tests.cli.test_fit import SMALL
from tests.toy_run import STUDENT, TEACHER

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "teachers.md"
TEXTS = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
EXAMPLES = [yaml.safe_load(text) for text in TEXTS if "url:" not in text]  # test_served_teacher.py has the servers
Opdlab = Callable[..., int]


@pytest.fixture
def opdlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opdlab:
    """Run ``opdlab fit -c quickstart -c example -c small …`` in a folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [
        {"id": each.id, "problem": each.text, "answer": each.answer, "solution": f"={each.answer}\n", "domain": domain}
        for each, domain in zip(ChainProblems(8).problems(), ["math", "code"] * 4, strict=True)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = yaml.safe_load(SMALL)
    small["model"]["evaluation"] |= {"teacher": False}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    return lambda *arguments: main(["fit", "-c", "quickstart", *arguments, "--trainer.max_steps", "1"])


def shipped(example: dict[str, Any]) -> dict[str, Any]:
    """The example with the toy's models in place of the folders that it names."""
    text = yaml.safe_dump(example).replace("./math-teacher", TEACHER).replace("./code-teacher", STUDENT)
    changed: dict[str, Any] = yaml.safe_load(text.replace("./my-teacher", TEACHER))
    train = changed.get("data", {}).get("train", {}).get("init_args", {})
    if "num_problems" in train:
        train["num_problems"] = 8
    return changed


# The toy's tokenizer has no letters of words, and the run says so.
@pytest.mark.filterwarnings("ignore:.*characters that the student's tokenizer does not know")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_run(opdlab: Opdlab, tmp_path: Path, number: int) -> None:
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(shipped(EXAMPLES[number])))
    assert opdlab("-c", "small.yaml", "-c", "example.yaml") == 0
    (metrics,) = tmp_path.glob("runs/quickstart/version_0/metrics.csv")
    header = metrics.read_text().splitlines()[0]
    kind = EXAMPLES[number].get("model", {}).get("teacher", {}).get("class_path", "")
    assert ("targets/math/share" in header) == kind.endswith("RoutedTeacher")
    assert ("targets/cache_misses" in header) == kind.endswith("TargetCache")
    assert ("rollout/demonstration_share" in header) == ("demonstrations" in EXAMPLES[number].get("data", {}))


def test_five_examples() -> None:
    assert len(EXAMPLES) == 5 == len(TEXTS) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.demonstrations.share", "2"], "data.demonstrations.share is 2"),
        (["--data.demonstrations.share", "0.001"], "data.demonstrations.share is 0.001, which is no rollout of"),
        (["--data.max_teacher_prompt_tokens", "0"], "data.max_teacher_prompt_tokens is 0"),
        (["--data.train.teacher_text", "none"], "data.train.teacher_text is 'none', which names no field"),
        (
            ["--model.teacher", "opdlab.policies.SelfTeacher", "--model.teacher.decay", "1"],
            "model.teacher.decay is 1",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_their_key(
    opdlab: Opdlab, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert opdlab("-c", "small.yaml", *arguments) == EXIT_USAGE
    assert message in capsys.readouterr().err


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_every_teacher_is_evaluated_when_training_ends(
    opdlab: Opdlab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {"teachers": {"math": TEACHER, "code": STUDENT}, "keep_loaded": False}
    routed = {"class_path": "opdlab.policies.RoutedTeacher", "init_args": several}
    cached = {"class_path": "opdlab.policies.TargetCache", "init_args": {"folder": "targets", "teacher": routed}}
    named = {"path": "problems.jsonl", "teacher_field": "domain"}
    train = {"class_path": "opdlab.data.JsonlProblems", "init_args": named}
    (tmp_path / "cached.yaml").write_text(yaml.safe_dump({"model": {"teacher": cached}, "data": {"train": train}}))
    arguments = ["-c", "small.yaml", "-c", "cached.yaml", "--model.evaluation.teacher", "true"]
    assert opdlab(*arguments) == 0
    headers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("┃ metric")]
    assert re.findall(r"[\w-]+", " ".join(headers)) == [
        "metric",
        "before",
        "after",
        "teacher-code",
        "metric",
        "teacher-math",
    ]
    folder = tmp_path / "runs/quickstart/version_0"
    results = json.loads((folder / "results.json").read_text())
    assert results["teacher"] == {}
    assert {path.name for path in (folder / "evaluations").iterdir()} >= {"teacher-math-step-1", "teacher-code-step-1"}
    assert results["teacher-code"] == results["before"]  # the student before training is that teacher
    assert results["teacher-math"].keys() == results["teacher-code"].keys()


# -- the estimate -----------------------------------------------------------------------------------------------------


def parts(*arguments: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part, and peaks by phase."""
    found = estimate(parse_fit(["-c", "quickstart", *arguments], "estimate"), on_cpu=True)
    sizes = {name: size for name, (size, _) in {**found.parts, **found.host}.items()}
    return sizes, {phase: found.peak(phase) for phase in found.phases}


def test_the_estimate_counts_teachers(tmp_path: Path) -> None:
    plain, peaks = parts()
    sees, higher = parts(
        "--data.train.teacher_text", "{solution} {problem}", "--data.max_teacher_prompt_tokens", "4096"
    )
    assert sees["rollout buffer"] - plain["rollout buffer"] == 64 * 4096 * 9
    assert higher["teacher scoring"] > peaks["teacher scoring"]
    assert higher["behavior scoring"] == peaks["behavior scoring"]
    own, _ = parts("--model.teacher", "opdlab.policies.SelfTeacher")
    assert own["teacher weights"] == own["student weights"]
    narrow = ["--model.student.dtype", "bfloat16", "--model.teacher", "opdlab.policies.SelfTeacher"]
    averaged, _ = parts(*narrow, "--model.teacher.decay", "0.9")
    assert averaged["teacher weights"] == 3 * averaged["student weights"]  # the average in float32 too
    with_own = {"teachers": {"math": TEACHER, "own": {"class_path": "opdlab.policies.SelfTeacher"}}}
    teacher = {"class_path": "opdlab.policies.RoutedTeacher", "init_args": with_own}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"teacher": teacher}}))
    beside, _ = parts("-c", str(tmp_path / "own.yaml"))
    assert beside["teacher weights"] == plain["teacher weights"] + plain["student weights"]
    teachers = {"teachers": {"math": TEACHER, "code": TEACHER}}
    for keep, number in ((True, 2), (False, 1)):
        teacher = {"class_path": "opdlab.policies.RoutedTeacher", "init_args": {**teachers, "keep_loaded": keep}}
        (tmp_path / "routed.yaml").write_text(yaml.safe_dump({"model": {"teacher": teacher}}))
        routed, _ = parts("-c", str(tmp_path / "routed.yaml"))
        assert routed["teacher weights"] == number * plain["teacher weights"]
