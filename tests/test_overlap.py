"""Sampling beside training: the same rollouts as one after the other, whatever interrupts, fails or stops it."""

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from opdlab.callbacks import StopCheckpoint
from opdlab.cli.memory_parts import estimate
from opdlab.cli.parsing import parse_fit
from opdlab.data import DemonstrationConfig, ReuseConfig
from opdlab.errors import UsageError
from opdlab.module import BehaviorConfig, OPDModule
from opdlab.objectives import SupportDivergence
from opdlab.out_of_memory import out_of_memory
from opdlab.policies import (
    AdapterConfig,
    BehaviorPolicy,
    LanguageModel,
    Samples,
    SamplingConfig,
    TransformersSampler,
)
from opdlab.policies.decoding import NonFiniteLogitsError
from opdlab.progress import Progress
from opdlab.rollouts import Collector, Pool
from opdlab.training.sharded_strategy import ShardedStrategy
from opdlab.types import Prompt
from tests.stops import Stopper
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, Run

MakeRun = Callable[..., Run]
# A buffer lasts 4 steps, and a pass over the prompts 2 buffers.
AHEAD: dict[str, Any] = {"data": {"reuse": ReuseConfig(8, 2, 8, overlap=1)}, "max_new_tokens": 8}
PLAIN: dict[str, Any] = {"data": {"reuse": ReuseConfig(8, 2, 8)}, "max_new_tokens": 8}
CLOCKS = ("time/", "train/tokens_per_second", "rollout/sampled_tokens_per_second", "rollout/hidden_share")


def in_worker() -> bool:
    return threading.current_thread() is not threading.main_thread()


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "sampling ahead"]


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    assert not workers()


