"""A stopped run resumes as if it had not been stopped: the same losses, bit for bit."""

import csv
import json
import os
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from opdlab.callbacks import SampleLogger, StopCheckpoint
from opdlab.checkpoints import check_checkpoint, find_checkpoint
from opdlab.data import ReuseConfig
from opdlab.errors import UsageError
from opdlab.objectives import SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import LocalTeacher
from opdlab.processes import STOP_SIGNALS
from opdlab.viewer import INDEX, page_name
from tests.toy_run import STUDENT, Run

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
CASES = [(1, 2), (1, 4), (1, 5), (1, 8), (4, 8), (4, 9), (4, 11), (4, 22)]


@pytest.mark.parametrize(
    ("accumulate", "micro_batch", "support"),
    [*((*case, None) for case in CASES), (1, 2, "union"), (4, 9, "student")],
    ids=lambda value: str(value),
)
def test_resume_is_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, accumulate: int, micro_batch: int, support: Any
) -> None:
    path = tmp_path / "stopped.ckpt"
    objective = None if support is None else SupportDivergence(support=support, k=8)
    whole = make_run(accumulate=accumulate, objective=objective)
    whole.trainer_options["callbacks"].append(SaveAt(path, micro_batch))
    whole.fit(10)
    resumed = make_run(accumulate=accumulate, objective=objective)
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


