"""The LightningModule: owns student, behavior snapshot, teacher, objective and gate, and takes the training step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from opdlab.accumulation import gate_inputs, join_gate_inputs, split_gates
from opdlab.data.datamodule import EvaluationBatch, PromptDataModule
from opdlab.data.prompts import Prompt
from opdlab.diagnostics import StepRecord, StepTrace, hidden_gradient_norms, merge_records, step_metrics, step_record
from opdlab.errors import UsageError, require
from opdlab.evaluation import EvaluationConfig, EvaluationModule, Evaluator, NoTeacher, submit_answers
from opdlab.evaluation.evaluator import decode_responses
from opdlab.gating import GateInputs, Gates, GateStrategy
from opdlab.objectives import Objective, PositionLosses, Reduction, loss_shares, reduce_losses
from opdlab.policies import (
    BehaviorPolicy,
    LanguageModel,
    SamplingConfig,
    Teacher,
    TeacherRequest,
    check_same_vocabulary,
    single_token_ids,
    warn_of_stop_tokens,
)
from opdlab.policies.language_model import Scored
from opdlab.policies.loading import DType
from opdlab.policies.offload import keep_from_strategy
from opdlab.registry import suggestion
from opdlab.rollouts import Minibatch, Pool, Rollouts, Targets
from opdlab.rollouts.batch import StopReason
from opdlab.rollouts.masking import mask_first_occurrences

_CHECKPOINT_KEY = "opdlab"


class NonFiniteLossError(UsageError):
    """The loss became NaN or infinite; the message says at which step, on which rollouts, and where the batch is."""


@dataclass(frozen=True)
class BehaviorConfig:
    """The behavior snapshot.

    Args:
        dtype: of its weights; null keeps the student's. A narrower one makes the drift of fresh rollouts its rounding
            error instead of 0.
        score_batch_size: rollouts scored at a time.
        offload: keep the weights in the host's memory, and a copy on the device only while it samples and scores. On a
            CPU it changes nothing. Not with an adapter, nor with FSDP or DeepSpeed.
    """

    dtype: DType | None = None
    score_batch_size: int = 32
    offload: bool = False


def check_token_bound(tokens: int | None) -> None:
    """Refuse a ``max_tokens_per_microbatch`` that is out of range."""
    require(
        tokens is None or tokens >= 1,
        f"max_tokens_per_microbatch is {tokens}, but must be at least 1: use null for no bound",
    )


@dataclass
class _Window:
    """State of the optimizer batch that is under way, while its micro-batches come in.

    Args:
        gates: weights of each micro-batch, normalised over the whole optimizer batch; None until computed.
        records: what the micro-batches so far leave for the log.
    """

    gates: list[Gates] | None
    records: list[StepRecord]


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch that the student has been run over, before the gate weighs it.

    Args:
        scored: the student's account; its graph is alive where gradients are on.
        positions: the objective's losses.
        inputs: what the gate may look at, detached.
    """

    scored: Scored
    positions: PositionLosses
    inputs: GateInputs


