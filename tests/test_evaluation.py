"""Evaluation: counts, files on disk, and equal results after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from opdlab.cli import EXIT_USAGE, main
from opdlab.data import EvaluationBatch, Problem, Prompt
from opdlab.errors import UsageError, require
from opdlab.evaluation import BenchmarkMetrics, EvaluationConfig, Evaluator, Sample, SampleFolder
from opdlab.evaluation.settings import evaluation_settings
from opdlab.metrics.functional import pass_at_k
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig, Teacher
from opdlab.policies.fingerprints import fingerprint
from opdlab.progress import Progress, SilentProgress
from opdlab.toy import ChainProblems
from opdlab.types import Rollouts, Targets, TeacherRequest
from opdlab.verifiers import Verdict, Verifier
from tests.toy_run import STUDENT, TEACHER, Run

SMALL = """
trainer: {enable_progress_bar: false, enable_model_summary: false, max_steps: 1, val_check_interval: 1}
model:
  sampling: {max_new_tokens: 12}
  eval_sampling: {num_samples: 4, max_new_tokens: 160}
  evaluation: {pass_at: [1, 2, 4]}
data:
  eval_batch_size: 2
  train: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 8}}
  benchmarks:
    one: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 11, split: held_out}}
    two: {class_path: opdlab.toy.ChainProblems, init_args: {num_problems: 3, split: held_out, seed: 1}}
  reuse: {prompts_per_pool: 4, epochs: 2, batch_size: 4}
"""
COMMAND = ["validate", "-c", "quickstart", "-c", "small.yaml"]
SAMPLES = "--model.evaluation.samples"


@pytest.fixture
def opdlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``opdlab validate -c quickstart -c small …`` in an empty folder, on a model that is sometimes right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *arguments: main([*COMMAND, "--model.student.path", TEACHER, *arguments])


class CountingModel(LanguageModel):
    """Counts the batches that are sampled: their responses are decoded once, those on disk never."""

    batches: ClassVar[list[int]] = []

    def responses(self, rollouts: Rollouts) -> list[str]:
        self.batches.append(len(rollouts))
        return super().responses(rollouts)


COUNTED = ["--model.student", "tests.test_evaluation.CountingModel"]


@pytest.fixture
def batches() -> list[int]:
    """Return the list that gets the number of rollouts in every batch that a :class:`CountingModel` samples."""
    CountingModel.batches.clear()
    return CountingModel.batches


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def figures_of(folder: Path) -> dict[str, float]:
    figures: dict[str, float] = json.loads((folder / "results.json").read_text())["figures"]
    return figures


def test_teachers_are_told_apart_by_what_they_say() -> None:
    """Samples on disk have the reverse KL to one teacher, and are not taken for another's."""

    class Marked(Teacher):
        def __init__(self, mark: str | None) -> None:
            self.mark = mark

        def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
            raise NotImplementedError

        def fingerprint(self) -> str:
            require(self.mark is not None, "it has no mark")
            return str(self.mark)

    model, evaluator = LanguageModel(STUDENT), Evaluator(EvaluationConfig(), SamplingConfig(), [])
    place = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(precision="32-true", world_size=1, strategy=place)
    data: Any = SimpleNamespace(benchmarks={})

    def weights(teacher: Teacher | None) -> Any:
        return evaluation_settings(model, teacher, evaluator, data, trainer)["model"]["teacher"]["weights"]

    assert weights(None) is None
    assert (weights(Marked("a")), weights(Marked("b"))) == ("a", "b")
    assert weights(Marked(None)) != weights(Marked(None))


