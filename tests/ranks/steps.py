"""Training steps on a fixed buffer, by one process or several: their gradients and what they log."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from opdlab.callbacks import CollapseGuard, GateMonitor, PoolRecorder
from opdlab.data.prompts import prompt_set
from opdlab.gating import GateInputs, GateStrategy, RuleGate, build_gate, gate_names
from opdlab.module import OPDModule
from opdlab.objectives import FullDivergence, Objective, Reduction, SampledTokenOPD, SupportDivergence, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig, TeacherRequest
from opdlab.policies.sharding import whole
from opdlab.rollouts.collector import with_groups
from opdlab.tau import EffectiveSampleSizeTau, LinearTau
from opdlab.toy import ChainProblems
from opdlab.types import Minibatch, Targets, trimmed
from tests.toy_run import STUDENT, TEACHER

UNEVEN = (70, 9, 0, 25, 3, 41, 33, 17)
"""Tokens of the rollouts that count at most: those of the second process are shorter."""
NONE_IN_THE_SECOND = (40, 9, 21, 33, 0, 0, 0, 0)
RECORDED = 8
"""Number of the step that is recorded in the folder."""


class LoudestGate(RuleGate):
    """A user's gate that compares each position with the largest drift of the batch."""

    own_normalization = "mean"

    def weight(self, inputs: GateInputs) -> Tensor:
        drift = inputs.drift.abs()
        return 0.5 + drift / drift.amax().clamp(min=1e-9)


@dataclass(frozen=True)
class Case:
    """One optimizer step on the buffer."""

    gate: GateStrategy
    objective: Objective = field(default_factory=lambda: TeacherTopK(k=8))
    reduction: Reduction = "token_mean"
    longest: tuple[int, ...] = UNEVEN


@cache
def cases() -> dict[str, Case]:
    """Return all cases by name; each changes one thing."""
    student_support = SupportDivergence("reverse_kl", "student", "bucket", k=8)
    found = {
        f"gate {name}": Case(gate, student_support if "compatible_mass" in gate.needs else TeacherTopK(k=8))
        for name in gate_names()
        for gate in [build_gate(name)]
    }
    found["gate of a user"] = Case(LoudestGate())
    for name in ("signed_mean", "abs_mean", "rms", "max"):
        found[f"statistic {name}"] = Case(build_gate("block32", tau=5.0, statistic=name))
    for name in ("mean", "residual", "clipped", "none"):
        options = {"low": 0.9, "high": 1.1} if name == "clipped" else {}
        found[f"normalization {name}"] = Case(build_gate("block", block_size=8, tau=5.0, normalization=name, **options))
    for schedule in (LinearTau(1.0, 9.0, num_steps=200), EffectiveSampleSizeTau(0.8)):
        found[f"tau {type(schedule).__name__}"] = Case(build_gate("block", block_size=16, tau=schedule))
    block = build_gate("block64", tau=5.0)
    objectives: dict[str, Objective] = {
        "policy gradient": SampledTokenOPD(),
        "baseline": SampledTokenOPD(reference="current", baseline="support_kl", k=8),
        "reward": SampledTokenOPD(reward_weight=0.5),
        "scaled reward": SampledTokenOPD(reward_weight=0.5, reward_scaled=True),
        "k2": SampledTokenOPD(estimator="k2"),
        "k3": SampledTokenOPD(estimator="k3"),
        "abs": SampledTokenOPD(estimator="abs"),
        "nll": SampledTokenOPD(estimator="nll"),
        "teacher's support": TeacherTopK(k=8),
        "student's support": student_support,
        "union of supports": SupportDivergence("forward_kl", "union", "bucket", k=8),
        "whole vocabulary": FullDivergence(),
    }
    for reduction in get_args(Reduction):
        some = ("policy gradient", "teacher's support") if reduction == "sequence_mean" else objectives
        for name in some:
            found[f"{name}, {reduction}"] = Case(block, objectives[name], reduction)
        for name in ("block64", "none"):
            gate = build_gate(name, tau=5.0) if name == "block64" else build_gate(name)
            found[f"{name} without a token, {reduction}"] = Case(gate, reduction=reduction, longest=NONE_IN_THE_SECOND)
    return found


class Buffer:
    """Rollouts with every field that an objective or a gate can ask for, and their targets.

    Args:
        longest: number of tokens that count, at most, of each rollout.
        module: whose snapshot samples and whose teacher scores.
    """

    def __init__(self, longest: Sequence[int], module: OPDModule) -> None:
        prompts = prompt_set(ChainProblems(4), module.student.tokenizer, 100).prompts
        sampled = module.behavior.sample([prompt.tokens for prompt in prompts], list(range(4)), seed=3, top_k=8)
        sampled = sampled.rows(torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]))  # groups are split between the processes
        valid = sampled.mask & (torch.arange(sampled.mask.shape[1]) < torch.tensor(longest)[:, None])
        valid[0, 5:7] = False  # masked tokens inside a response
        drift = 0.3 * torch.randn(valid.shape, generator=torch.Generator().manual_seed(0))
        rollouts = replace(
            sampled,
            mask=valid,
            behavior_logprobs=(sampled.behavior_logprobs - drift) * valid,
            correct=torch.tensor([1, 0, -1, 1, 0, 1, 0, 1], dtype=torch.int8),
        )
        self.rollouts, self._teacher = with_groups(rollouts), module.teacher
        self._targets: dict[TeacherRequest, Targets] = {}

    def targets(self, request: TeacherRequest) -> Targets:
        if request not in self._targets:
            self._targets[request] = self._teacher.score(self.rollouts, request)
        return self._targets[request]


