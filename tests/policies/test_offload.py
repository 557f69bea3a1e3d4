"""Offloaded weights: results are unchanged, and no copy stays on the device afterwards.

Without a GPU the device is simulated: each transfer makes a copy on the CPU and is recorded.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

from opdlab.errors import UsageError
from opdlab.module import BehaviorConfig
from opdlab.policies import AdapterConfig, BehaviorPolicy, LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.policies.offload import keep_from_strategy, on_device
from tests.policies.tiny_models import COMMON, CONFIGS, rollouts, save_random
from tests.test_resume import SaveAt
from tests.toy_run import STUDENT, TEACHER, Run

MakeRun = Callable[..., Run]
CUDA = torch.device("cuda:0")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU with CUDA")


class PretendedDevice(TorchFunctionMode):
    """Stands for ``cuda:0``.

    Args:
        capacity: copies that fit; the next one is an error.
    """

    def __init__(self, capacity: int = 1000) -> None:
        super().__init__()
        self.capacity = capacity
        self.sent: list[dict[str, Any]] = []
        """Arguments of each ``to``, with the storages of the original and of the copy."""
        self.pinned: list[StorageWeakRef] = []
        self.brought_back: list[int] = []
        """Storages of what was brought to the host by ``to``."""
        self.read_back: list[bool] = []
        """Of each ``copy_``, whether it was asynchronous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.to and len(args) > 1 and args[1] == CUDA:
            if len(self.sent) == self.capacity:
                raise torch.OutOfMemoryError("pretended")
            copied = args[0].clone()
            refs = {"original": storage(args[0]), "copy": weak(copied)}
            self.sent.append({**options, **refs, "pinned": self._is_pinned(args[0])})
            return copied
        if func is Tensor.to and len(args) > 1 and args[1] == torch.device("cpu"):
            self.brought_back.append(storage(args[0]))
            return args[0].clone()
        if func is Tensor.pin_memory:
            pinned_copy = args[0].clone()
            self.pinned.append(weak(pinned_copy))
            return pinned_copy
        if func is Tensor.is_pinned:
            return self._is_pinned(args[0])
        if func is Tensor.copy_:
            self.read_back.append(options.get("non_blocking", False))
        return func(*args, **options)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return storage(tensor) in {ref.cdata for ref in self.pinned}

    @property
    def holds(self) -> int:
        """Copies that are still alive."""
        return sum(not entry["copy"].expired() for entry in self.sent)


def storage(tensor: Tensor) -> int:
    """Identity of the memory below a tensor."""
    return int(tensor.untyped_storage()._cdata)


def weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def storages(module: nn.Module) -> dict[str, int]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: storage(tensor) for name, tensor in named}


def logprobs(model: LanguageModel) -> Tensor:
    return model.score(rollouts()).statistics().logprobs.detach()


@pytest.fixture
def tied(tmp_path: Path) -> LanguageModel:
    model = LanguageModel(str(save_random(tmp_path / "tied", CONFIGS["llama"]())))
    assert model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("inference", [False, True])
def test_copies_are_used_once_each_and_dropped(tied: LanguageModel, inference: bool) -> None:
    expected = logprobs(tied)
    with PretendedDevice() as device:
        for _ in range(2):
            device.sent.clear()
            with torch.inference_mode() if inference else nullcontext():
                with on_device(tied, CUDA):
                    inside = storages(tied)
                    assert torch.equal(logprobs(tied), expected)
                    assert device.holds == len(device.sent)
                assert device.holds == 0
            distinct = [*tied.parameters(), *tied.buffers()]
            assert len(device.sent) == len(distinct)  # tied weights are sent once
            assert all(sent["non_blocking"] and sent["pinned"] for sent in device.sent)
            assert {sent["copy"].cdata for sent in device.sent} == set(inside.values())
            assert {sent["original"] for sent in device.sent} == set(storages(tied).values())
        assert len(device.pinned) == len(distinct)  # only the first time
    assert inside["model.lm_head.weight"] == inside["model.model.embed_tokens.weight"]
    assert not any(tensor.is_inference() for tensor in distinct)
    assert torch.equal(logprobs(tied), expected)