def test_killed_and_started_again_it_ends_the_same(
    opdlab: Callable[..., int],
    tmp_path: Path,
    batches: list[int],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert opdlab(*COUNTED, SAMPLES, "whole") == 0
    whole_table = capsys.readouterr().out.split("samples and")[0]
    shown = re.findall(r"│ (\w+)/(\S+) +│ [\d.]+ ± [\d.]+", whole_table)
    rows = ["pass@1", "pass@2", "pass@4", "maj@4", "truncated", "length"]
    assert shown == [(name, row) for name in ("one", "two", "mean") for row in rows]
    num_batches = len(batches)
    assert num_batches == 6 + 2

    code = "import sys; from opdlab.cli import main; sys.exit(main())"
    arguments = [*COMMAND, "--model.student.path", TEACHER, SAMPLES, "killed"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    lines = tmp_path / "killed/one-0.jsonl"
    deadline = time.monotonic() + 100
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 16) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with lines.open("ab") as file:  # left by a kill within a write
        file.write(b'{"benchmark": "one", "id": "hel')
    left = lines.read_bytes().count(b"\n") // 8
    assert left >= 2
    assert not (tmp_path / "killed/results.json").exists()

    batches.clear()
    assert opdlab(*COUNTED, SAMPLES, "killed") == 0
    assert len(batches) == num_batches - left
    assert f"{left} batches taken up from killed/one-0.jsonl" in caplog.messages
    assert capsys.readouterr().out.split("samples and")[0] == whole_table
    assert figures_of(tmp_path / "killed") == figures_of(tmp_path / "whole")
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")

    batches.clear()
    assert opdlab(*COUNTED, SAMPLES, "killed") == 0  # finished: read, not sampled
    assert batches == []
    assert figures_of(tmp_path / "killed") == figures_of(tmp_path / "whole")


def test_figures_are_those_of_the_lines(opdlab: Callable[..., int], tmp_path: Path) -> None:
    assert opdlab(SAMPLES, "out") == 0
    lines, figures = lines_of(tmp_path / "out"), figures_of(tmp_path / "out")
    assert len(lines) == 4 * (11 + 3)
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "avg@4": lambda line: line["correct"],
        "truncated": lambda line: line["stop_reason"] == "length",
        "boxed": lambda line: "\\boxed{" in line["response"],
        "length": lambda line: line["tokens"],
    }
    means, errors = {}, {}
    for name in ("one", "two"):
        own = [line for line in lines if line["benchmark"] == name]
        assert [line["sample"] for line in own] == [0, 1, 2, 3] * (len(own) // 4)
        for figure, column in columns.items():
            table = np.array([float(column(line)) for line in own]).reshape(-1, 4).mean(1)
            means[name, figure], errors[name, figure] = table.mean(), table.std(ddof=1) / len(table) ** 0.5
        correct = torch.tensor([line["correct"] for line in own]).view(-1, 4).sum(1)
        for k in (1, 2, 4):
            means[name, f"pass@{k}"] = float(pass_at_k(correct, 4, k).mean())
            errors[name, f"pass@{k}"] = float(pass_at_k(correct, 4, k).std() / len(correct) ** 0.5)
    assert 0 < means["one", "avg@4"] < 1
    for (name, figure), value in means.items():
        assert figures[f"{name}/{figure}"] == pytest.approx(value, rel=1e-5)
        assert figures[f"{name}/{figure}_se"] == pytest.approx(errors[name, figure], rel=1e-5, abs=1e-7)
        both = [errors[each, figure] for each in ("one", "two")]
        assert figures[f"mean/{figure}"] == pytest.approx((means["one", figure] + means["two", figure]) / 2, rel=1e-5)
        assert figures[f"mean/{figure}_se"] == pytest.approx(np.hypot(*both) / 2, rel=1e-5, abs=1e-7)
    assert figures["one/pass@1"] <= figures["one/pass@2"] <= figures["one/pass@4"]
    assert 0 <= figures["one/maj@4"] <= 1


def test_any_other_setting_is_refused_by_name(
    opdlab: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--model.eval_sampling.max_new_tokens", "4", SAMPLES]
    assert opdlab(*few, "out") == 0
    before = lines_of(tmp_path / "out")
    cases = {
        ("--model.eval_sampling.temperature", "0.7"): "model.eval_sampling.temperature is 1.0 there and 0.7 now",
        ("--model.evaluation.seed", "5"): "model.evaluation.seed is 0 there and 5 now",
        ("--model.student.path", STUDENT): "model.student.weights is ",
        ("--data.benchmarks.one.init_args.seed", "9"): "data.benchmarks.one.prompts is ",
    }
    for flags, words in cases.items():
        capsys.readouterr()
        assert opdlab(*few, "out", *flags) == EXIT_USAGE
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opdlab: error:")]
        assert words in line
        assert line.endswith("give another folder")
    assert lines_of(tmp_path / "out") == before
    assert opdlab(*few, "file.txt/out") == 0  # it may be in any folder that can be created
    (tmp_path / "plain").touch()
    capsys.readouterr()
    assert opdlab(*few, "plain") == EXIT_USAGE
    assert "model.evaluation.samples is 'plain', which cannot be written (" in capsys.readouterr().err


def test_answers_do_not_depend_on_their_batch(opdlab: Callable[..., int], tmp_path: Path) -> None:
    few = ["--model.eval_sampling.max_new_tokens", "40", SAMPLES]
    assert opdlab(*few, "two") == 0
    assert opdlab(*few, "five", "--data.eval_batch_size", "5") == 0
    two, five = lines_of(tmp_path / "two"), lines_of(tmp_path / "five")
    assert two == five
    assert len({line["seed"] for line in two}) == len(two) == 4 * (11 + 3)
    assert opdlab(*few, "two", "--data.eval_batch_size", "7") == 0  # it may change between two parts of an evaluation
    assert lines_of(tmp_path / "two") == two


def test_no_teacher_is_loaded_and_each_model_has_a_folder_of_its_own(
    opdlab: Callable[..., int], tmp_path: Path
) -> None:
    few = ["--model.eval_sampling.max_new_tokens", "4", "--model.teacher.path", "nowhere"]
    assert opdlab(*few) == 0
    assert opdlab(*few, "--model.student.path", STUDENT) == 0
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "runs/quickstart/evaluations").iterdir())
    assert names == ["student", "teacher"]