class Steps:
    """Loader of one optimizer batch a case: this process's rows of each micro-batch."""

    def __init__(
        self, module: OPDModule, num_processes: int, rank: int, micro_batches: int, chosen: Sequence[Case]
    ) -> None:
        self._module, self._num_processes, self._rank = module, num_processes, rank
        self._micro_batches, self._chosen = micro_batches, chosen
        self._requests: dict[tuple[str, tuple[str, ...]], TeacherRequest] = {}
        for case in chosen:  # before the weights are sharded
            if (asked := self._asked(case)) not in self._requests:
                made = OPDModule(module.student, module.teacher, case.objective, case.gate)
                self._requests[asked] = made.request

    @staticmethod
    def _asked(case: Case) -> tuple[str, tuple[str, ...]]:
        return repr(case.objective), case.gate.needs

    def __len__(self) -> int:
        return len(self._chosen) * self._micro_batches

    def __iter__(self) -> Iterator[Minibatch]:
        module, buffers = self._module, dict[tuple[int, ...], Buffer]()
        for number, case in enumerate(self._chosen):
            if case.longest not in buffers:
                buffers[case.longest] = Buffer(case.longest, module)
            buffer = buffers[case.longest]
            case.gate.setup(module.student.tokenizer)
            # The age differs between the rows, and so between the processes.
            rollouts = replace(buffer.rollouts, snapshot_step=number - torch.tensor([0, 0, 1, 1, 2, 3, 5, 5]))
            chunks = torch.arange(len(rollouts)).view(self._micro_batches, self._num_processes, -1)[:, self._rank]
            targets = buffer.targets(self._requests[self._asked(case)])
            parts = tuple(trimmed(rollouts.rows(rows), targets.rows(rows)) for rows in chunks)
            lengths = rollouts.num_tokens[chunks.flatten()]
            sampling = {"rollout/length": 9.0 + number / 100, "rollout/truncated_share": 0.0}  # of another buffer
            module.gate, module.objective, module.reduction = case.gate, case.objective, case.reduction
            for position, part in enumerate(parts):
                counts = int(lengths.sum()), int((lengths > 0).sum())
                yield Minibatch(*part, chunks[position], *counts, parts, position, 0, sampling)


class Kept(Logger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update({name: float(value) for name, value in metrics.items()})


class Gradients(pl.Callback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, OPDModule)
        gradients = [p.grad for p in pl_module.student.parameters() if p.grad is not None]
        self.steps.append(torch.cat([whole(gradient).flatten() for gradient in gradients]))


class SumsOnly(GateMonitor):
    """Keeps its sums for a checkpoint, and logs nothing; Lightning takes only one callback of a class."""


@dataclass(frozen=True)
class Taken:
    """What a process has of its steps.

    Args:
        gradients: of the weights, by case.
        logged: scalars, by case; empty in all processes but the first.
        messages: of the collapse guard.
        ages: sums by age of GateMonitor, which its checkpoint keeps.
    """

    gradients: dict[str, Tensor]
    logged: dict[str, dict[str, float]]
    messages: list[str]
    ages: Tensor


def take_steps(
    rank: int,
    num_processes: int,
    micro_batches: int,
    folder: Path,
    strategy: str = "ddp",
    path: str = STUDENT,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Taken:
    """Take a step for each case; the weights stay as they are.

    Args:
        rank: of this process.
        num_processes: that share each micro-batch.
        micro_batches: of an optimizer batch.
        folder: for files; step :data:`RECORDED` is recorded there, except with sharded weights.
        strategy: of several processes.
        path: of the student.
        names: of the cases; None for all.
        dtype: of the student's weights.
    """
    chosen = {name: cases()[name] for name in names or cases()}
    student, teacher = LanguageModel(path), LocalTeacher(TEACHER)
    generator = torch.Generator().manual_seed(0)
    for weights in student.parameters():  # far from the teacher, or gradients of tokens cancel and rounding is left
        noise = torch.randn(weights.shape, generator=generator)
        weights.data += 0.6 * weights.detach().std(correction=0) * noise
    still = partial(torch.optim.SGD, lr=0.0)
    sampling = SamplingConfig(num_samples=2, max_new_tokens=70)
    module = OPDModule(student, teacher, FullDivergence(), build_gate("none"), sampling=sampling, optimizer=still)
    for weights in student.parameters():  # the snapshot, which samples, keeps its own
        weights.data = weights.data.to(dtype)
    kept, gradients = Kept(), Gradients()
    monitor, keeping, guard = (
        GateMonitor(every_n_steps=1),
        SumsOnly(every_n_steps=1000),
        CollapseGuard(patience=1, min_entropy_ratio=1e6),
    )
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=num_processes,
        strategy=strategy if num_processes > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=micro_batches,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=kept,
        callbacks=[monitor, keeping, guard, PoolRecorder(strategy == "ddp", steps=[RECORDED]), gradients],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        steps = Steps(module, num_processes, rank, micro_batches, list(chosen.values()))
        trainer.fit(module, train_dataloaders=steps)
    logged = {name: kept.steps.get(step, {}) for step, name in enumerate(chosen, start=1)}
    ages = keeping.state_dict()["recent_ages"]
    return Taken(dict(zip(chosen, gradients.steps, strict=True)), logged, guard.messages, ages)
