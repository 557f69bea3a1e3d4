"""The gradient norms of a step, against one autograd call for each position."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from opdlab.diagnostics import hidden_gradient_norms
from opdlab.objectives import Objective, SampledTokenOPD, TeacherTopK
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