def test_training_keeps_its_samples_in_the_run_or_elsewhere(opdlab: Callable[..., int], tmp_path: Path) -> None:
    fit = ["fit", *COMMAND[1:], "--model.eval_sampling.max_new_tokens", "4"]
    evaluations = ["teacher-step-1", "val-step-0", "val-step-1"]
    assert main(fit) == 0
    assert sorted(path.name for path in tmp_path.glob("runs/quickstart/version_0/evaluations/*")) == evaluations
    assert main([*fit, SAMPLES, "kept"]) == 0
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("kept/*/*"))
    assert [re.sub("-[0-9a-f]{8}/", "/", name) for name in names] == [f"kept/version_1/{name}" for name in evaluations]
    settings = [json.loads((tmp_path / name / "settings.json").read_text())["compared"] for name in names]
    weights = [each["model"]["student"]["weights"] for each in settings]
    assert len(set(weights)) == 3
    assert weights[0] == fingerprint(LanguageModel(TEACHER))
    # A run of another root with the same number does not change them.
    (tmp_path / "elsewhere/runs/version_0").mkdir(parents=True)
    assert main([*fit, SAMPLES, "kept", "--trainer.default_root_dir", "elsewhere/runs"]) == 0
    assert len(list(tmp_path.glob("kept/*/*"))) == 6


def test_reverse_kl_is_read_back(opdlab: Callable[..., int], tmp_path: Path, batches: list[int]) -> None:
    short = ["--model.eval_sampling.max_new_tokens", "8", "--model.student.path", STUDENT]
    flags = ["--model.evaluation.reverse_kl", "true", *short, *COUNTED, SAMPLES, "kl"]
    assert opdlab(*flags) == 0
    assert len(batches) == 6 + 2
    figures, lines = figures_of(tmp_path / "kl"), lines_of(tmp_path / "kl")
    own = [line for line in lines if line["benchmark"] == "one"]
    expected = np.average([line["reverse_kl"] for line in own], weights=[line["tokens"] for line in own])
    assert figures["one/reverse_kl"] == pytest.approx(expected, rel=1e-5)
    assert figures["one/reverse_kl_se"] > 0
    batches.clear()
    assert opdlab(*flags) == 0
    assert batches == []
    assert figures_of(tmp_path / "kl") == figures


# -- without the command line ---------------------------------------------------------------------------------------


def sample_of(number: int, **changes: Any) -> Sample:
    given = {"benchmark": "b", "id": str(number // 2), "sample": number % 2, "problem": "p", "gold": "1"}
    verdict = {"extracted": "1", "correct": True, "reason": "equal", "stop_reason": "eos", "tokens": 3, "seed": 0}
    return Sample(**{**given, **verdict, "response": "\\boxed{1}", **changes})


KEYS = [[("0", 0), ("0", 1)], [("1", 0), ("1", 1)], [("2", 0), ("2", 1)]]


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (lambda data: data, 2),
        (lambda data: data[:-1], 1),  # the last line's end is missing
        (lambda data: data[: data.rindex(b"{") + 20], 1),
        (lambda data: data[: data.rindex(b"{")], 1),  # half a batch
        (lambda data: data + b"\0" * 50, 2),
        (lambda data: b"", 0),
    ],
)
def test_only_whole_batches_are_taken_up(tmp_path: Path, spoil: Callable[[bytes], bytes], left: int) -> None:
    written = [[sample_of(0), sample_of(1)], [sample_of(2), sample_of(3, response="\ud800 ünï\n\u2028")]]
    folder = SampleFolder(tmp_path, {"compared": {}})
    assert folder.take("b", KEYS[0]) is None
    for batch in written:
        folder.write(batch)
    folder.close()
    path = tmp_path / "b-0.jsonl"
    path.write_bytes(spoil(path.read_bytes()))

    folder = SampleFolder(tmp_path, {"compared": {}})
    taken = [folder.take("b", keys) for keys in KEYS]
    assert taken[:left] == written[:left]
    assert taken[left:] == [None] * (3 - left)
    for batch in written[left:]:
        folder.write(batch)
    folder.close()
    again = SampleFolder(tmp_path, {"compared": {}})
    assert [again.take("b", keys) for keys in KEYS[:2]] == written
    again.close()


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    first, second = (SampleFolder(tmp_path, {"compared": {}}) for _ in "12")
    first.take("b", KEYS[0])
    with pytest.raises(UsageError, match="another evaluation is writing"):
        second.take("b", KEYS[0])
    first.close()
    second.take("b", KEYS[0])
    second.close()


