"""opdlab's side of ``step.py``: the setup of the command line, without validation."""

import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from step_common import (
    BETAS,
    BLOCK,
    CLIP_NORM,
    SUPPORT,
    TAU,
    WARM_UP_FROM,
    WARM_UP_STEPS,
    WEIGHT_DECAY,
    Case,
    Run,
)

from opdlab.callbacks import BehaviorRefresh, GateMonitor
from opdlab.data import PromptDataModule, ReuseConfig
from opdlab.data.prompts import ProblemSource
from opdlab.gating import build_gate
from opdlab.module import OPDModule
from opdlab.objectives import TeacherTopK
from opdlab.policies import LanguageModel, LocalTeacher, SamplingConfig
from opdlab.toy import ChainProblems
from opdlab.types import Problem, Rollouts


class Prompts(ProblemSource):
    """The case's prompts, without answers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._problems = [Problem(str(i), prompt, None) for i, prompt in enumerate(case.prompts())]

    @property
    def name(self) -> str:
        """Return the name for messages."""
        return "prompts of the benchmark"

    def problems(self) -> list[Problem]:
        """Return all prompts as problems."""
        return self._problems


class Observer(Callback):
    """Counts tokens, times the updates, and evaluates."""

    def __init__(self, run: Run) -> None:
        self.run, self._began = run, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile what is to be compiled, and mark the end of the setup."""
        if pl_module.student.compiles:
            warm_up(pl_module, self.run.task.sizes)
        self.run.clock.begin_steps()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the end of the steps, after all hooks of the last one."""
        self.run.clock.end_steps()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the time of an update."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the update's time and tokens, and evaluate if it is due."""
        self.run.parts.add("update", time.perf_counter() - self._began)
        self.run.tokens["trained"] += batch.num_tokens
        if self.run.after_step(trainer.global_step, pl_module.student.model, pl_module.student.tokenizer):
            trainer.should_stop = True


def warm_up(module: OPDModule, case: Case) -> None:
    """Compile the layers for all that the steps ask of them, so that nothing is compiled while they are timed.

    torch compiles anew for one row, on both sides of 4096 tokens, without gradients, and in eval mode.
    """
    sizes = [(rows, length) for rows in (case.batch_size, 2, 1) for length in (case.max_new_tokens, 64)]
    for policy, gradients in ((module.student, True), (module.behavior.policy, False)):
        for rows, length in sizes:
            ones = torch.ones(rows, length, dtype=torch.long)
            zeros = torch.zeros(rows, dtype=torch.long)
            made_up = Rollouts(ones, ones.bool(), ones, ones.bool(), ones.float(), zeros, zeros, zeros, zeros, zeros)
            with torch.set_grad_enabled(gradients):
                hidden = policy.score(made_up).hidden
            if gradients:
                hidden.sum().backward()
    module.student.model.zero_grad()


def make_module(run: Run, compiled: bool) -> OPDModule:
    """Return the module: student, teacher, LSM and Block64; sampling and the teacher are timed."""
    case = run.task.sizes
    module = OPDModule(
        LanguageModel(run.task.student, compile=compiled),
        LocalTeacher(run.task.teacher),
        TeacherTopK(SUPPORT),
        build_gate(f"block{BLOCK}", tau=TAU),
        SamplingConfig(num_samples=case.samples_per_prompt, max_new_tokens=case.max_new_tokens, batch_size=64),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=case.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        ),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=WARM_UP_FROM, total_iters=WARM_UP_STEPS
        ),
    )
    sample = run.parts.around("sample", module.behavior.sample)

    def counted(*arguments: Any, **options: Any) -> Any:
        rollouts = sample(*arguments, **options)
        run.tokens["sampled"] += int(rollouts.mask.sum())
        return rollouts

    module.behavior.sample = counted  # type: ignore[method-assign]
    module.teacher.score = run.parts.around("teacher", module.teacher.score)
    return module


def train(run: Run, compiled: bool = False) -> dict[str, Any]:
    """Train, and return the measured run."""
    # The same setting as on the command line.
    warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    case = run.task.sizes
    seed_everything(run.task.seed, verbose=False)
    module = make_module(run, compiled)
    data = PromptDataModule(
        Prompts(case) if case.fixed_length else ChainProblems(case.num_prompts, "train"),
        reuse=ReuseConfig(case.prompts_per_pool, case.reuse_epochs, case.batch_size),
        max_prompt_tokens=256,
        seed=run.task.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        # Imports and the data set are made before the clock starts, as for TRL.
        data.train_source.problems()
        _ = logger.experiment
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=run.task.steps,
            max_epochs=-1,
            log_every_n_steps=run.task.log_every,
            gradient_clip_val=CLIP_NORM,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=logger,
            callbacks=[
                BehaviorRefresh(every_n_steps=case.steps_per_pool),
                GateMonitor(every_n_steps=run.task.log_every),
                Observer(run),
            ],
        )
        run.clock.start()
        trainer.fit(module, data)
        run.clock.stop()
    return run.result(trainer.global_step)
