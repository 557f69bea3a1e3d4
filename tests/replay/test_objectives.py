"""Recorded steps under other objectives, against plain formulas and autograd."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opdlab.callbacks import PoolRecorder
from opdlab.errors import UsageError
from opdlab.objectives import Objective, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.replay import Grid, RecordedStep, ReplayConfig, Replayer, read_record, record_folders
from opdlab.replay.comparison import Row
from opdlab.replay.objectives import chosen_objectives
from opdlab.replay.plugins import Named
from opdlab.replay.targets import MissingTargetsError, narrowed, with_targets
from opdlab.types import Rollouts, TeacherRequest
from tests.toy_run import Run

MakeRun = Callable[..., Run]
GRID = Grid(gates=("none", "block32"), statistics=("signed_mean",), normalizations=("mean",), taus=(5.0,))


class StudentSupport(SupportDivergence):
    """A support that a run under another objective does not record."""

    def __init__(self) -> None:
        super().__init__("reverse_kl", "student", "bucket", k=4)


def recorded(make_run: MakeRun, **options: Any) -> tuple[Run, RecordedStep]:
    run = make_run(callbacks=(PoolRecorder(steps=[4]),), **options)
    trainer = run.fit(4)
    assert trainer.log_dir is not None
    (folder,) = record_folders(Path(trainer.log_dir)).values()
    return run, read_record(folder)


def logits_of(model: Any, rollouts: Rollouts) -> Tensor:
    """Of the whole vocabulary at each response token, in float64."""
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.mask], 1)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    found: Tensor = model(tokens, attention_mask=mask.long(), position_ids=places).logits
    return found[:, rollouts.prompt_tokens.shape[1] - 1 : -1]


def test_another_objective_has_the_loss_and_gradient_of_the_formula(make_run: MakeRun) -> None:
    run, record = recorded(make_run, objective=TeacherTopK(k=8), gate="block32", refresh=8)
    dropped: Named[Objective] = Named("dropped", SupportDivergence("reverse_kl", "teacher", "drop", k=4))
    names: list[str | Named[Objective]] = ["full_divergence", "teacher_topk", "sampled_token"]
    names += [f"{__name__}.StudentSupport", dropped]
    replayer = Replayer(run.module, GRID, ReplayConfig(draws=2, tolerance=0.0), nullcontext, objectives=names)
    own = run.module.objective
    result = replayer.replay(record)
    assert run.module.objective is own
    assert result.replayed_loss == result.recorded_loss
    assert list(result.others) == ["full_divergence", "sampled_token", "dropped"]  # the run's own is there once
    assert replayer.skipped == {
        "StudentSupport": "needs the snapshot's 4 most likely tokens, but the record has the teacher's 8 most likely "
        "tokens without the mass of all others"
    }

    (batch,) = record.batches
    record.load_weights(run.module.student)
    student = copy.deepcopy(run.module.student.model).double()
    with torch.no_grad():
        teacher = logits_of(copy.deepcopy(run.module.teacher.model.model).double(), batch.rollouts)  # type: ignore[attr-defined]
    parameters = [p for p in student.parameters() if p.requires_grad]

    def gradient(losses: Tensor) -> tuple[float, Tensor]:
        loss = losses[batch.rollouts.mask].mean()
        return loss.item(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    p, q = (logits.log_softmax(-1) for logits in (logits_of(student, batch.rollouts), teacher))
    loss, full = gradient((p.exp() * (p - q)).sum(-1))
    top = teacher.topk(8).indices
    p, q = (logits_of(student, batch.rollouts).gather(-1, top).log_softmax(-1), teacher.gather(-1, top).log_softmax(-1))
    _, lsm = gradient((p.exp() * (p - q)).sum(-1))
    p, q = (logits.log_softmax(-1).gather(-1, top[..., :4]) for logits in (logits_of(student, batch.rollouts), teacher))
    partial, of_drop = gradient((p.exp() * (p - q)).sum(-1))
    assert result.others["dropped"][0]["loss"] == pytest.approx(partial, rel=1e-4)
    assert result.others["dropped"][0]["gradient_norm"] == pytest.approx(float(of_drop.norm()), rel=1e-3)
    ungated = result.others["full_divergence"][0]
    assert (ungated["objective"], ungated["gate"], ungated["own"]) == ("full_divergence", "none", False)
    assert ungated["loss"] == pytest.approx(loss, rel=1e-4)
    assert ungated["gradient_norm"] == pytest.approx(float(full.norm()), rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(full, lsm, dim=0)
    assert ungated["run_cosine"] == pytest.approx(float(cosine), abs=1e-4)
    assert ungated["ungated_cosine"] == pytest.approx(1)
    assert result.rows[0]["run_cosine"] == pytest.approx(1)
    assert all(isinstance(row["fresh_cosine"], float) for rows in result.others.values() for row in rows)
    gated: Row = result.others["sampled_token"][-1]
    assert gated["gate"] == "block32"
    assert gated["loss"] != result.others["sampled_token"][0]["loss"]


@pytest.mark.parametrize("tail", [False, True])
def test_the_first_of_many_tokens_are_what_the_teacher_gives_for_fewer(make_run: MakeRun, tail: bool) -> None:
    objective = SupportDivergence("reverse_kl", "teacher", "bucket" if tail else "renormalize", k=12)
    run, record = recorded(make_run, objective=objective)
    (batch,) = record.batches
    request = TeacherRequest(top_k=5, tail=tail)
    found = narrowed(batch.rollouts, batch.targets, request)
    expected = run.module.teacher.score(batch.rollouts, request)
    assert found is not None
    mask = batch.rollouts.mask
    assert found.support_ids is not None
    assert expected.support_ids is not None
    assert torch.equal(found.support_ids[mask].long(), expected.support_ids[mask].long())
    for name in ("logprobs", "support_logits", "support_mass", *(("log_tail", "log_normalizer") if tail else ())):
        ours, theirs = (getattr(each, name)[mask] for each in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert narrowed(batch.rollouts, batch.targets, replace(request, top_k=13)) is None
    assert narrowed(batch.rollouts, batch.targets, replace(request, hidden=True)) is None
    if not tail:
        assert narrowed(batch.rollouts, batch.targets, replace(request, tail=True)) is None


@pytest.mark.parametrize(
    "request_",
    [
        TeacherRequest(top_k=5, tail=True),
        TeacherRequest(behavior_top_k=4, tail=True),
        TeacherRequest(top_k=3, behavior_top_k=3, tail=True),
        TeacherRequest(top_k=6, behavior_top_k=6),
    ],
    ids=["teacher", "student", "smaller union", "same union"],
)
@pytest.mark.parametrize("hidden", [False, True], ids=["union", "hidden"])
def test_parts_of_a_union_and_of_hidden_states(make_run: MakeRun, request_: TeacherRequest, hidden: bool) -> None:
    run, record = recorded(make_run, objective=SupportDivergence("jsd", "union", "bucket", k=6))
    (batch,), teacher = record.batches, run.module.teacher
    given = batch.rollouts.behavior_support_ids
    assert given is not None
    if hidden:
        kept = teacher.score(batch.rollouts, TeacherRequest(hidden=True))
        batch = replace(batch, targets=kept)
    found = with_targets(teacher, batch, request_)
    few = given[..., : request_.behavior_top_k] if request_.behavior_top_k else None
    rollouts = replace(batch.rollouts, behavior_support_ids=few)
    expected = teacher.score(rollouts, request_)
    mask = rollouts.mask
    assert (found.rollouts.behavior_support_ids is None) == (few is None)
    for name, theirs in expected.state_dict().items():
        ours = getattr(found.targets, name)
        if name == "support_overlap":  # measured when a buffer is collected; of fewer tokens it would be another
            assert ours is None
            continue
        if theirs is None:
            assert ours is None or name == "log_normalizer"
        elif theirs.dtype.is_floating_point:
            torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(ours[mask].long(), theirs[mask].long()), name


def test_a_teacher_that_has_changed_is_not_asked(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, record = recorded(make_run, objective=TeacherTopK(k=8))
    monkeypatch.setattr(run.module.teacher, "follows_student", True)
    (batch,) = record.batches
    with_targets(run.module.teacher, batch, TeacherRequest(top_k=4))
    with pytest.raises(MissingTargetsError, match="the teacher has changed since"):
        with_targets(run.module.teacher, batch, TeacherRequest(hidden=True))


def test_objectives_are_found_by_name_and_class_path() -> None:
    own = TeacherTopK(k=3)
    found = chosen_objectives(["teacher_topk", "sampled_token", f"{__name__}.StudentSupport"], own)
    assert [each.name for each in found] == ["teacher_topk", "sampled_token", "StudentSupport"]
    assert found[0].plugin is own
    assert isinstance(found[1].plugin, SampledTokenOPD)
    with pytest.raises(UsageError, match="unknown objective 'teacher_topc'; did you mean 'teacher_topk'"):
        chosen_objectives(["teacher_topc"], own)
    with pytest.raises(UsageError, match="--objectives has 'builtins.dict', which is not an objective"):
        chosen_objectives(["builtins.dict"], own)
