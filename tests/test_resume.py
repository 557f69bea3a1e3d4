"""A stopped run resumes as if it had not been stopped: the same losses, bit for bit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from opdlab.callbacks import StopCheckpoint
from opdlab.checkpoints import check_checkpoint
from opdlab.errors import UsageError
from opdlab.processes import STOP_SIGNALS
from tests.toy_run import Run

MakeRun = Callable[..., Run]


class SaveAt(Callback):
    """Writes a checkpoint at the end of one micro-batch, as the last callback of the step."""

    def __init__(self, path: Path, micro_batch: int) -> None:
        self.path, self.micro_batch = path, micro_batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.micro_batch -= 1
        if self.micro_batch == 0:
            trainer.save_checkpoint(self.path)


# A buffer lasts 4 steps, the snapshot is refreshed every 3, and an epoch has 2 buffers. Steps 2 and 5 lie inside a
# buffer, 4 at the end of one, 8 at the end of an epoch.
@pytest.mark.parametrize(
    ("accumulate", "micro_batch"),
    [(1, 2), (1, 4), (1, 5), (1, 8), (4, 8), (4, 9), (4, 11), (4, 22)],
    ids=lambda value: str(value),
)
def test_resume_is_bit_for_bit(make_run: MakeRun, tmp_path: Path, accumulate: int, micro_batch: int) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = make_run(accumulate=accumulate)
    whole.trainer_options["callbacks"].append(SaveAt(path, micro_batch))
    whole.fit(10)
    resumed = make_run(accumulate=accumulate)
    for parameter in resumed.module.parameters():  # every value of the module must come from the checkpoint
        parameter.data.add_(1.0)
    resumed.fit(10, ckpt_path=path)
    done = micro_batch // accumulate
    assert len(resumed.recorder.steps) == 10 - done
    assert resumed.recorder.losses == whole.recorder.losses[done:]
    timed = {"time/", "train/tokens_per_second", "rollout/sampled_tokens_per_second"}
    for step, metrics in resumed.recorder.steps.items():
        for name, value in metrics.items():
            if not any(name.startswith(prefix) for prefix in timed):
                assert value == whole.recorder.steps[step][name], (step, name)
    for ours, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoints_hold_only_tensors_and_plain_values(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run = make_run(accumulate=2)
    run.trainer_options["callbacks"].append(SaveAt(path, 3))
    run.fit(2)
    checkpoint = torch.load(path, weights_only=True)
    assert any(name.startswith("behavior.") for name in checkpoint["state_dict"])
    assert checkpoint["opdlab"]["gradients"]


class SendSignal(Callback):
    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for _ in range(2 if batch_idx == 5 else 0):  # simultaneous signals count as one
            signal.raise_signal(self.signum)


@pytest.mark.parametrize(("accumulate", "signum"), [(4, signal.SIGINT), *((1, signum) for signum in STOP_SIGNALS)])
def test_a_signal_finishes_the_step_and_saves(
    make_run: MakeRun, tmp_path: Path, accumulate: int, signum: signal.Signals
) -> None:
    whole = make_run(accumulate=accumulate)
    whole.fit(8)
    interrupt = StopCheckpoint(str(tmp_path / "saved"))
    stopped = make_run(accumulate=accumulate)
    stopped.trainer_options["callbacks"] += [SendSignal(signum), interrupt]
    stopped.trainer_options["enable_checkpointing"] = True
    before = signal.getsignal(signal.SIGINT)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(SystemExit):
            stopped.fit(8)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
        signal.signal(signal.SIGHUP, hangup)
    assert interrupt.path is not None
    resumed = make_run(accumulate=accumulate)
    resumed.fit(8, ckpt_path=interrupt.path)
    done = 6 // accumulate
    assert resumed.recorder.losses == whole.recorder.losses[done:]


@pytest.mark.parametrize("steps", [3, 4])  # inside a buffer, and at its end
def test_a_finished_run_can_be_made_longer(make_run: MakeRun, tmp_path: Path, steps: int) -> None:
    whole = make_run()
    whole.fit(8)
    stop = StopCheckpoint(str(tmp_path / "saved"))
    short = make_run(callbacks=(stop,))
    short.trainer_options["enable_checkpointing"] = True
    short.fit(steps)
    assert stop.path == tmp_path / "saved" / "final.ckpt"
    longer = make_run()
    longer.fit(8, ckpt_path=stop.path)
    assert longer.recorder.losses == whole.recorder.losses[steps:]


def test_the_last_step_is_not_saved_twice(make_run: MakeRun, tmp_path: Path) -> None:
    regular = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2)
    run = make_run(callbacks=(regular, StopCheckpoint(str(tmp_path / "saved"))))
    run.trainer_options["enable_checkpointing"] = True
    run.fit(4)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == [Path(regular.best_model_path).name]


def test_a_checkpoint_of_another_model_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run = make_run()
    run.trainer_options["callbacks"].append(SaveAt(path, 1))
    run.fit(1)
    checkpoint = torch.load(path, weights_only=True)
    name = "student.model.model.norm.weight"
    checkpoint["state_dict"][name] = torch.ones(7)
    torch.save(checkpoint, path)
    with pytest.raises(UsageError, match=r"another model: student.model.model.norm.weight is \(7,\) in it and \(96,\)"):
        make_run().fit(2, ckpt_path=path)
    del checkpoint["opdlab"]
    torch.save(checkpoint, path)
    with pytest.raises(UsageError, match="did not write"):
        make_run().fit(2, ckpt_path=path)


def test_a_truncated_checkpoint_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run = make_run()
    run.trainer_options["callbacks"].append(SaveAt(path, 1))
    run.fit(1)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(UsageError, match="cannot be read"):
            check_checkpoint(path)