class Ids(Callback):
    """Keeps the rollouts of each optimizer step, in a file of each process if there are several."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.steps: dict[int, list[int]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = outputs["trace"].step + 1
        self.steps.setdefault(number, []).extend(batch.rollouts.rollout_ids.tolist())
        if self.folder is not None:
            lines = [f"{step} {ids}" for step, ids in self.steps.items()]
            (self.folder / f"ids-{trainer.global_rank}").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("before", "after", "micro_batch"),
    [(1, 4, 2), (1, 4, 4), (1, 2, 5), (1, 4, 8), (4, 1, 8), (4, 2, 9), (4, 1, 11), (4, 1, 16), (4, 8, 22), (2, 1, 1)],
)
def test_another_accumulation_trains_on_exactly_what_was_left(
    make_run: MakeRun, tmp_path: Path, before: int, after: int, micro_batch: int
) -> None:
    path, seen = tmp_path / "stopped.ckpt", [Ids(), Ids()]
    whole = make_run(accumulate=before, callbacks=(seen[0],))
    whole.trainer_options["callbacks"].append(SaveAt(path, micro_batch))
    whole.fit(10)
    resumed = make_run(accumulate=after, callbacks=(seen[1],))
    resumed.fit(10, ckpt_path=path)
    done = micro_batch // before
    assert seen[1].steps == {step: ids for step, ids in seen[0].steps.items() if step > done}
    assert resumed.recorder.losses == pytest.approx(whole.recorder.losses[done:], rel=2e-3)


def test_other_batches_and_passes_inside_a_buffer(make_run: MakeRun, tmp_path: Path) -> None:
    path, seen = tmp_path / "stopped.ckpt", [Ids(), Ids()]
    whole = make_run(callbacks=(seen[0],))
    whole.trainer_options["callbacks"].append(SaveAt(path, 1))
    whole.fit(8)
    reuse = ReuseConfig(prompts_per_pool=8, epochs=1, batch_size=4)
    resumed = make_run(callbacks=(seen[1],), data={"reuse": reuse})
    trainer = resumed.fit(7, ckpt_path=path)
    batches = list(seen[1].steps.values())
    assert batches[0] + batches[1] == seen[0].steps[2]  # what was left of the first pass
    assert sorted(chain.from_iterable(batches[2:])) == list(range(16, 32))  # one pass over the next buffer
    assert trainer.current_epoch == 1


@pytest.fixture
def stopped_at(make_run: MakeRun, tmp_path: Path) -> Callable[[int], Path]:
    """Checkpoints of a run: at step 2 inside a buffer, at step 4 at its end."""

    def path(step: int) -> Path:
        return tmp_path / f"{step}.ckpt"

    run = make_run(callbacks=(SaveAt(path(2), 2), SaveAt(path(4), 4)))
    run.fit(4)
    return path


SGD: dict[str, Any] = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)}
SCHEDULED: dict[str, Any] = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)}
NEVER: tuple[tuple[dict[str, Any], str], ...] = (
    (SGD, r"model.optimizer is torch.optim.sgd.SGD, but torch.optim.adamw.AdamW in ckpt_path"),
    ({"lr": 1e-2}, r"model.optimizer.lr is 0.01, but 0.001 in ckpt_path"),
    (SCHEDULED, r"model.lr_scheduler is torch.*StepLR, but None in ckpt_path"),
    ({"data": {"seed": 1}}, r"data.seed \(seed_everything, if it is null\) is 1, but 0 in ckpt_path"),
    ({"data": {"max_prompt_tokens": 100}}, r"data.max_prompt_tokens is 100, but 2048 in ckpt_path"),
    ({"num_problems": 17}, r"data.train is 17 prompts with digest \w+, but 16 prompts with digest \w+ in ckpt_path"),
)
AT_THE_END: tuple[tuple[dict[str, Any], str], ...] = (
    ({"objective": SampledTokenOPD()}, r"model.objective is .*SampledTokenOPD, but .*TeacherTopK in ckpt_path"),
    ({"objective": TeacherTopK(k=4)}, r"model.objective.k is 4, but 8 in ckpt_path"),
    ({"sampling": {"num_samples": 4}}, r"model.sampling.num_samples is 4, but 2 in ckpt_path"),
    ({"sampling": {"temperature": 0.7}}, r"model.sampling.temperature is 0.7, but 1.0 in ckpt_path"),
    ({"max_new_tokens": 20}, r"model.sampling.max_new_tokens is 20, but 40 in ckpt_path"),
    ({"mask_first": ["1"]}, r"model.mask_first is \['1'\], but \[\] in ckpt_path"),
    ({"teacher": LocalTeacher(STUDENT)}, r"model.teacher \(its weights\) is \w+, but \w+ in ckpt_path"),
    ({"data": {"reuse": ReuseConfig(4, 2, 8)}}, r"data.reuse.prompts_per_pool is 4, but 8 in ckpt_path"),
)


def test_what_may_not_change_is_refused_in_one_line(make_run: MakeRun, stopped_at: Callable[[int], Path]) -> None:
    for inside, cases in ((True, AT_THE_END + NEVER), (False, NEVER)):
        for changes, words in cases:
            run = make_run(**changes)
            before = run.module.student.state_dict()["model.lm_head.weight"].clone()
            with pytest.raises(UsageError, match=words) as refused:
                run.fit(8, ckpt_path=stopped_at(2 if inside else 4))
            assert "\n" not in str(refused.value)
            assert "may change: trainer.max_steps, trainer.accumulate_grad_batches" in str(refused.value)
            assert torch.equal(before, run.module.student.state_dict()["model.lm_head.weight"])


def test_the_support_may_not_change_inside_a_buffer(make_run: MakeRun, tmp_path: Path) -> None:
    path, whose = (
        tmp_path / "cut.ckpt",
        r"model.objective \(tokens of the snapshot in its support\) is 8, but 0 in ckpt",
    )
    make_run(objective=SupportDivergence(support="teacher", k=8)).fit(2).save_checkpoint(path)
    for changed in ("union", "student"):
        with pytest.raises(UsageError, match=whose if changed == "union" else r"model.objective.k is 0, but 8"):
            make_run(objective=SupportDivergence(support=changed, k=8)).fit(6, ckpt_path=path)


@pytest.mark.parametrize("changes", [changes for changes, _ in AT_THE_END], ids=list)
def test_what_may_change_where_a_buffer_ends(
    make_run: MakeRun, stopped_at: Callable[[int], Path], changes: dict[str, Any]
) -> None:
    seen = Ids()
    run = make_run(callbacks=(seen,), **changes)
    run.fit(6, ckpt_path=stopped_at(4))
    assert list(seen.steps) == [5, 6]
    assert min(min(ids) for ids in seen.steps.values()) >= 16  # ids of the first buffer are not used again


@pytest.mark.parametrize("gate", ["none", "span", "token"])
def test_a_gate_may_change_inside_a_buffer(make_run: MakeRun, stopped_at: Callable[[int], Path], gate: str) -> None:
    run = make_run(gate=gate, reduction="sequence_mean")
    run.fit(3, ckpt_path=stopped_at(2))
    assert len(run.recorder.losses) == 1


def test_a_run_that_ends_before_its_checkpoint_is_refused(make_run: MakeRun, stopped_at: Callable[[int], Path]) -> None:
    with pytest.raises(UsageError, match="trainer.max_steps is 3, but ckpt_path has done 4: give at least 4"):
        make_run().fit(3, ckpt_path=stopped_at(4))


def test_a_checkpoint_of_an_older_version_is_refused(make_run: MakeRun, stopped_at: Callable[[int], Path]) -> None:
    checkpoint = torch.load(stopped_at(2), weights_only=True)
    checkpoint["opdlab"] = {"gradients": {}, "records": []}
    torch.save(checkpoint, stopped_at(2))
    with pytest.raises(UsageError, match="written by another version of opdlab"):
        make_run().fit(8, ckpt_path=stopped_at(2))


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points of a metric in the newest log under a folder."""
    newest = max(folder.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime_ns)
    with newest.open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


