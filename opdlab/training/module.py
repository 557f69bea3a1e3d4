"""The LightningModule: student, behavior snapshot, teacher, objective, gate, and the training step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from opdlab.checkpoints import CHECKPOINT_KEY
from opdlab.collectives import sum_over_processes
from opdlab.data import PromptDataModule
from opdlab.diagnostics import (
    StepRecord,
    StepTrace,
    hidden_gradient_norms,
    step_metrics,
    step_record,
    teacher_support_overlap,
)
from opdlab.errors import require
from opdlab.evaluation import EvaluationConfig, EvaluationModule
from opdlab.gating import GateStrategy
from opdlab.loggers import save_all
from opdlab.objectives import Objective, Reduction, loss_shares, reduce_losses
from opdlab.objectives.functional import Correction
from opdlab.policies import (
    BehaviorConfig,
    BehaviorPolicy,
    LanguageModel,
    Sampler,
    SamplingConfig,
    Teacher,
    TransformersSampler,
    single_token_ids,
)
from opdlab.policies.context import ContextLength
from opdlab.policies.decoding import naming_step
from opdlab.policies.offload import keep_from_strategy
from opdlab.rollouts import Collector, Pool
from opdlab.rollouts.ahead import SamplingAhead
from opdlab.training import checks, resume, sampler_gap
from opdlab.training.accumulation import AccumulationWindow, BatchSizes, fresh_rollouts, gate_inputs, record_of_all
from opdlab.training.optimizers import fuse_on_cpu
from opdlab.training.overlap import StopSampling
from opdlab.training.refresh import RefreshSchedule
from opdlab.training.sharded_strategy import ShardedStrategy
from opdlab.training.step_timer import StepTimer
from opdlab.training.summary import replace_summary
from opdlab.types import Minibatch, Prompt, TeacherRequest
from opdlab.verifiers.verifier import Verifier


class OPDModule(EvaluationModule):
    """On-policy distillation of a student from a frozen teacher on gated, reused rollouts.

    Args:
        student: the model to train.
        teacher: scores the rollouts; :class:`opdlab.evaluation.NoTeacher` for evaluation only.
        objective: computes the loss of each position.
        gate: computes the weight of each position; ``build_gate`` builds one by name.
        sampling: sampling options of rollouts; log-probabilities use its temperature.
        eval_sampling: sampling options of answers in evaluations.
        evaluation: see :class:`EvaluationConfig`.
        reduction: ``token_mean`` over the optimizer batch's tokens, or ``sequence_mean``.
        behavior: see :class:`BehaviorConfig`.
        mask_first: tokens whose first occurrence in each response is excluded from the loss, such as ``<think>``; each
            must be a single token.
        max_tokens_per_pass: tokens per pass of the student whose activations are kept, prompts and padding included;
            null for no bound. A larger batch runs in several passes; all but the last are recomputed in the backward
            pass. This takes about a third more time and keeps the activations of one pass at a time. Loss and gradient
            equal those of the whole batch. A row above the bound gets its own pass. The bound also applies to the
            snapshot's scoring. Not with sharded weights.
        sampler: samples the rollouts, and the student's answers in evaluations; ``transformers``, another registered
            name or a class path. Null means ``transformers``: in this process. Log-probabilities are always computed
            here, from the snapshot.
        sampler_correction: ``tis`` or ``icepop`` multiplies each position's loss by a bounded ratio of the snapshot's
            and the sampler's probability of the token, see :func:`opdlab.objectives.functional.sampler_correction`;
            only with a sampler that gives log-probabilities of its own.
        optimizer: called with the student's trainable parameters.
        lr_scheduler: stepped after every optimizer step; none by default.

    Raises:
        UsageError: the vocabularies differ, a text in ``mask_first`` is not a single token, K is larger than the
            vocabulary, or an option is out of range.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: Teacher,
        objective: Objective,
        gate: GateStrategy,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
        eval_sampling: SamplingConfig = SamplingConfig(num_samples=8),  # noqa: B008 - frozen
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 - frozen
        reduction: Reduction = "token_mean",
        behavior: BehaviorConfig = BehaviorConfig(),  # noqa: B008 - frozen
        mask_first: Sequence[str] = (),
        max_tokens_per_pass: int | None = None,
        sampler: Sampler | None = None,
        sampler_correction: Correction = "none",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        sampler = sampler or TransformersSampler()
        super().__init__(student, teacher, evaluation, eval_sampling, sampler)
        checks.check_reduction(reduction)
        sampler_gap.check_correction(sampler_correction, sampler)
        checks.check_token_bound(max_tokens_per_pass)
        student.max_tokens = max_tokens_per_pass
        request = checks.teacher_request(student, teacher, objective, gate, sampling.temperature)
        if evaluation.reverse_kl:
            require(
                not teacher.names,
                "model.evaluation.reverse_kl is true, but model.teacher is a RoutedTeacher, and problems of a "
                "benchmark have no teacher: set it to false, or take one teacher",
            )
            teacher.check_request(TeacherRequest(vocab_size=student.vocab_size), eval_sampling.temperature)
        # After these two, because the snapshot copies the bound and the vocabulary.
        self.behavior = BehaviorPolicy(student, sampling, **vars(behavior), sampler=sampler)
        self.objective, self.gate, self.sampling = objective, gate, sampling
        self.reduction: Reduction = reduction
        self.sampler_correction: Correction = sampler_correction
        self._warned_of_sampler = False
        gate.setup(student.tokenizer)
        checks.check_known_needs(gate)
        masked_first = single_token_ids(student.tokenizer, mask_first, "mask_first")
        self.mask_first, self.request = tuple(mask_first), request
        self.collector = Collector(self.behavior, teacher, request, masked_first)
        self.ahead: SamplingAhead | None = None
        """Samples the next rollout buffer during training, with ``data.reuse.overlap``."""
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._window = AccumulationWindow()
        self._wants_gradient_norms = False
        self._refreshes = True  # the snapshot before each buffer, without a callback that decides it
        self._settings: dict[str, Any] = {}  # of the run, for its checkpoints
        self._metrics: dict[str, Any] = {}  # of the optimizer batch
        self._timer = StepTimer()
        self._modes: dict[torch.nn.Module, bool] = {}  # train or eval, of before Lightning looks at them
        self._batch_tokens = 0  # in all processes

    # -- setting up ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that trainer, data and module are compatible, and connect the data with the student."""
        checks.check_trainer(self.trainer, self.student, self.teacher)
        if self.behavior.offload:
            keep_from_strategy(self, "behavior.policy", self.trainer.strategy, "model.behavior.offload")
        data = self.data
        self.ahead = None
        if stage == "fit":
            replace_summary(self.trainer)
            if data is not None and data.reuse.overlap:
                checks.check_overlap(sharded=not self.whole_weights, compiles=self.student.compiles)
                autocast = self.trainer.precision_plugin.forward_context
                self.ahead = SamplingAhead(self.behavior, self.collector, autocast)
            judged = data is not None and data.train_verifier is not None
            checks.check_training(self.teacher, self.gate, judged)
            sizes = (0.0, 1) if data is None else (data.demonstrations.share, data.reuse.prompts_per_pool)
            checks.check_verdicts(self.objective, judged, self.sampling.num_samples, *sizes)
            checks.tell_of_idle_offload(self.trainer, behavior=self.behavior.offload, teacher=self.teacher.offload)
        if data is not None:
            facts = (self.student.tokenizer, self.collect, self.sampling.num_samples)
            data.connect(*facts, training=stage == "fit", sample_ahead=self.sample_ahead)
            data.check_teachers(self.teacher.names)
            if stage == "fit":
                self.check_context(data)
        if stage == "fit":
            checks.warn_of_demonstrations(self.objective, self.sampling.num_samples, *sizes)
            prompts = None if data is None else data.train_prompts
            checks.warn_of_own_teacher(self.teacher, prompts)
        super().setup(stage)
        if stage == "fit":
            self._settings = resume.run_settings(self, data)
        # Other strategies hook into gradients to reduce or shard them.
        self.student.accumulate_head_grad = isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def check_context(self, data: PromptDataModule) -> None:
        """Refuse prompts and responses that a model cannot read, and warn of those that it was not made for.

        Args:
            data: prepared for training.

        Raises:
            UsageError: see :meth:`PromptDataModule.check_context`.
        """
        prefix = "model.{}sampling.max_new_tokens"
        contexts: list[tuple[str | None, ContextLength | None]] = [(None, self.student.context)]
        for teacher, context in [*contexts, *self.teacher.contexts().items()]:
            whose = "model.student" if teacher is None else f"model.teacher{teacher and f'.teachers.{teacher}'}"
            key, longest = prefix.format(""), self.sampling.max_new_tokens
            data.check_context(context, whose, key, longest, training=True, teacher=teacher)
            if teacher is None or self.evaluator.config.teacher:
                key, longest = prefix.format("eval_"), self.evaluator.sampling.max_new_tokens
                data.check_context(context, whose, key, longest, training=False)

    @property
    def whole_weights(self) -> bool:
        """True if each process holds all weights."""
        return not isinstance(self.trainer.strategy, ShardedStrategy)

    def configure_model(self) -> None:
        """Shard the student, the snapshot and the teacher over the processes, alike, if the strategy does that."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            for model in (self.student, self.behavior.policy, *self.teacher.local_models()):
                model.shard(strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the student's trainable parameters, and the scheduler if there is one."""
        optimizer = self._optimizer([p for p in self.student.parameters() if p.requires_grad])
        fuse_on_cpu(optimizer)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self._lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Move the teacher to the device, and say when the snapshot is refreshed."""
        self.teacher.to(self.device)
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set by Lightning's connector
        schedules = [each.schedule for each in callbacks if isinstance(each, RefreshSchedule)]
        self._refreshes = not schedules
        # Lightning warns of modules in eval mode when training starts, although transformers loads models in it.
        self._modes = {module: module.training for module in self.modules()}
        self.train()
        rank_zero_info(f"behavior snapshot: refreshed {', '.join(schedules) or 'before each rollout buffer'}")

    def on_train_start(self) -> None:
        """Begin the first optimizer batch; a run that resumes inside one repeats it from its start."""
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}
        self._timer.begin()
        self._window = AccumulationWindow(self.trainer.world_size)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return a callback that ends sampling beside training together with it."""
        return [StopSampling()] if self.data is not None and self.data.reuse.overlap else []

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        first_batch: Tensor,
        share: range | None = None,
        verifier: Verifier | None = None,
        when_sampled: Callable[[], None] | None = None,
        **options: Any,
    ) -> Pool:
        """Return a rollout buffer for the loader, see :meth:`opdlab.rollouts.Collector.collect`.

        The snapshot is refreshed before, unless a callback decides that. If the snapshot equals the student, the
        forward pass of the next training step scores ``first_batch``. With overlap, all buffers but the first come from
        :attr:`ahead`; the snapshot is copied there when a buffer begins, and then ``when_sampled`` is called.
        """
        step, progress, options = self.global_step, self.progress, {"share": share, **options}
        ahead = self.ahead if when_sampled is not None else None
        sampled = None if ahead is None else ahead.take(prompts, progress=progress, **options)
        if self._refreshes:
            self.behavior.refresh(self.student, step)
        if sampled is None:
            fresh = self.behavior.equals(self.student)
            with naming_step(step):
                sampled = self.collector.sample(
                    prompts,
                    step=step,
                    unscored=first_batch if fresh else None,
                    autocast=self.trainer.precision_plugin.forward_context,
                    progress=progress,
                    **options,
                )
        if ahead is not None and when_sampled is not None:
            if sampled.waited is None:
                sampled = replace(sampled, waited=sampled.seconds)
            ahead.copy_weights(step)
            when_sampled()
        return self.collector.label(sampled, prompts, share=share, verifier=verifier, progress=progress)

    def sample_ahead(self, prompts: Sequence[Prompt], *, steps: int, **options: Any) -> None:
        """Let :attr:`ahead` sample the next rollout buffer, unless training ends before that begins.

        Args:
            prompts: prompts of the buffer.
            steps: optimizer steps until it begins.
            **options: see :meth:`opdlab.rollouts.ahead.SamplingAhead.start`.
        """
        if self.ahead is not None and self.global_step + steps < self.trainer.estimated_stepping_batches:
            self.ahead.start(prompts, **options)

    def on_validation_epoch_start(self) -> None:
        """Wait for the sampler, which may be sampling ahead, and begin an evaluation."""
        if self.ahead is not None and self.trainer.should_stop:
            self.ahead.stop()  # its buffer will not be used
        elif self.ahead is not None:
            self.ahead.wait(self.progress)
        super().on_validation_epoch_start()

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        """Score, gate and reduce a micro-batch.

        Returns:
            ``loss``; for callbacks ``trace``, the :class:`StepTrace`, and ``num_tokens``, the response tokens of the
            optimizer batch in all processes.
        """
        scored, rollouts = self.student.score(batch.rollouts), batch.rollouts
        if not batch.behavior_known:
            rollouts = fresh_rollouts(scored, self.objective, batch)
            # Only here the training step writes to the buffer: the student equals the behavior policy, so its
            # log-probabilities are stored for later passes and the snapshot need not score these rows.
            buffer: Any = self.trainer.train_dataloader
            buffer.fill_behavior(batch.rows, rollouts.behavior_logprobs)
        positions = self.objective.position_losses(scored, rollouts, batch.targets)
        inputs = gate_inputs(rollouts, batch.targets, positions, self.global_step)
        num_processes = self.trainer.world_size
        sizes = self._window.sizes(batch, self.device) if num_processes > 1 else None
        alone = len(batch.micro_batches) == 1 and sizes is None
        if alone or self.gate.uniform:
            gates = self.gate(inputs)
        else:  # normalised over the whole optimizer batch
            gates = self._window.gates(self.gate, batch, inputs, self.student, self.objective)
        whole: Minibatch | BatchSizes = batch if sizes is None else sizes
        num_tokens, num_rollouts = whole.num_tokens, whole.num_rollouts
        shares = loss_shares(rollouts.mask, reduction=self.reduction, num_tokens=num_tokens, num_rollouts=num_rollouts)
        of_sampler: dict[str, Tensor] = {}
        if rollouts.sampler_logprobs is not None or self.sampler_correction != "none":
            shares, of_sampler = sampler_gap.corrected(shares, rollouts, self.sampler_correction)
        loss = reduce_losses(positions.losses, gates.weights, shares)  # [B, T] each -> scalar
        if not bool(torch.isfinite(loss)):  # waits for the device, as picking valid positions does
            folder = Path(self.trainer.default_root_dir)
            checks.stop_on_non_finite(loss, self.gate, gates.weights, inputs, rollouts, batch.targets, folder)
        values = {"entropy": positions.entropy, **positions.metrics, **of_sampler}
        age = (self.global_step - rollouts.snapshot_step).float()
        record = {"loss": loss.detach().view(1)}
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # set by Lightning's logger connector
        logged = every > 0 and (self.global_step + 1) % every == 0
        if logged:  # picking the valid positions makes the host wait for a GPU
            record |= step_record(inputs, gates, **values) | {"age": age}
        finished = record if alone else self._window.finish(batch, record)
        if finished is not None:
            self._batch_tokens = num_tokens
            self._log_step(batch, finished, sizes, gates.tau, logged)
        norms = overlap = None
        if self._wants_gradient_norms:
            norms = hidden_gradient_norms(self.objective, scored, rollouts, batch.targets)
            overlap = teacher_support_overlap(scored, rollouts, batch.targets)
            self._wants_gradient_norms = False
        facts = (rollouts, batch.reuse_epoch, self.global_step)
        trace = StepTrace(*facts, inputs, gates, shares, values, norms, batch.targets, overlap)
        # Lightning divides by the number of micro-batches and averages over processes, but the denominator already
        # covers them all.
        scaled = loss * len(batch.micro_batches) * num_processes
        return {"loss": scaled, "trace": trace, "num_tokens": num_tokens}

    def request_gradient_norms(self) -> None:
        """Request :attr:`StepTrace.gradient_norms` and ``overlap`` of the next training step; call before each one."""
        self._wants_gradient_norms = True

    def _log_step(
        self, batch: Minibatch, record: StepRecord, sizes: BatchSizes | None, tau: Tensor | None, logged: bool
    ) -> None:
        """Log the metrics of an optimizer batch from this process's record; all processes log the same."""
        loss = record.pop("loss").sum()
        if sizes is not None:
            loss = sum_over_processes(loss)
        self.log("train/loss", loss, prog_bar=True, logger=False)
        self._metrics = {}
        if not logged:
            return
        if sizes is not None:
            record = record_of_all(record, sizes)
        age = record.pop("age").mean()
        scheduled = {} if tau is None else {"gate/tau": tau}
        metrics = step_metrics(record)
        if "train/sampler_gap" in metrics and not self._warned_of_sampler:
            self._warned_of_sampler = sampler_gap.warn_if_large(float(metrics["train/sampler_gap"]), self.global_step)
        self._metrics = {**metrics, **batch.pool_metrics, **scheduled, "rollout/age": age}
        self.log_dict(self._metrics, logger=False)
        self._metrics |= {"train/loss": loss, "epoch": self.current_epoch}

    def on_train_batch_start(self, batch: Minibatch, batch_idx: int) -> None:
        """Start the timer of the update, which excludes sampling and scoring since the last step."""
        if batch.position == 0:
            self._timer.begin()

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Take a step and write its metrics to the loggers, before a callback writes a checkpoint of the step."""
        super().optimizer_step(*args, **options)
        self.teacher.after_step(self.student)
        self._timer.end(self._batch_tokens)
        if self._metrics:
            self.write_metrics({**self._metrics, **self._timer.metrics}, self.global_step + 1)

    def on_train_batch_end(self, outputs: Any, batch: Minibatch, batch_idx: int) -> None:
        """Show the time of the update, and the trained tokens per second of total time."""
        for name, value in self._timer.metrics.items():
            shown = name == "train/tokens_per_second"
            if shown or self._metrics:  # the loggers take the others with the metrics of a logged step
                self.log(name, value, prog_bar=shown, logger=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings that a resumed run must share, once all metrics up to here are on disk."""
        super().on_save_checkpoint(checkpoint)
        save_all(self.loggers)
        micro_batches = self.trainer.accumulate_grad_batches
        own: dict[str, Any] = {"settings": self._settings, "micro_batches": micro_batches}
        if self.ahead is not None:
            own["ahead"] = self.ahead.state_dict()
        if teacher := self.teacher.state_dict():
            own["teacher"] = teacher
        checkpoint[CHECKPOINT_KEY] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model and run, and adapt Lightning's counters to this trainer.

        Raises:
            UsageError: the checkpoint was not written by opdlab, is of another model, or a setting differs that may not
                change there.
        """
        checks.check_checkpoint(checkpoint, self.state_dict())
        self.teacher.load_state_dict(checkpoint[CHECKPOINT_KEY].get("teacher", {}))
        if self.trainer.state.fn == TrainerFn.FITTING:
            if self.ahead is not None:
                self.ahead.load_state_dict(checkpoint[CHECKPOINT_KEY].get("ahead"))
            loader = self.data.train_dataloader() if self.data is not None else None
            resume.go_on_from(checkpoint, self.trainer, self._settings, loader)
