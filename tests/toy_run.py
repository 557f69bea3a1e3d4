"""A small run on the toy world, shared by the tests."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from opdlab.callbacks import BehaviorRefresh
from opdlab.data import PromptDataModule, ReuseConfig
from opdlab.evaluation import EvaluationConfig
from opdlab.gating import GateStrategy, build_gate
from opdlab.module import OPDModule
from opdlab.objectives import Objective, TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig, Teacher
from opdlab.tau import TauSchedule
from opdlab.toy import ChainProblems

STUDENT = "package://opdlab.toy/models/student"
TEACHER = "package://opdlab.toy/models/teacher"


class Recorder(Callback):
    """Keeps what a training step logs, by optimizer step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.position + 1 == len(batch.micro_batches):
            self.steps[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items()}

    @property
    def losses(self) -> list[float]:
        return [metrics["train/loss"] for _, metrics in sorted(self.steps.items())]


class Run:
    """A small run on the toy world: 8 prompts x 2 samples a pool, 8 rollouts a step, 4 steps a pool."""

    def __init__(
        self,
        folder: Path,
        *,
        gate: str | GateStrategy = "block32",
        tau: float | TauSchedule = 5.0,
        objective: Objective | None = None,
        lr: float = 1e-3,
        accumulate: int = 1,
        refresh: int | None = 3,
        reduction: Any = "token_mean",
        callbacks: tuple[Callback, ...] = (),
        max_new_tokens: int = 40,
        temperature: float = 1.0,
        num_problems: int = 16,
        student: LanguageModel | None = None,
        teacher: Teacher | None = None,
        evaluation: EvaluationConfig | None = None,
        module: type[OPDModule] = OPDModule,
        sampling: Mapping[str, Any] = MappingProxyType({}),
        data: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        sampled: dict[str, Any] = {
            "num_samples": 2,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "batch_size": 32,
        }
        sampled.update(sampling)
        self.module = module(
            student or LanguageModel(STUDENT),
            teacher or LocalTeacher(TEACHER),
            objective or TeacherTopK(k=8),
            build_gate(gate, tau=tau) if isinstance(gate, str) else gate,
            sampling=SamplingConfig(**sampled),
            eval_sampling=SamplingConfig(num_samples=2, max_new_tokens=8),
            evaluation=evaluation or EvaluationConfig(pass_at=(1, 2)),
            reduction=reduction,
            **{"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr), **options},
        )
        parts = {
            "train": ChainProblems(num_problems),
            "benchmarks": {"toy": ChainProblems(3, "held_out")},
            "reuse": ReuseConfig(prompts_per_pool=8, epochs=2, batch_size=8),
        }
        self.data = PromptDataModule(**{**parts, **data})
        self.recorder = Recorder()
        self.trainer_options: dict[str, Any] = {
            "default_root_dir": folder,
            "accelerator": "cpu",
            "max_epochs": -1,
            "accumulate_grad_batches": accumulate,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": CSVLogger(folder),
            "callbacks": [
                *([] if refresh is None else [BehaviorRefresh(every_n_steps=refresh)]),
                *callbacks,
                self.recorder,
            ],
        }

    def fit(self, max_steps: int, ckpt_path: Path | None = None, **options: Any) -> pl.Trainer:
        trainer = pl.Trainer(**{**self.trainer_options, "max_steps": max_steps, **options})
        trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path, weights_only=True)
        return trainer
