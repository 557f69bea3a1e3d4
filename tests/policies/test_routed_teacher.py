"""Several teachers, of which the data names one for each problem."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from opdlab.data import JsonlProblems
from opdlab.errors import UsageError
from opdlab.evaluation import EvaluationConfig
from opdlab.policies import LanguageModel, LocalTeacher, RoutedTeacher, SelfTeacher, TargetCache, TeacherRequest
from opdlab.policies.tokenizers import StopTokens
from opdlab.rollouts import Rollouts
from opdlab.toy import ChainProblems
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
PATHS: dict[str, Any] = {"good": TEACHER, "poor": STUDENT}


def some_rollouts(ids: list[int]) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    tokens = torch.randint(3, 38, mask.shape, generator=generator)
    zeros = torch.zeros(4, dtype=torch.long)
    prompt = (torch.full((4, 2), 5), torch.ones(4, 2, dtype=torch.bool))
    return Rollouts(*prompt, tokens, mask, torch.zeros(4, 6), *5 * (zeros,), teacher_ids=torch.tensor(ids))


@pytest.mark.parametrize("keep", [True, False])
def test_each_rollout_is_scored_by_its_teacher(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = LocalTeacher.__init__

    def watched(self: LocalTeacher, path: str, **options: Any) -> None:
        loads.append(path)
        load(self, path, **options)

    monkeypatch.setattr(LocalTeacher, "__init__", watched)  # what is in memory shows in no result
    teacher = RoutedTeacher(PATHS, keep_loaded=keep, batch_size=2)
    teacher.bind(LanguageModel(STUDENT))
    assert (teacher.vocab_size, teacher.names) == (38, ("good", "poor"))
    rollouts, request = some_rollouts([1, 0, 0, 1]), TeacherRequest(top_k=3, entropy=True)
    targets = teacher.score(rollouts, request)
    assert teacher.score(rollouts, request).logprobs.equal(targets.logprobs)
    assert loads == [TEACHER, STUDENT] * (1 if keep else 3)
    ids = rollouts.teacher_ids
    assert ids is not None
    for number, path in enumerate((TEACHER, STUDENT)):
        rows = ids.eq(number).nonzero().view(-1)
        alone = LocalTeacher(path).score(rollouts.rows(rows), request)
        for name in ("logprobs", "support_ids", "support_logits", "support_mass", "entropy"):
            assert torch.equal(getattr(targets, name)[rows], getattr(alone, name)), name
        found = teacher.metrics()
        name = teacher.names[number]
        assert found[f"targets/{name}/share"] == 0.5
        mean = float(alone.logprobs.sum() / rollouts.mask[rows].sum())
        assert found[f"targets/{name}/logprob"] == pytest.approx(mean)
    other = RoutedTeacher(PATHS, keep_loaded=not keep)
    other.bind(LanguageModel(STUDENT))
    assert teacher.weights_digest() == other.weights_digest()


def routed_file(folder: Path, names: list[str | None]) -> str:
    path = folder / "rows.jsonl"
    rows = [
        {"id": each.id, "problem": each.text, "answer": each.answer, "kind": name}
        for each, name in zip(ChainProblems(len(names)).problems(), names, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_run_logs_each_teacher(make_run: MakeRun, tmp_path: Path) -> None:
    train = JsonlProblems(routed_file(tmp_path, ["good", "poor", "poor", "poor"] * 2), teacher_field="kind")
    teacher = RoutedTeacher({"good": LocalTeacher(TEACHER), "poor": STUDENT})
    run = make_run(teacher=teacher, data={"train": train}, max_new_tokens=8)
    run.fit(1)
    assert run.recorder.steps[1]["train/loss"] > 0
    assert teacher.metrics()["targets/poor/share"] == 0.75


def test_a_reverse_kl_of_benchmarks_is_refused_before_anything_is_sampled(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="model.evaluation.reverse_kl is true, but model.teacher is a RoutedTeacher"):
        make_run(teacher=RoutedTeacher(PATHS), evaluation=EvaluationConfig(pass_at=(1,), reverse_kl=True))


def test_the_student_may_be_one_of_the_teachers(make_run: MakeRun, tmp_path: Path) -> None:
    path, file = tmp_path / "inside.ckpt", routed_file(tmp_path, ["good", "own"] * 8)
    train = JsonlProblems(file, teacher_field="kind", teacher_text="{answer}\n{problem}")

    def run(*callbacks: Callback) -> Run:
        teacher = RoutedTeacher({"good": TEACHER, "own": SelfTeacher(decay=0.5)})
        return make_run(teacher=teacher, data={"train": train}, callbacks=callbacks, max_new_tokens=8)

    whole, resumed = run(SaveAt(path, 2)), run()
    start = {name: weight.clone() for name, weight in whole.module.teacher.state_dict().items()}
    whole.fit(5)
    found = whole.module.teacher.state_dict()
    assert {name.split("/")[0] for name in found} == {"own"}
    assert not any(torch.equal(weight, start[name]) for name, weight in found.items())
    for weight in resumed.module.teacher.state_dict().values():  # every value must come from the checkpoint
        weight.add_(1.0)
    resumed.fit(5, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[2:]
    assert all(torch.equal(weight, found[name]) for name, weight in resumed.module.teacher.state_dict().items())
    with pytest.raises(UsageError, match="teacher is a RoutedTeacher that follows the student's weights"):
        TargetCache(RoutedTeacher({"own": SelfTeacher(decay=0.5)}), str(tmp_path / "targets"))


@pytest.mark.parametrize(
    ("names", "field", "message"),
    [
        (["good", "god"], "kind", r"data.train: line 2 of .*rows.jsonl, the problem '.*' names the teacher 'god', .* "
         "has good, poor; did you mean 'good'"),
        (["good", None], "kind", "line 2: the field 'kind' is null; give it a value"),
        (["good", "poor"], None, "line 1 of .* names no teacher, but model.teacher is a RoutedTeacher: give .* a tea"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_row(
    make_run: MakeRun, tmp_path: Path, names: list[str | None], field: str | None, message: str
) -> None:
    train = JsonlProblems(routed_file(tmp_path, names * 8), teacher_field=field)
    with pytest.raises(UsageError, match=message):
        make_run(teacher=RoutedTeacher(PATHS), data={"train": train}).fit(1)


def test_wrong_use_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    train = JsonlProblems(routed_file(tmp_path, ["good"] * 16), teacher_field="kind")
    with pytest.raises(UsageError, match="names the teacher 'good', but model.teacher is one teacher for all"):
        make_run(data={"train": train}).fit(1)
    with pytest.raises(UsageError, match="teachers is empty"):
        RoutedTeacher({})
    with pytest.raises(UsageError, match="teachers has the name 'a/b'"):
        RoutedTeacher({"a/b": TEACHER})
    teacher = RoutedTeacher(PATHS)
    teacher.bind(LanguageModel(STUDENT))
    with pytest.raises(UsageError, match="model.teacher is a RoutedTeacher, .* asks for hidden states"):
        teacher.score(some_rollouts([0] * 4), TeacherRequest(hidden=True))


def test_the_vocabulary_is_what_all_have_and_other_stop_tokens_are_known() -> None:
    teachers = {str(size): LocalTeacher(TEACHER) for size in (38, 36, 37)}
    for size, each in teachers.items():
        each.vocab_size = int(size)
    routed, student = RoutedTeacher({**teachers}), LanguageModel(STUDENT)
    # A warning says so if one of them has other stop tokens than the student.
    teachers["36"].stop_tokens = StopTokens(frozenset([1]), frozenset([5]))
    routed.bind(student)
    assert routed.vocab_size == 36
    assert routed.stop_tokens == teachers["36"].stop_tokens != student.stop_tokens


def test_other_vocabularies_are_refused_by_name() -> None:
    other = LocalTeacher(TEACHER)
    other.tokenizer.add_tokens(["extra"])
    with pytest.raises(UsageError, match="teachers has 'odd', which does not fit: .* token 38 is 'extra'"):
        RoutedTeacher({"good": TEACHER, "odd": other}).bind(LanguageModel(STUDENT))