class SaveAfterEvaluation(Callback):
    """Writes a checkpoint after the evaluation at a step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("step", [4, 8])  # 8 ends a pass over the prompts
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_evaluation_that_a_checkpoint_lacks_is_made_up_for(
    make_run: MakeRun, tmp_path: Path, before: int, after: int, step: int, evaluated: bool
) -> None:
    path = tmp_path / "stopped.ckpt"
    saving = SaveAfterEvaluation(path, step) if evaluated else SaveAt(path, step * before)

    def run(accumulate: int, *callbacks: Callback, ckpt_path: Path | None = None) -> tuple[list[Any], list[Any]]:
        options = {"limit_val_batches": 1.0, "val_check_interval": 4 * accumulate, "check_val_every_n_epoch": None}
        made = make_run(accumulate=accumulate, callbacks=callbacks)
        made.fit(9, num_sanity_val_steps=0, ckpt_path=ckpt_path, logger=CSVLogger(tmp_path), **options)
        return curve(tmp_path, "train/loss"), curve(tmp_path, "val/toy/length")

    losses, lengths = run(before, saving)
    assert [at for at, _ in losses] == list(range(1, 10))
    assert [at for at, _ in lengths] == [4, 8]
    resumed_losses, resumed_lengths = run(after, ckpt_path=path)
    assert [at for at, _ in resumed_losses] == list(range(step + 1, 10))
    assert [at for at, _ in resumed_lengths] == [at for at in (4, 8) if at > step or (at == step and not evaluated)]
    if before == after:
        assert resumed_losses == losses[step:]
        assert all(point in lengths for point in resumed_lengths)


class ReadsTheLog(SaveAt):
    """Keeps the last step of the log as it is when a checkpoint has just been written."""

    def __init__(self, path: Path, micro_batch: int, folder: Path) -> None:
        super().__init__(path, micro_batch)
        self.folder = folder
        self.found: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        if self.micro_batch == 0:
            self.found = curve(self.folder, "train/loss")


def test_metrics_are_on_disk_before_the_checkpoint_of_their_step(make_run: MakeRun, tmp_path: Path) -> None:
    reader = ReadsTheLog(tmp_path / "stopped.ckpt", 3, tmp_path)
    make_run(callbacks=(reader,)).fit(4)
    assert reader.found == curve(tmp_path, "train/loss")[:3]
    assert [step for step, _ in reader.found] == [1, 2, 3]


def test_the_last_evaluation_has_the_step_of_the_run_also_after_a_resume(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    for saving, ckpt_path in (((SaveAt(path, 4),), None), ((), path)):
        run = make_run(callbacks=saving)
        trainer = run.fit(
            4,
            ckpt_path=ckpt_path,
            limit_val_batches=1.0,
            val_check_interval=100,
            logger=CSVLogger(tmp_path),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
        )
        trainer.validate(run.module, datamodule=run.data, verbose=False)
        assert [step for step, _ in curve(tmp_path, "val/toy/length")] == [4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_goes_on_with_another_number_of_processes(make_run: MakeRun, tmp_path: Path) -> None:
    def run(*callbacks: Callback, devices: int, **options: Any) -> list[list[int]]:
        made = make_run(callbacks=(Ids(tmp_path), *callbacks))
        made.fit(6, strategy="ddp_fork" if devices > 1 else "auto", devices=devices, **options)
        files = [(tmp_path / f"ids-{rank}").read_text().splitlines() for rank in range(devices)]
        steps = [[json.loads(line.split(" ", 1)[1]) for line in lines] for lines in files]
        return [list(chain(*parts)) for parts in zip(*steps, strict=True)]  # of a step, the first process's rows first

    def cuts(devices: int) -> list[Path]:
        return [tmp_path / f"{devices}-{step}.ckpt" for step in (2, 4)]  # inside a buffer, and where one ends

    whole = run(*(SaveAt(path, step) for path, step in zip(cuts(1), (2, 4), strict=True)), devices=1)
    assert run(*(SaveAt(path, step) for path, step in zip(cuts(2), (2, 4), strict=True)), devices=2) == whole
    for before, after in ((1, 2), (2, 1)):
        for path, step in zip(cuts(before), (2, 4), strict=True):
            assert run(devices=after, ckpt_path=path) == whole[step:]


def test_checkpoints_hold_only_tensors_and_plain_values(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    run = make_run(accumulate=2)
    run.trainer_options["callbacks"].append(SaveAt(path, 3))
    run.fit(2)
    checkpoint = torch.load(path, weights_only=True)
    assert any(name.startswith("behavior.") for name in checkpoint["state_dict"])
    assert checkpoint["opdlab"]["settings"]["run"]["data.max_prompt_tokens"] == 2048


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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_goes_on_from_an_earlier_step_leaves_its_later_ones_behind(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "lightning_logs/version_0/checkpoints"

    def run(steps: int, ckpt_path: Path | None = None, gate: str = "block32") -> None:
        every = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}")
        made = make_run(callbacks=(every, StopCheckpoint(), SampleLogger(2)), gate=gate)
        logger = TensorBoardLogger(tmp_path, "lightning_logs", version=0)
        made.fit(steps, ckpt_path=ckpt_path, enable_checkpointing=True, logger=logger)

    def pages() -> list[str]:
        return sorted(page.name for page in (folder.parent / "rollouts").glob("step-*.html"))

    run(6)
    abandoned = (folder / "step=6.ckpt").read_bytes()
    assert pages() == [page_name(step) for step in (2, 4, 6)]
    run(3, folder / "step=2.ckpt", gate="none")
    assert find_checkpoint("last", tmp_path / "lightning_logs") == folder / "final.ckpt"
    assert (folder / "step=6.ckpt.before-resume").read_bytes() == abandoned
    assert "step=4.ckpt (step 4), step=6.ckpt (step 6) renamed to *.ckpt.before-resume" in caplog.text
    assert pages() == [page_name(2)]
    assert page_name(4) not in (folder.parent / "rollouts" / INDEX).read_text()
    run(4, folder / "step=2.ckpt")
    run(3, folder / "step=2.ckpt")
    assert (folder / "step=4.ckpt.before-resume1").exists()  # nothing is written over


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