class Watched(TransformersSampler):
    """Samples in the worker as slowly as told, and notes who uses it when.

    Args:
        seconds: that the worker sleeps after each token.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.events: list[str] = []

    def refresh(self, model: LanguageModel, step: int) -> None:
        self.events.append(f"{'worker' if in_worker() else 'main'} refreshes")
        super().refresh(model, step)

    def sample(
        self, prompts: Sequence[Sequence[int]], streams: Tensor, config: SamplingConfig, progress: Progress
    ) -> Samples:
        who = "worker" if in_worker() else "main"
        self.events.append(f"{who} begins")
        samples = super().sample(prompts, streams, config, _Slowed(progress, self.seconds))
        self.events.append(f"{who} ends")
        return samples

    @property
    def sampled(self) -> int:
        return len([event for event in self.events if event.endswith("ends")])


class _Slowed:
    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress, self._seconds = progress, seconds

    def task(self, name: str, total: int) -> Any:
        progress, seconds = self._progress, self._seconds

        class Task:
            def __enter__(self) -> Callable[[int], None]:
                self._task = progress.task(name, total)
                advance = self._task.__enter__()

                def slowly(count: int) -> None:
                    time.sleep(seconds if in_worker() else 0.0)
                    advance(count)

                return slowly

            def __exit__(self, *error: Any) -> Any:
                return self._task.__exit__(*error)

        return Task()


# -- the same rollouts ------------------------------------------------------------------------------------------------


class OneAfterTheOther(OPDModule):
    """Samples each buffer when it begins, from a copy of the snapshot that was made when the buffer before began."""

    copied: tuple[BehaviorPolicy, int] | None = None

    def collect(self, prompts: Sequence[Prompt], *, first_batch: Tensor, **options: Any) -> Pool:
        source, unscored, step = self.behavior, None, self.global_step
        if self._refreshes:
            self.behavior.refresh(self.student, step)
        if self.copied is not None:
            source, sampled_at = self.copied
        else:
            sampled_at = step
            unscored = first_batch if source.equals(self.student) else None
        collector = Collector(source, self.teacher, self.request)
        autocast = self.trainer.precision_plugin.forward_context
        pool = collector.collect(prompts, step=sampled_at, unscored=unscored, autocast=autocast, **options)
        self.copied = copy.deepcopy(self.behavior), step
        return pool


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "refreshed inside a buffer": {"refresh": 3},
    "accumulation, union": {"refresh": 3, "accumulate": 2, "objective": SupportDivergence(support="union", k=8)},
    "demonstrations": {"demonstrations": DemonstrationConfig(0.5, "solution")},
    "narrow and offloaded": {"behavior": BehaviorConfig(dtype="bfloat16", offload=True)},
    "autocast": {"precision": "bf16-mixed"},
}
AGES = {None: [0, 1, 2, 3, 4, 5, 6, 7, 4, 5], 3: [0, 1, 2, 3, 4, 5, 6, 7, 5, 6]}


def same_runs(make_run: MakeRun, options: dict[str, Any]) -> None:
    demonstrations = {"demonstrations": options.pop("demonstrations")} if "demonstrations" in options else {}
    precision = options.pop("precision", "32-true")
    options = {"refresh": None, **options}
    runs = []
    for given, module in ((AHEAD, OPDModule), (PLAIN, OneAfterTheOther)):
        data = {**given["data"], **demonstrations}
        run = make_run(**{**given, **copy.deepcopy(options), "data": data, "module": module})
        run.fit(10, precision=precision)
        runs.append(run)
    ahead, sequential = runs
    assert len(ahead.recorder.steps) == 10
    for step, metrics in sequential.recorder.steps.items():
        compared = {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}
        found = ahead.recorder.steps[step]
        assert compared == {name: value for name, value in found.items() if not name.startswith(CLOCKS)}, step
        assert set(found) - set(metrics) == {"time/sample_wait_seconds", "rollout/hidden_share"}
        assert found["rollout/age"] == AGES[options["refresh"]][step - 1]
    for ours, theirs in zip(ahead.module.parameters(), sequential.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    logged = ahead.recorder.steps
    assert logged[1]["rollout/hidden_share"] == 0.0
    assert logged[1]["train/drift/max"] == 0.0 or "behavior" in options
    assert logged[5]["rollout/hidden_share"] > 0.0
    assert logged[5]["train/drift/max"] > 1e-3  # not fresh at its first step


@pytest.mark.parametrize("name", CASES)
def test_buffers_are_those_that_are_sampled_one_after_the_other(make_run: MakeRun, name: str) -> None:
    same_runs(make_run, dict(CASES[name]))


@pytest.mark.usefixtures("peft_pair")
def test_the_copy_of_an_adapter_shares_the_weights_below(make_run: MakeRun) -> None:
    adapter = AdapterConfig(r=2, target_modules=["q_proj", "lm_head"])
    same_runs(make_run, {"student": LanguageModel(STUDENT, adapter=adapter), "refresh": 3})
    behavior = BehaviorPolicy(LanguageModel(STUDENT, adapter=adapter), SamplingConfig())
    twin = behavior.twin()
    assert twin.sampler is behavior.sampler
    for (name, own), other in zip(twin.policy.named_parameters(), behavior.policy.parameters(), strict=True):
        assert (own is other) == ("lora_" not in name)
        assert torch.equal(own, other)


def test_without_overlap_there_is_no_worker_and_no_trace_of_one(make_run: MakeRun, tmp_path: Path) -> None:
    sampler, path = Watched(), tmp_path / "plain.ckpt"
    run = make_run(**PLAIN, refresh=None, sampler=sampler)
    run.trainer_options["callbacks"].append(SaveAt(path, 6))
    trainer = run.fit(6)
    assert set(sampler.events) == {"main refreshes", "main begins", "main ends"}
    assert run.module.ahead is None
    assert not [each for each in trainer.callbacks if "StopSampling" in repr(each)]  # type: ignore[attr-defined]
    assert not {"time/sample_wait_seconds", "rollout/hidden_share"} & run.recorder.steps[5].keys()
    assert "ahead" not in torch.load(path, weights_only=True)["opdlab"]
    assert [step["rollout/age"] for _, step in sorted(run.recorder.steps.items())] == [0, 1, 2, 3, 0, 1]


# -- how much is sampled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "steps", "buffers"),
    [
        ({"max_steps": 4}, 4, 1),
        ({"max_steps": 5}, 5, 2),
        ({"max_steps": 8}, 8, 2),
        ({"max_steps": -1, "max_epochs": 1}, 8, 2),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3}, 6, 2),
    ],
)
def test_nothing_is_sampled_that_is_not_used(
    make_run: MakeRun, limits: dict[str, Any], steps: int, buffers: int
) -> None:
    sampler = Watched()
    run = make_run(**AHEAD, refresh=None, sampler=sampler)
    run.fit(**limits)
    assert len(run.recorder.steps) == steps
    assert sampler.sampled == buffers


def test_an_end_that_was_not_foreseen_stops_the_worker(make_run: MakeRun) -> None:
    class Early(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    sampler = Watched(seconds=0.5)
    run = make_run(**AHEAD, refresh=None, sampler=sampler, callbacks=(Early(),))
    run.fit(
        20, limit_val_batches=1.0, num_sanity_val_steps=0
    )  # the last evaluation does not wait for the buffer either
    assert len(run.recorder.steps) == 2
    assert sampler.events.count("worker begins") == 1
    assert "worker ends" not in sampler.events


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refresh", "step", "weights"), [(None, 2, False), (None, 4, False), (3, 7, True), (3, 8, True)]
)
def test_resume_is_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, refresh: int | None, step: int, weights: bool
) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = make_run(**AHEAD, refresh=refresh)
    whole.trainer_options["callbacks"].append(SaveAt(path, step))
    whole.fit(10)
    state = torch.load(path, weights_only=True)["opdlab"]["ahead"]
    assert (state["copy"] is not None) == weights  # only where the snapshot has been refreshed since
    assert state["step"] == (step - 1) // 4 * 4
    resumed = make_run(**AHEAD, refresh=refresh)
    for parameter in resumed.module.parameters():  # every value of the module must come from the checkpoint
        parameter.data.add_(1.0)
    resumed.fit(10, ckpt_path=path)
    assert sorted(resumed.recorder.steps) == list(range(step + 1, 11))
    for number, metrics in resumed.recorder.steps.items():
        for name, value in metrics.items():
            assert name.startswith(CLOCKS) or value == whole.recorder.steps[number][name], (number, name)
    for ours, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_finished_run_can_be_made_longer(make_run: MakeRun, tmp_path: Path) -> None:
    """Nothing was sampled beside its last buffer, but the copy was made."""
    whole = make_run(**AHEAD, refresh=3)
    whole.fit(6)
    stop = StopCheckpoint(str(tmp_path / "saved"))
    short = make_run(**AHEAD, refresh=3, callbacks=(stop,))
    short.trainer_options["enable_checkpointing"] = True
    short.fit(4)
    longer = make_run(**AHEAD, refresh=3)
    longer.fit(6, ckpt_path=stop.path)
    assert longer.recorder.losses == whole.recorder.losses[4:]
    assert longer.recorder.steps[5]["rollout/age"] == 4


@pytest.mark.parametrize("step", [2, 4])
def test_overlap_may_change_at_any_checkpoint(make_run: MakeRun, tmp_path: Path, step: int) -> None:
    def run(given: dict[str, Any], ckpt_path: Path | None = None) -> list[float]:
        made = make_run(**given, refresh=None)
        path = tmp_path / f"{given['data']['reuse'].overlap}.ckpt"
        made.trainer_options["callbacks"] += [] if ckpt_path else [SaveAt(path, step)]
        made.fit(10, ckpt_path=ckpt_path)
        return [metrics["rollout/age"] for _, metrics in sorted(made.recorder.steps.items())]

    run(AHEAD), run(PLAIN)
    assert run(PLAIN, tmp_path / "1.ckpt") == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1][step:]
    assert run(AHEAD, tmp_path / "0.ckpt") == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5][step:]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UsageError("http://localhost:1 does not answer: start the server"), "http://localhost:1 does not answer: sta"),
        (NonFiniteLogitsError(), "sampling at step 0: the logits of the model are NaN"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "allocate 8 bytes"),
        (KeyError("broken on purpose"), "broken on purpose"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_worker_ends_the_run_when_its_buffer_is_needed(
    make_run: MakeRun, error: Exception, words: str
) -> None:
    class Broken(Watched):
        def sample(self, *arguments: Any) -> Samples:
            if in_worker():
                raise error
            return super().sample(*arguments)

    run = make_run(**AHEAD, refresh=None, sampler=Broken())
    with pytest.raises(type(error), match=words) as caught:
        run.fit(10, limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=0)
    assert len(run.recorder.steps) == 4
    if isinstance(error, RuntimeError) and not isinstance(error, UsageError):
        line = out_of_memory(caught.value)
        assert line is not None
        assert line.startswith("out of memory on the host while sampling rollouts")


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "count", "steps"), [("on_train_batch_start", 2, 2), ("waiting", 3, 4)])
def test_a_signal_ends_the_worker_soon_and_the_run_goes_on_as_if_it_had_not_come(
    make_run: MakeRun, tmp_path: Path, place: str, count: int, steps: int
) -> None:
    class Waiting(Stopper):
        """Sends the signal while the main thread waits for the worker, whose progress it shows."""

        def task(self, name: str, total: int) -> Any:
            self.place = "sampling" if workers() else "waiting"
            return super().task(name, total)

    whole = make_run(**AHEAD, refresh=3)
    whole.fit(9)
    stop = StopCheckpoint(str(tmp_path / "saved"))
    stopper = (Waiting if place == "waiting" else Stopper)(place, count=count)
    stopped = make_run(**AHEAD, refresh=3, sampler=Watched(seconds=3.0), callbacks=(stopper, stop))
    stopped.trainer_options["enable_checkpointing"] = True
    started, before = time.monotonic(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            stopped.fit(9)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert time.monotonic() - started < 20.0  # the worker alone would take 24 s and more
    assert len(stopped.recorder.steps) == steps
    assert not workers()
    assert stop.path is not None
    resumed = make_run(**AHEAD, refresh=3)
    resumed.fit(9, ckpt_path=stop.path)
    assert resumed.recorder.losses == whole.recorder.losses[steps:]


# -- evaluations ------------------------------------------------------------------------------------------------------


def test_an_evaluation_waits_for_the_worker(make_run: MakeRun) -> None:
    values: list[dict[str, float]] = []

    class Values(Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            metrics = trainer.callback_metrics.items()
            values.append({name: float(value) for name, value in metrics if name.startswith("val/")})

    plain = make_run(**AHEAD, refresh=3)
    plain.fit(8)
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 0}
    for sampler in (Watched(seconds=0.02), None):
        run = make_run(**AHEAD, refresh=3, sampler=sampler, callbacks=(Values(),))
        run.fit(8, **options)
        assert run.recorder.losses == plain.recorder.losses
        if sampler is None:
            continue
        # Whoever refreshes the sampler samples before another one does: three evaluations, two of them in one buffer.
        events = sampler.events
        assert events.count("worker ends") == 1
        for first, second in zip(events[::3], events[2::3], strict=True):
            assert (first.split()[1], second.split()[1]) == ("refreshes", "ends")
            assert first.split()[0] == second.split()[0]
    assert len(values) == 8
    assert values[:4] == values[4:]


# -- what is refused, and memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [-1, 2])
def test_more_than_one_buffer_ahead_is_refused(overlap: int) -> None:
    with pytest.raises(UsageError, match=f"overlap is {overlap}, but must be 0, or 1 to sample the next rollout bu"):
        ReuseConfig(overlap=overlap)


@pytest.mark.parametrize(
    ("strategy", "compiles", "words"),
    [
        (ShardedStrategy(), False, "but trainer.strategy model_parallel shards the weights over the processes, which"),
        ("auto", True, "but model.student.compile is true, and while torch compiles, no other thread may use a model"),
    ],
)
def test_overlap_is_refused_where_no_thread_can_sample(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, strategy: Any, compiles: bool, words: str
) -> None:
    monkeypatch.setattr(LanguageModel, "compiles", compiles)  # without the compiler that it needs
    run = make_run(**AHEAD)
    trainer: Any = pl.Trainer(**{**run.trainer_options, "strategy": strategy})
    run.module.trainer = run.data.trainer = trainer
    trainer.datamodule = run.data
    with pytest.raises(UsageError, match=f"data.reuse.overlap is 1, {words}"):
        run.module.setup("fit")


@pytest.mark.parametrize("options", [[], ["--model.behavior.offload", "true"], ["--model.behavior.dtype", "bfloat16"]])
def test_the_copy_and_what_runs_beside_are_counted(options: list[str]) -> None:
    flags = ["-c", "quickstart", "--trainer.accelerator", "gpu", *options]
    plain, ahead = (estimate(parse_fit([*flags, *more])) for more in ([], ["--data.reuse.overlap", "1"]))
    copied = ahead.parts["copy of the snapshot"][0]
    assert copied == plain.parts["behavior snapshot"][0]
    assert "copy of the snapshot" not in {*plain.parts, *plain.host}
    beside = max(plain.parts[part][0] for part in ("KV cache", "forward pass of behavior scoring"))
    for phase in ("teacher scoring", "update"):
        assert ahead.peak(phase) - plain.peak(phase) == copied + beside
    for phase in ("sampling", "behavior scoring", "evaluation"):
        assert ahead.peak(phase) - plain.peak(phase) == (0 if "--model.behavior.offload" in options else copied)
    assert ("copy of the snapshot" in ahead.host) == ("--model.behavior.offload" in options)
    assert ahead.host["rollouts sampled ahead"][0] > 0


@pytest.mark.usefixtures("peft_pair")
def test_only_the_adapter_of_the_copy_is_counted() -> None:
    flags = ["-c", "quickstart", "--model.student.adapter.r", "4", "--data.reuse.overlap", "1"]
    parts = estimate(parse_fit(flags)).parts
    assert parts["copy of the snapshot"][0] == parts["behavior snapshot"][0] < parts["student weights"][0] / 4