def fail() -> None:
    raise RuntimeError("inside")


@pytest.mark.parametrize(("capacity", "error"), [(1000, "inside"), (3, "pretended")])
def test_an_error_leaves_the_weights_on_the_host(tied: LanguageModel, capacity: int, error: str) -> None:
    expected = logprobs(tied)
    with PretendedDevice(capacity) as device:
        with pytest.raises(RuntimeError, match=error), on_device(tied, CUDA):
            fail()
        assert len(device.sent) == min(capacity, len(storages(tied)) - 1)  # two are tied
        assert device.holds == 0
        assert set(storages(tied).values()) <= {ref.cdata for ref in device.pinned}
    assert torch.equal(logprobs(tied), expected)


def test_on_a_cpu_nothing_is_copied(tied: LanguageModel) -> None:
    before = storages(tied)
    with on_device(tied, torch.device("cpu")):
        assert storages(tied) == before
    assert storages(tied) == before


def test_a_module_that_was_moved_is_left_there() -> None:
    layer = nn.Linear(2, 2, device="meta")
    with PretendedDevice() as device, on_device(layer, CUDA):
        assert layer.weight.is_meta
    assert not device.sent


def test_frequencies_that_grow_with_the_rows(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**{**COMMON, "max_position_embeddings": 8}, rope_parameters=scaling)
    path = str(save_random(tmp_path / "dynamic", config))
    plain, offloaded = (LanguageModel(path).requires_grad_(False) for _ in range(2))
    before = plain.model.model.rotary_emb.inv_freq.clone()
    with PretendedDevice() as device:
        for length in (4, 32, 16, 4):  # 16 is scored with the frequencies of 32
            tokens = torch.arange(3, 3 + length)[None]
            with torch.inference_mode(), on_device(offloaded, CUDA):
                ours = offloaded.model(tokens).logits
            assert torch.equal(ours, plain.model(tokens).logits)
            if length == 32:
                assert not torch.equal(plain.model.model.rotary_emb.inv_freq, before)
                assert device.brought_back
        assert device.holds == 0
        assert not any(buffer.is_inference() for buffer in offloaded.buffers())


# -- the snapshot ------------------------------------------------------------------------------------------------------

SAMPLING = SamplingConfig(num_samples=2, max_new_tokens=12)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_the_snapshot_samples_the_same() -> None:
    student = LanguageModel(STUDENT)
    expected = BehaviorPolicy(student, SAMPLING).sample(PROMPTS, [0, 1, 2], seed=3).state_dict()
    behavior = BehaviorPolicy(student, SAMPLING, offload=True)
    # Where moving the module would put it: the device of a pretended copy is the CPU.
    behavior._device = CUDA
    with PretendedDevice() as device:
        ours = behavior.sample(PROMPTS, [0, 1, 2], seed=3).state_dict()
        assert len(device.sent) == len([*behavior.policy.parameters(), *behavior.policy.buffers()])
        assert device.holds == 0
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value, name
    assert float(expected["behavior_logprobs"].abs().sum()) > 0


def test_moving_the_module_moves_where_the_snapshot_works() -> None:
    behavior = BehaviorPolicy(LanguageModel(STUDENT), SAMPLING, offload=True)
    module = nn.ModuleDict({"behavior": behavior})  # Lightning moves the whole module
    before = storages(behavior.policy)
    module.to("meta")
    assert behavior._device.type == "meta"  # where it would sample, which a meta device cannot
    assert behavior.step.is_meta
    assert storages(behavior.policy) == before
    module.to(torch.bfloat16)
    assert {parameter.dtype for parameter in behavior.policy.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in behavior.policy.parameters()} == {"cpu"}
    assert behavior._device.type == "meta"
    plain = BehaviorPolicy(LanguageModel(STUDENT), SAMPLING)
    assert plain.state_dict().keys() == behavior.state_dict().keys()
    assert next(plain.to("meta").policy.parameters()).is_meta


