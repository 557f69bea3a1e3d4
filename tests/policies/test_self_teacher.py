"""A teacher that is the student: frozen at the start, or its moving average."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from opdlab.errors import UsageError
from opdlab.policies import AdapterConfig, LanguageModel, SelfTeacher, TargetCache
from opdlab.toy import ChainProblems
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, Run

MakeRun = Callable[..., Run]


class Weights(Callback):
    """Keeps the student's trained weights at the start and after each step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.kept.append(trained(pl_module.student))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.kept.append(trained(pl_module.student))


def trained(model: LanguageModel) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if name not in model.frozen_keys}


def student(*, adapter: bool) -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(STUDENT, adapter=AdapterConfig(r=2, target_modules=["q_proj"]) if adapter else None)


def self_run(make_run: MakeRun, decay: float | None, *, adapter: bool, callbacks: tuple[Callback, ...] = ()) -> Run:
    data = {"train": ChainProblems(16, teacher_text="{solution}\n{problem}")}
    options = {"callbacks": callbacks, "student": student(adapter=adapter), "max_new_tokens": 12}
    return make_run(teacher=SelfTeacher(decay), data=data, **options)


@pytest.mark.usefixtures("peft_pair")
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("decay", [None, 0.0, 0.75])
def test_weights_are_those_of_the_start_or_their_average(
    make_run: MakeRun, tmp_path: Path, decay: float | None, adapter: bool
) -> None:
    watcher, path = Weights(), tmp_path / "inside.ckpt"
    run = self_run(make_run, decay, adapter=adapter, callbacks=(watcher,))
    run.trainer_options["callbacks"].append(SaveAt(path, 2))
    run.fit(5)
    assert isinstance(run.module.teacher, SelfTeacher)
    expected = watcher.kept[0]
    for weights in watcher.kept[1:]:
        if decay is not None:
            expected = {name: decay * expected[name] + (1 - decay) * weight for name, weight in weights.items()}
    own = trained(run.module.teacher.model)
    assert own.keys() == expected.keys()
    assert any(not torch.equal(own[name], watcher.kept[-1][name]) for name in own) == (decay != 0.0)
    for name, weight in own.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    resumed = self_run(make_run, decay, adapter=adapter)
    again = resumed.module.teacher
    assert isinstance(again, SelfTeacher)
    for parameter in again.state_dict().values():  # every value must come from the checkpoint
        parameter.add_(1.0)
    resumed.fit(5, ckpt_path=path)
    assert resumed.recorder.losses == run.recorder.losses[2:]
    assert all(torch.equal(weight, own[name]) for name, weight in trained(again.model).items())


def test_a_narrow_average_is_kept_in_float32() -> None:
    model = LanguageModel(STUDENT, dtype="bfloat16")
    teacher = SelfTeacher(decay=0.999)
    teacher.bind(model)
    before = trained(teacher.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    for _ in range(1000):
        teacher.after_step(model)
    state = teacher.state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    kept = 0.999**1000
    for name, weight in trained(model).items():  # a single step is below bfloat16's rounding
        expected = kept * before[name].float() + (1 - kept) * weight.float()
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(trained(teacher.model)[name], state[name].bfloat16())
    other = SelfTeacher(decay=0.999)
    other.bind(model)
    other.load_state_dict(state)
    assert all(torch.equal(weight, state[name]) for name, weight in other.state_dict().items())
    assert all(torch.equal(weight, trained(other.model)[name]) for name, weight in trained(teacher.model).items())


def test_wrong_use_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    for decay in (-0.1, 1.0):
        with pytest.raises(UsageError, match=f"decay is {decay}, but must be at least 0 and below 1"):
            SelfTeacher(decay)
    with pytest.raises(UsageError, match="batch_size is 0, but must be at least 1"):
        SelfTeacher(batch_size=0)
    path = tmp_path / "other.ckpt"
    run = make_run(max_new_tokens=8)
    run.trainer_options["callbacks"].append(SaveAt(path, 4))  # a buffer ends here: another teacher may follow
    run.fit(4)
    with pytest.raises(UsageError, match="SelfTeacher, but ckpt_path holds no weights of one: resume with the teacher"):
        self_run(make_run, None, adapter=False).fit(6, ckpt_path=path)


@pytest.mark.parametrize("kept", [False, True])
def test_an_equal_teacher_is_warned_of(make_run: MakeRun, tmp_path: Path, kept: bool) -> None:
    teacher = TargetCache(SelfTeacher(), str(tmp_path / "targets")) if kept else SelfTeacher()
    run = make_run(teacher=teacher, max_new_tokens=8)
    with pytest.warns(UserWarning, match="starts as the student's equal and teaches it nothing"):
        run.fit(1)
    assert run.recorder.losses[0] == pytest.approx(0, abs=1e-6)
