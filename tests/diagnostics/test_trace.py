"""The gradient norms of a step, against one autograd call for each position."""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from opdlab.callbacks import GateMonitor
from opdlab.data import ReuseConfig
from opdlab.diagnostics import StepTrace, hidden_gradient_norms
from opdlab.objectives import Objective, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.types import Rollouts
from tests.diagnostics.synthetic import MicroBatch, micro_batch
from tests.toy_run import Run

OBJECTIVES = [SampledTokenOPD(), SampledTokenOPD(reference="current", clip=None), TeacherTopK(k=4)]


def norms_of(batch: MicroBatch, objective: Objective) -> torch.Tensor:
    return hidden_gradient_norms(objective, batch.scored, batch.rollouts, batch.targets)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_norms_are_those_of_each_position_alone(objective: Objective) -> None:
    batch = micro_batch(0)
    norms = norms_of(batch, objective)
    mask = batch.rollouts.mask
    assert norms.dtype == torch.float64
    assert norms.shape == mask.shape
    assert not norms[~mask].any()
    losses = batch.losses(objective).losses[mask]
    for n, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, batch.hidden, retain_graph=True)
        others = torch.arange(len(losses)) != n
        assert not gradient[others].any()  # a position's loss depends on no other position's hidden state
        torch.testing.assert_close(norms[mask][n], gradient[n].norm())
    assert norms[mask].max() > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_the_step_under_way_is_left_alone(objective: Objective) -> None:
    gradients = []
    for asked in (False, True):
        batch = micro_batch(1)
        loss = batch.losses(objective).losses.sum()
        if asked:
            norms = norms_of(batch, objective)
            assert not norms.requires_grad
        assert batch.hidden.grad is None
        assert batch.head.weight.grad is None
        loss.backward()  # type: ignore[no-untyped-call]
        assert batch.head.bias is not None
        gradients.append([batch.hidden.grad, batch.head.weight.grad, batch.head.bias.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_norms_are_had_without_gradient_mode() -> None:
    batch = micro_batch(2)
    expected = norms_of(batch, OBJECTIVES[2])
    with torch.no_grad():
        assert torch.equal(norms_of(batch, OBJECTIVES[2]), expected)


class Asker(Callback):
    """Asks for the norms of every step, and keeps the traces."""

    def __init__(self) -> None:
        self.traces: list[object] = []

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:
        pl_module.request_gradient_norms()  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.traces.append(outputs["trace"])


def test_a_step_in_bf16_autocast_works(make_run: Callable[..., Run]) -> None:
    norms = []
    for precision in ("32-true", "bf16-mixed"):
        asker = Asker()
        run = make_run(callbacks=(asker,), lr=0.0)
        run.fit(1, precision=precision)
        (trace,) = asker.traces
        found = trace.gradient_norms  # type: ignore[attr-defined]
        assert found.dtype == torch.float32
        norms.append(found[trace.inputs.mask].double())  # type: ignore[attr-defined]
    assert norms[1].isfinite().all()
    # bf16 samples other rollouts, so only the scale is comparable.
    assert 0.5 < norms[1].mean() / norms[0].mean() < 2


def vocabulary_logits(model: Any, rollouts: Rollouts) -> torch.Tensor:
    """Of each response token, in float64."""
    tokens = torch.cat([rollouts.prompt_tokens, rollouts.tokens], 1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.mask], 1)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(tokens, attention_mask=mask.long(), position_ids=places).logits
    found: torch.Tensor = logits[:, rollouts.prompt_tokens.shape[1] - 1 : -1]
    return found


def shared(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.long()[..., None] == other.long()[..., None, :]).any(-1).double().mean())


def test_overlap_of_the_teachers_support_with_the_students(make_run: Callable[..., Run]) -> None:
    asker = Asker()
    run = make_run(callbacks=(asker,), objective=TeacherTopK(k=8), lr=0.0, max_new_tokens=20)
    run.fit(1)
    trace: StepTrace = asker.traces[0]  # type: ignore[assignment]
    mask = trace.rollouts.mask
    assert trace.overlap is not None
    assert len(trace.overlap) == int(mask.sum()) < 256
    top = vocabulary_logits(run.module.student.model, trace.rollouts)[mask].topk(8).indices
    assert trace.targets is not None
    assert trace.targets.support_ids is not None
    expected = shared(trace.targets.support_ids.long()[mask], top)
    assert 0.1 < expected < 1
    assert float(trace.overlap.mean()) == pytest.approx(expected, abs=2e-3)


def test_overlap_of_the_students_support_with_the_teachers(make_run: Callable[..., Run]) -> None:
    asker = Asker()
    objective = SupportDivergence("reverse_kl", "student", "bucket", k=8)
    data = {"reuse": ReuseConfig(prompts_per_pool=4, epochs=1, batch_size=8)}
    run = make_run(callbacks=(asker,), objective=objective, lr=0.0, max_new_tokens=6, data=data)
    run.fit(1)
    trace: StepTrace = asker.traces[0]  # type: ignore[assignment]
    assert trace.overlap is None
    rollouts, mask = trace.rollouts, trace.rollouts.mask
    top = vocabulary_logits(run.module.teacher.model.model, rollouts)[mask].topk(8).indices  # type: ignore[attr-defined]
    assert rollouts.behavior_support_ids is not None
    rank, length = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
    measured = (mask & ((rank == length // 4) | (rank == 3 * length // 4)))[mask]
    expected = shared(rollouts.behavior_support_ids.long()[mask][measured], top[measured])
    assert run.recorder.steps[1]["train/support_overlap"] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("objective", [SampledTokenOPD(), SupportDivergence("jsd", "union", "drop", k=4)])
def test_other_objectives_take_no_further_pass(make_run: Callable[..., Run], objective: Objective) -> None:
    asker = Asker()
    make_run(callbacks=(asker,), objective=objective, max_new_tokens=6).fit(1)
    assert asker.traces[0].overlap is None  # type: ignore[attr-defined]


def test_the_monitor_logs_the_overlap(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(callbacks=(GateMonitor(every_n_steps=2),), max_new_tokens=6)
    run.fit(3)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as text:
        found = {int(row["step"]): row["train/support_overlap"] for row in csv.DictReader(text)}
    assert [step for step, value in found.items() if value] == [2]