def test_refresh_waits_for_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    student = LanguageModel(STUDENT)
    behavior = BehaviorPolicy(student, SAMPLING, offload=True)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    waited: list[tuple[Any, int]] = []
    with PretendedDevice() as device:
        # A model on a CPU copies nothing that it could wait for.
        monkeypatch.setattr(LanguageModel, "device", CUDA)
        monkeypatch.setattr(
            torch.accelerator, "synchronize", lambda where: waited.append((where, len(device.read_back)))
        )
        behavior.refresh(student, step=7)
    assert device.read_back
    assert all(device.read_back)  # asynchronous, into pinned memory:
    assert set(storages(behavior.policy).values()) == {ref.cdata for ref in device.pinned}
    assert waited == [(CUDA, len(device.read_back))]
    assert int(behavior.step) == 7
    for own, other in zip(behavior.policy.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("offload_first", [False, True])
def test_a_run_is_resumed_with_the_option_switched(make_run: MakeRun, tmp_path: Path, offload_first: bool) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = make_run(behavior=BehaviorConfig(offload=offload_first))
    whole.trainer_options["callbacks"].append(SaveAt(path, 2))
    whole.fit(5)
    resumed = make_run(behavior=BehaviorConfig(offload=not offload_first))
    for parameter in resumed.module.parameters():
        parameter.data.add_(1.0)
    resumed.fit(5, ckpt_path=path)
    assert resumed.recorder.losses == whole.recorder.losses[2:]
    for ours, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_on_a_cpu_it_says_that_it_does_nothing(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "has no effect on a CPU" in record.getMessage()]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO):
        make_run().fit(1)
        assert said() == []
        make_run(behavior=BehaviorConfig(offload=True)).fit(1)
        assert said() == ["model.behavior.offload has no effect on a CPU"]
        make_run(teacher=LocalTeacher(TEACHER, offload=True)).fit(1)
        assert said() == ["model.teacher.offload has no effect on a CPU"]


class Ignored(Callback):
    """Writes which parameters DDP sees, and which tensors it was told to leave alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wrapped: Any = trainer.strategy.model
        held = {id(parameter) for parameter in wrapped._module_parameters}
        seen = [name for name, parameter in pl_module.named_parameters() if id(parameter) in held]
        lines = [*(f"seen {name}" for name in seen), *(f"ignored {name}" for name in wrapped.parameters_to_ignore)]
        (self.folder / f"ddp-{trainer.global_rank}").write_text("\n".join(lines))


def test_processes_leave_the_snapshot_to_its_host(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(behavior=BehaviorConfig(offload=True), callbacks=(Ignored(tmp_path),))
    keys = set(storages(run.module.behavior.policy))
    run.fit(2, strategy="ddp_fork", devices=2)
    for rank in (0, 1):
        pairs = [line.split() for line in (tmp_path / f"ddp-{rank}").read_text().splitlines()]
        assert {name for kind, name in pairs if kind == "ignored"} == {f"behavior.policy.{key}" for key in keys}
        seen = {name for kind, name in pairs if kind == "seen"}
        assert {name.partition(".")[0] for name in seen} == {"student"}


class OwnRules(DDPStrategy):
    """A strategy that descends from DDP and places weights itself, as DeepSpeed's does."""


def test_strategies_that_place_weights_are_refused() -> None:
    root = nn.ModuleDict({"behavior": nn.Linear(2, 2)})
    keep_from_strategy(root, "behavior", SingleDeviceStrategy(), "model.behavior.offload")
    for strategy in (FSDPStrategy(), OwnRules()):
        name = type(strategy).__name__
        with pytest.raises(UsageError, match=rf"model\.behavior\.offload is true, but trainer.strategy is {name}"):
            keep_from_strategy(root, "behavior", strategy, "model.behavior.offload")