class OPDModule(EvaluationModule):
    """On-policy distillation of a student from a frozen teacher on gated, reused rollouts.

    Args:
        student: the model to train.
        teacher: scores its rollouts; :class:`opdlab.evaluation.NoTeacher` where it is only evaluated.
        objective: what a position costs.
        gate: how much each position counts; ``build_gate`` makes one by name.
        sampling: how rollouts are sampled; log-probabilities are taken at its temperature.
        eval_sampling: how answers are sampled for evaluation.
        evaluation: see :class:`EvaluationConfig`.
        reduction: ``token_mean`` over the optimizer batch's tokens, or ``sequence_mean``.
        behavior: see :class:`BehaviorConfig`.
        mask_first: tokens whose first occurrence in each response is left out of the loss, such as ``<think>``; each
            must be a single token.
        max_tokens_per_microbatch: tokens, prompts and padding included, that go through the student in one pass with
            their activations kept; null for no bound. A batch with more is taken in several passes, all but the last
            of which are computed again in the backward pass: about a third more time, and the activations of one pass
            at a time. Loss and gradient are those of the whole batch. A longer row goes alone. The snapshot's scoring
            is bounded too. Not where weights are sharded.
        optimizer: takes the student's trainable parameters.
        lr_scheduler: stepped after every optimizer step; none by default.

    Raises:
        UsageError: vocabularies differ, ``mask_first`` has what is no single token, K is larger than the vocabulary,
            or an option is out of range.
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
        behavior: BehaviorConfig = BehaviorConfig(),
        mask_first: Sequence[str] = (),
        max_tokens_per_microbatch: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        evaluation.check(eval_sampling)
        absent = isinstance(teacher, NoTeacher)
        require(
            not absent or not evaluation.reverse_kl,
            "evaluation.reverse_kl is true, but teacher is NoTeacher: give a teacher",
        )
        require(
            reduction in get_args(Reduction),
            f"reduction is '{reduction}', but must be one of {', '.join(get_args(Reduction))}",
        )
        check_token_bound(max_tokens_per_microbatch)
        self.student = student
        self.student.max_tokens = max_tokens_per_microbatch  # before the snapshot is made, which has it too
        # Not a submodule: it is frozen, must not enter checkpoints, and is no business of the strategy's wrapping.
        self.__dict__["teacher"] = teacher
        self.behavior = BehaviorPolicy(student, sampling, **vars(behavior))
        self.objective = objective
        self.gate = gate
        self.gate.setup(student.tokenizer)
        _check_known_needs(gate)
        self.sampling = sampling
        self._masked_first = single_token_ids(student.tokenizer, mask_first, "mask_first")
        self.reduction: Reduction = reduction
        self.evaluator = Evaluator(evaluation, eval_sampling, [])
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._request = TeacherRequest() if absent else self._teacher_request(teacher)
        self._window = _Window(None, [])
        self.trace_gradients = False  # callbacks that want `StepTrace.gradient_norms` of the coming step set it
        self._restored_gradients: dict[str, Tensor] = {}
        self._update_started = 0.0
        self._step_ended: float | None = None

    def _teacher_request(self, teacher: Teacher) -> TeacherRequest:
        teacher.bind(self.student)
        check_same_vocabulary(self.student.tokenizer, teacher.tokenizer)
        warn_of_stop_tokens(self.student.tokenizer, self.student.stop_tokens, teacher.stop_tokens)
        # Rows that only pad the embedding to a round size are no tokens.
        shared = min(self.student.vocab_size, teacher.vocab_size, len(self.student.tokenizer))
        k = self.objective.request.top_k
        require(k <= shared, f"objective.k is {k}, but the vocabulary has only {shared} tokens: lower it")
        entropy = self.objective.request.entropy or "teacher_entropy" in self.gate.needs
        return TeacherRequest(k, shared, entropy)

    # -- setting up ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """See :class:`EvaluationModule`; training needs a teacher besides."""
        require(
            not str(self.trainer.precision).endswith("-true") or self.trainer.precision == "32-true",
            f"trainer.precision is {self.trainer.precision}, which would round what is counted in evaluations too: "
            "use bf16-mixed, or give the models' dtype",
        )
        if self.behavior.offload:
            keep_from_strategy(self, "behavior.policy", self.trainer.strategy, "model.behavior.offload")
        if stage == "fit" and self.trainer.strategy.root_device.type == "cpu":
            for part in (name for name in ("behavior", "teacher") if getattr(self, name).offload):
                rank_zero_info(f"model.{part}.offload has no effect on a CPU")
        super().setup(stage)
        absent = isinstance(self.teacher, NoTeacher)
        require(stage != "fit" or not absent, "model.teacher is NoTeacher, but training needs a teacher: give one")
        judged = isinstance(self._data, PromptDataModule) and self._data.train_verifier is not None
        require(
            stage != "fit" or judged or "correct" not in self.gate.needs,
            f"model.gate is {type(self.gate).__name__}, which needs the verifier's verdict on each rollout, but "
            "data.train has no verifier: give it one, or take another gate",
        )
        # A sharded model gathers its weights in every pass, of which all processes must take as many.
        self.student.group_lengths = self.whole_weights
        require(
            self.whole_weights or self.student.max_tokens is None,
            f"model.max_tokens_per_microbatch is {self.student.max_tokens}, but with trainer.strategy "
            f"{type(self.trainer.strategy).__name__} all processes must take as many passes: use null and raise "
            "trainer.accumulate_grad_batches instead, or take the strategy ddp",
        )
        # Other strategies hook into gradients to reduce or shard them.
        self.student.accumulate_head_grad = isinstance(self.trainer.strategy, SingleDeviceStrategy)

    @property
    def whole_weights(self) -> bool:
        """Whether each process holds all weights."""
        return isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy))

    def _same_policy(self) -> bool:
        return self.whole_weights and self.behavior.equals(self.student)

    def configure_optimizers(self) -> Any:
        """The optimizer sees the student's trainable parameters only."""
        optimizer = self._optimizer([p for p in self.student.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Bring the teacher to the device."""
        self.teacher.to(self.device)

    # -- collecting ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        first_rollout_id: int = 0,
        first_batch: Tensor | None = None,
    ) -> Pool:
        """Sample a pool from the behavior snapshot and have the teacher score it, once.

        Args:
            prompts: what to sample from.
            seed: decides what is sampled.
            first_rollout_id: number of the pool's first rollout.
            first_batch: rows that the next optimizer step trains on. Where the snapshot equals the student, that step's
                own forward pass scores them, see :attr:`Minibatch.keep_behavior`.
        """
        started = time.perf_counter()
        unscored = first_batch if first_batch is not None and self._same_policy() else None
        # In the trainer's precision, as the training step is: otherwise a fresh rollout would seem to have drifted.
        with self.trainer.precision_plugin.forward_context():
            rollouts = self.behavior.sample(
                [prompt.tokens for prompt in prompts],
                [prompt.index for prompt in prompts],
                seed=seed,
                first_rollout_id=first_rollout_id,
                step=self.global_step,
                unscored=unscored,
                progress=self.progress,
            )
        sampled = time.perf_counter()  # results are on the host, so the device has finished
        verifier = self._data.train_verifier if isinstance(self._data, PromptDataModule) else None
        texts = decode_responses(self.student, rollouts) if verifier is not None else []
        # Checked while the teacher scores.
        verdicts = submit_answers(texts, rollouts, EvaluationBatch("train", prompts, verifier))
        scoring = time.perf_counter()
        counted, targets = self.teach(rollouts)  # lengths and answers are of all tokens
        scored = time.perf_counter()
        metrics = {
            "rollout/length": float(rollouts.num_tokens.float().mean()),
            "rollout/truncated_share": float((rollouts.stop_reasons == StopReason.LENGTH).float().mean()),
            "time/sample_seconds": sampled - started,
            "time/teacher_seconds": scored - scoring,
            "rollout/sampled_tokens_per_second": float(rollouts.mask.sum()) / max(sampled - started, 1e-9),
        }
        if verdicts is not None:
            correct = torch.tensor([verdict.correct for verdict in verdicts()], dtype=torch.int8)
            metrics["rollout/accuracy"] = float(correct.float().mean())
            counted = replace(counted, correct=correct)
        return Pool(counted, targets, metrics, first_batch_unscored=unscored is not None)

    def teach(self, rollouts: Rollouts) -> tuple[Rollouts, Targets]:
        """Mask the positions that the loss leaves out, and have the teacher score the others; needs no trainer."""
        counted = mask_first_occurrences(rollouts, self._masked_first)
        return counted, self.teacher.score(counted, self._request, self.progress)

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Minibatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: score, weigh, reduce. Returns the loss, and a :class:`StepTrace` for callbacks."""
        rollouts, targets = batch.rollouts, batch.targets
        account = self.score_batch(batch, self.global_step)
        scored, positions, inputs = account.scored, account.positions, account.inputs
        gates = self._gates(batch, inputs)
        num_tokens, num_rollouts = self._denominators(batch)
        shares = loss_shares(rollouts.mask, reduction=self.reduction, num_tokens=num_tokens, num_rollouts=num_rollouts)
        loss = reduce_losses(positions.losses, gates.weights, shares)
        self._refuse_non_finite(loss, batch)
        gap = targets.logprobs - positions.logprobs
        record = step_record(inputs, gates, entropy=positions.entropy, teacher_gap=gap, **positions.metrics)
        self._log_step(batch, {**record, "loss": loss.detach().view(1)}, gates.tau)
        # Lightning divides by the number of micro-batches and averages over processes, but the denominator already
        # covers them all.
        scale = len(batch.micro_batches) * self.trainer.world_size
        trace = StepTrace(
            rollouts=rollouts,
            reuse_epoch=batch.reuse_epoch,
            step=self.global_step,
            inputs=inputs,
            gates=gates,
            loss_shares=shares,
            values={"entropy": positions.entropy, **positions.metrics},
            gradient_norms=hidden_gradient_norms(self.objective, scored, rollouts, targets)
            if self.trace_gradients
            else None,
        )
        return {"loss": loss * scale, "trace": trace}

    def score_batch(self, batch: Minibatch, step: int) -> ScoredBatch:
        """Run the student over a micro-batch; needs no trainer.

        Args:
            batch: on the module's device.
            step: optimizer steps taken before.
        """
        scored = self.student.score(batch.rollouts)
        positions = self._position_losses(batch, scored, batch.rollouts, batch.targets)
        if batch.keep_behavior is not None:
            batch.keep_behavior(batch.rollouts.behavior_logprobs)
        return ScoredBatch(scored, positions, gate_inputs(batch.rollouts, batch.targets, positions, step))

    def _position_losses(
        self, batch: Minibatch, scored: Scored, rollouts: Rollouts, targets: Targets
    ) -> PositionLosses:
        """The objective's losses of some rollouts of a batch.

        If nobody has scored these for the behavior policy, the student's account is filled in.
        """
        own = batch.keep_behavior is not None
        if own and self.objective.reads_behavior:
            rollouts.behavior_logprobs.copy_(scored.padded(scored.statistics().logprobs.detach()))
        positions = self.objective.position_losses(scored, rollouts, targets)
        if own and not self.objective.reads_behavior:
            rollouts.behavior_logprobs.copy_(positions.logprobs)
        return positions

    def _gates(self, batch: Minibatch, inputs: GateInputs) -> Gates:
        """Weights of a micro-batch, normalised over its whole optimizer batch.

        The student does not change while an optimizer batch is accumulated, so the drift of its later micro-batches
        is known beforehand: they are scored without gradient at the first. That costs a forward pass, and makes
        accumulation equal to one large batch for every gate.
        """
        if len(batch.micro_batches) == 1 or self.gate.uniform:
            return self.gate(inputs)
        if self._window.gates is None:
            self._window.gates = self._window_gates(batch, inputs)
        return self._window.gates[batch.position]

    @torch.no_grad()
    def _window_gates(self, batch: Minibatch, inputs: GateInputs) -> list[Gates]:
        parts = []
        for position, (rollouts, targets) in enumerate(batch.micro_batches):
            if position == batch.position:
                parts.append(inputs)
                continue
            moved, moved_targets = rollouts.to(self.device), targets.to(self.device)
            positions = self._position_losses(batch, self.student.score(moved), moved, moved_targets)
            parts.append(gate_inputs(moved, moved_targets, positions, self.global_step))
        return split_gates(self.gate(join_gate_inputs(parts)), parts)

    def _denominators(self, batch: Minibatch) -> tuple[float, float]:
        counts = torch.tensor([batch.num_tokens, batch.num_rollouts], dtype=torch.float64, device=self.device)
        if self.trainer.world_size > 1:
            counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
            num_tokens, num_rollouts = counts.tolist()
            return num_tokens, num_rollouts
        return float(batch.num_tokens), float(batch.num_rollouts)

    def _log_step(self, batch: Minibatch, record: StepRecord, tau: Tensor | None) -> None:
        """Log the optimizer batch's figures at its last micro-batch."""
        self._window.records.append(record)
        if batch.position + 1 < len(batch.micro_batches):
            return
        whole = merge_records(self._window.records)
        self._window = _Window(None, [])
        # Each process has its part of the sum.
        self.log("train/loss", whole.pop("loss").sum(), prog_bar=True, sync_dist=True, reduce_fx="sum")
        if not self._logs_this_step:
            return
        self.log_dict({**step_metrics(whole), **batch.pool_metrics})
        if tau is not None:
            self.log("gate/tau", tau)
        self.log("rollout/age", (self.global_step - batch.rollouts.sampled_at_step).float().mean())

    @property
    def _logs_this_step(self) -> bool:
        """Whether the step under way is one that the logger is shown: on others, figures would be made for nobody."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # set by Lightning's logger connector
        return every > 0 and (self.global_step + 1) % every == 0

    def on_train_batch_start(self, batch: Minibatch, batch_idx: int) -> None:
        """Start the clock of the update; what passed since the last step's end was sampling and scoring."""
        if batch.position == 0:
            self._update_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Minibatch, batch_idx: int) -> None:
        """Log the time of the update, and the rate at which tokens are trained on, all waiting included."""
        if batch.position + 1 < len(batch.micro_batches):
            return
        now = time.perf_counter()
        self.log("time/update_seconds", now - self._update_started)
        if self._step_ended is not None:
            self.log("train/tokens_per_second", batch.num_tokens / (now - self._step_ended), prog_bar=True)
        self._step_ended = now

    def _refuse_non_finite(self, loss: Tensor, batch: Minibatch) -> None:
        if bool(torch.isfinite(loss)):  # the step's one look at the device
            return
        folder = Path(self.trainer.default_root_dir)
        path = folder / f"non_finite_loss_step_{self.global_step}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"step": self.global_step, "rollouts": batch.rollouts.state_dict(), "targets": batch.targets.state_dict()},
            path,
        )
        raise NonFiniteLossError(
            f"train/loss is {float(loss.detach())} at step {self.global_step} on rollouts "
            f"{batch.rollouts.rollout_ids.tolist()}; the batch is in {path}: lower the learning rate, "
            "or look at the batch for infinite log-probabilities"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resume inside an accumulation window needs: the gradients so far, and the log's records."""
        gradients = {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}
        under_way = bool(self._window.records)
        checkpoint[_CHECKPOINT_KEY] = {
            "gradients": gradients if under_way else {},
            "records": self._window.records,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and take up the accumulation window.

        Raises:
            UsageError: it was written by something else, or for another model.
        """
        require(
            _CHECKPOINT_KEY in checkpoint,
            "ckpt_path is a checkpoint that opdlab did not write: give one from this run's checkpoints folder",
        )
        _check_same_model(self.state_dict(), checkpoint["state_dict"])
        extra = checkpoint[_CHECKPOINT_KEY]
        self._window = _Window(None, list(extra["records"]))
        self._restored_gradients = extra["gradients"]

    def on_train_start(self) -> None:
        """Put back the gradients of an accumulation window; the optimizer has its own state by now."""
        self._update_started = time.perf_counter()
        parameters = dict(self.student.named_parameters())
        for name, gradient in self._restored_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._restored_gradients = {}


def _check_known_needs(gate: GateStrategy) -> None:
    known = {f.name for f in fields(GateInputs)}
    for name in gate.needs:
        require(
            name in known,
            f"gate is {type(gate).__name__}, which needs '{name}', but a training step computes no such thing"
            f"{suggestion(name, known) or ';'} there is {', '.join(sorted(known))}",
        )


def _check_same_model(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name in own.keys() | saved.keys():
        ours, theirs = own.get(name), saved.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [str(tuple(t.shape)) if t is not None else "absent" for t in (theirs, ours)]
            raise UsageError(
                f"ckpt_path is a checkpoint of another model: {name} is {shapes[0]} in it and {shapes[1]} in "
                "model.student; resume with the configuration that the run was started with"
            )