def test_a_benchmark_without_a_verifier_has_no_verdicts_to_count() -> None:
    metrics = BenchmarkMetrics(EvaluationConfig(pass_at=(1,)), num_samples=2)
    unjudged = {"correct": None, "extracted": None, "reason": None}
    metrics.update([sample_of(0, **unjudged), sample_of(1, stop_reason="length", response="", **unjudged)])
    assert {name: float(value) for name, value in metrics.compute().items()} == {
        "truncated": 0.5,
        "boxed": 0.5,
        "length": 3.0,
    }


class Slow(Verifier):
    """Notes when answers are submitted, and when their verdicts are waited for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def verify(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        return [Verdict(True, gold, "equal") for gold in golds]

    def submit(self, responses: Sequence[str], golds: Sequence[str]) -> Callable[[], list[Verdict]]:
        self.events.append(f"submit {golds[0]}")

        def wait() -> list[Verdict]:
            self.events.append(f"collect {golds[0]}")
            return self.verify(responses, golds)

        return wait


def one_problem(index: int, verifier: Verifier) -> EvaluationBatch:
    tokens = tuple(LanguageModel(STUDENT).tokenizer("1 a+1\n").input_ids)
    return EvaluationBatch("b", [Prompt(index, Problem(str(index), "1 a+1", str(index)), tokens)], verifier)


def test_answers_are_checked_while_the_next_are_sampled(tmp_path: Path) -> None:
    events: list[str] = []

    class Noting(LanguageModel):
        """Notes when its samples are decoded, and runs out of memory at the fourth batch."""

        def responses(self, rollouts: Rollouts) -> list[str]:
            if len(events) > 6:
                raise MemoryError
            events.append("sample")
            return super().responses(rollouts)

    with pytest.raises(UsageError, match="data.benchmarks has the name 'mean', under which the mean over all"):
        Evaluator(EvaluationConfig(pass_at=(1,)), SamplingConfig(2, max_new_tokens=2), ["b", "mean"])
    evaluator = Evaluator(EvaluationConfig(pass_at=(1,)), SamplingConfig(2, max_new_tokens=2), ["b"])
    evaluator.start(SampleFolder(tmp_path, {"compared": {}}))
    model = Noting(STUDENT)
    for index in range(3):
        evaluator.evaluate(model, one_problem(index, Slow(events)), SilentProgress())
    assert events == ["sample", "submit 0", *("sample", "submit 1", "collect 0"), *("sample", "submit 2", "collect 1")]
    with pytest.raises(MemoryError):
        evaluator.evaluate(model, one_problem(3, Slow(events)), SilentProgress())
    assert events[-1] == "collect 2"  # sampled and verified before, so it is kept although the next batch failed
    assert [line["id"] for line in lines_of(tmp_path)] == ["0", "0", "1", "1", "2", "2"]
    assert evaluator.compute()["b/pass@1"] == 1
    evaluator.close()


def test_rollouts_are_checked_while_the_teacher_scores(make_run: Callable[..., Run]) -> None:
    events: list[str] = []

    class Noting(LocalTeacher):
        """Notes when it scores."""

        def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
            events.append("score")
            return super().score(rollouts, request, progress)

    run = make_run(teacher=Noting(TEACHER))
    source = ChainProblems(16)
    source.verifier = Slow(events)
    run.data.train_source = source
    run.fit(1)
    assert [event.split()[0] for event in events] == ["submit", "score", "collect"]
    assert run.recorder.steps[1]["rollout/accuracy"] == 1


def test_fingerprint_tells_models_apart_and_not_folders(tmp_path: Path) -> None:
    model = LanguageModel(STUDENT)
    own = fingerprint(model)
    model.save(tmp_path / "copy")
    assert fingerprint(LanguageModel(str(tmp_path / "copy"))) == own
    assert fingerprint(LanguageModel(STUDENT, dtype="bfloat16")) != own
    assert fingerprint(LanguageModel(TEACHER)) != own
    model.model.config.rope_parameters["rope_theta"] += 1
    assert fingerprint(model) != own


def test_library_users_get_the_folder_they_name(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(evaluation=EvaluationConfig(pass_at=(1, 2), samples=str(tmp_path / "kept-{settings}")))
    trainer = pl.Trainer(**{**run.trainer_options, "limit_val_batches": 1.0})
    trainer.validate(run.module, datamodule=run.data, verbose=False)
    (folder,) = tmp_path.glob("kept-????????")
    assert len(lines_of(folder)) == 6
    assert figures_of(folder)["toy/truncated"] == 1