@pytest.mark.usefixtures("peft_pair")
def test_an_adapters_snapshot_is_refused() -> None:
    student = LanguageModel(STUDENT, adapter=AdapterConfig(r=2))
    with pytest.raises(UsageError, match="behavior.offload is true, but a student with an adapter shares its weights"):
        BehaviorPolicy(student, SAMPLING, offload=True)


# -- the teacher -------------------------------------------------------------------------------------------------------


def test_the_teacher_scores_the_same() -> None:
    request = TeacherRequest(top_k=4)
    expected = LocalTeacher(TEACHER).score(rollouts(), request).state_dict()
    teacher = LocalTeacher(TEACHER, offload=True)
    teacher.to(CUDA)
    assert teacher.model.device.type == "cpu"
    with PretendedDevice() as device:
        ours = teacher.score(rollouts(), request).state_dict()
        assert len(device.sent) == len([*teacher.model.parameters(), *teacher.model.buffers()])
        assert device.holds == 0
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] is None if value is None else torch.equal(ours[name], value), name


def test_the_head_of_an_offloaded_teacher_stays_on_the_device() -> None:
    teacher = LocalTeacher(TEACHER, offload=True)
    assert storage(teacher.head().weight) == storage(teacher.model.head().weight)  # the device is the host so far
    teacher.to(CUDA)
    with PretendedDevice() as device:
        targets = teacher.score(rollouts(), TeacherRequest(hidden=True))
        assert device.holds == 0
        device.sent.clear()
        heads = [teacher.head(temperature) for temperature in (0.7, 1.3)]
        assert len(device.sent) == device.holds == 1  # the weight, copied once
    assert [head.temperature for head in heads] == [0.7, 1.3]
    expected = LocalTeacher(TEACHER).score(rollouts(), TeacherRequest(hidden=True))
    assert targets.hidden is not None
    assert expected.hidden is not None
    assert torch.equal(targets.hidden, expected.hidden)
    assert torch.equal(heads[0].weight, teacher.model.head().weight)


def test_packed_weights_stay_on_the_device() -> None:
    with pytest.raises(UsageError, match="offload is true and quantization '4bit'"):
        LocalTeacher(TEACHER, quantization="4bit", offload=True)


# -- a real device -----------------------------------------------------------------------------------------------------


class PeakOfUpdate(Callback):
    """Keeps the largest peak of device memory within an update, bytes."""

    def __init__(self) -> None:
        self.peak = 0

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, *_: Any) -> None:
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())


@needs_gpu
def test_updates_have_the_memory_of_what_rests(make_run: MakeRun) -> None:
    peaks, losses = [], []
    for offload in (False, True):
        peak = PeakOfUpdate()
        run = make_run(
            behavior=BehaviorConfig(offload=offload), teacher=LocalTeacher(TEACHER, offload=offload), callbacks=(peak,)
        )
        run.fit(6, accelerator="gpu", devices=1)
        peaks.append(peak.peak)
        losses.append(run.recorder.losses)
        resting = [*run.module.behavior.policy.parameters(), *run.module.teacher.model.parameters()]  # type: ignore[attr-defined]
        if offload:
            assert all(tensor.is_pinned() for tensor in resting)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert peaks[0] - peaks[1] >= 0.99 * sum(tensor.nbytes for tensor in resting)


@needs_gpu
def test_copies_leave_the_device(tied: LanguageModel) -> None:
    expected = logprobs(tied)
    with on_device(tied, CUDA):
        pass  # pins the host's memory
    before, originals = torch.cuda.memory_allocated(), storages(tied)
    with on_device(tied, CUDA):
        assert torch.cuda.memory_allocated() - before >= sum(parameter.nbytes for parameter in tied.parameters())
        ours = tied.score(rollouts().to(CUDA)).statistics().logprobs.cpu()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert torch.cuda.memory_allocated() == before
    assert storages(tied) == originals
    assert all(parameter.is_pinned() for parameter in tied.parameters())
