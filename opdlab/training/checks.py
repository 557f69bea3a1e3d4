"""Checks of a module, of checkpoints and of losses; each raises an error with a clear message."""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from opdlab.checkpoints import CHECKPOINT_KEY
from opdlab.data import PromptSet
from opdlab.errors import UsageError, require
from opdlab.gating import GateInputs, GateStrategy
from opdlab.objectives import Objective, Reduction, SampledTokenOPD
from opdlab.policies import LanguageModel, NoTeacher, SelfTeacher, TargetCache, Teacher, share_vocabulary
from opdlab.policies.loading import non_finite
from opdlab.registry import suggestion
from opdlab.rollouts.demonstrations import demonstrations_per_prompt
from opdlab.training.sharded_strategy import ShardedStrategy, check_strategy
from opdlab.types import Rollouts, Targets, TeacherRequest

BY_SHARDING = "trainer.strategy model_parallel shards the weights over the processes"
# What does not go with sharded weights, and the fix.
_UNSHARDED = {
    "max_tokens_per_pass": "all must run the same number of passes: use null and raise trainer.accumulate_grad_batches",
    "offload": "their parts stay on the devices: set it to false",
    "quantization": "packed weights cannot be sharded: leave it out",
    "compile": "the gathering of weights is not compiled: set it to false",
}
_GROUP = {"group_accuracy", "group_size"}  # needs of an objective that compares the verdicts of a prompt's rollouts


class NonFiniteLossError(UsageError):
    """Error for a NaN or infinite loss; the message names the step, the rollouts and the file of the batch."""


def check_reduction(reduction: str) -> None:
    """Raise a UsageError for an unknown reduction of the loss."""
    known = get_args(Reduction)
    require(reduction in known, f"reduction is '{reduction}', but must be one of {', '.join(known)}")


def tell_of_idle_offload(trainer: pl.Trainer, **offloaded: bool) -> None:
    """Say which parts are to be offloaded, by name, though the trainer's device is the host."""
    for part in (name for name, wanted in offloaded.items() if wanted):
        if trainer.strategy.root_device.type == "cpu":
            rank_zero_info(f"model.{part}.offload has no effect on a CPU")


def check_token_bound(tokens: int | None) -> None:
    """Raise a UsageError if ``max_tokens_per_pass`` is out of range."""
    require(
        tokens is None or tokens >= 1,
        f"max_tokens_per_pass is {tokens}, but must be at least 1: use null for no bound",
    )


def check_known_needs(gate: GateStrategy) -> None:
    """Raise a UsageError if a gate needs an input that a training step does not compute."""
    known = {f.name for f in fields(GateInputs)}
    for name in gate.needs:
        require(
            name in known,
            f"gate is {type(gate).__name__}, which needs '{name}', but a training step computes no such thing"
            f"{suggestion(name, known) or ';'} there is {', '.join(sorted(known))}",
        )


def teacher_request(
    student: LanguageModel, teacher: Teacher, objective: Objective, gate: GateStrategy, temperature: float = 1.0
) -> TeacherRequest:
    """Bind the teacher to the student, and return the outputs that objective and gate require of it.

    Args:
        student: the module's student.
        teacher: the module's teacher.
        objective: the module's objective.
        gate: the module's gate.
        temperature: of the rollouts.

    Raises:
        UsageError: the vocabularies differ, K is larger than the shared one, or the teacher cannot compute the outputs.
    """
    if isinstance(teacher, NoTeacher):
        return TeacherRequest()
    teacher.bind(student)
    share_vocabulary(student, teacher)
    objective.setup(student, teacher)
    request, shared = objective.request, student.vocab_size
    k = max(request.top_k, request.behavior_top_k)
    require(k <= shared, f"objective.k is {k}, but the vocabulary has only {shared} tokens: lower it")
    require(
        request.behavior_top_k > 0 or "compatible_mass" not in gate.needs,
        f"model.gate is {type(gate).__name__}, which needs the teacher's probability of the student's most likely "
        f"tokens, but model.objective {type(objective).__name__} has no support of the student: use "
        "support_divergence with support student or union, or take another gate",
    )
    entropy = request.entropy or "teacher_entropy" in gate.needs
    tail = request.tail or "compatible_mass" in gate.needs
    logprobs = request.logprobs or "teacher_logprobs" in gate.needs
    request = replace(request, vocab_size=shared, entropy=entropy, tail=tail, logprobs=logprobs)
    teacher.check_request(request, temperature)
    return request


def check_trainer(trainer: pl.Trainer, student: LanguageModel, teacher: Teacher) -> None:
    """Raise a UsageError if the trainer's precision or strategy does not suit the module.

    Args:
        trainer: the module's trainer.
        student: the module's student.
        teacher: the module's teacher.
    """
    require(
        not str(trainer.precision).endswith("-true") or trainer.precision == "32-true",
        f"trainer.precision is {trainer.precision}, which would round what is counted in evaluations too: "
        "use bf16-mixed, or give the models' dtype",
    )
    require(
        trainer.strategy.root_device.type != "mps",
        "trainer.accelerator is mps, which has no float64, in which weights and evaluations are summed: give cpu",
    )
    limit, size = trainer.limit_train_batches, trainer.accumulate_grad_batches
    one_step: bool = trainer.fast_dev_run  # type: ignore[attr-defined] # set by Lightning's connector; ends after it
    # Lightning takes a step on what a pass leaves of an optimizer batch. All micro-batches are whole batches.
    require(
        bool(one_step) or size == 1 or (limit % size == 0 if isinstance(limit, int) else limit == 1.0),
        f"trainer.limit_train_batches is {limit}, but trainer.accumulate_grad_batches makes a step of {size} "
        f"micro-batches: give their number, a multiple of {size}",
    )
    check_strategy(type(trainer.strategy).__name__)
    if isinstance(trainer.strategy, ShardedStrategy):
        bound = student.max_tokens
        check_sharded({"max_tokens_per_pass": bound, "teacher.offload": teacher.offload}, trainer.precision)
        if teacher.state_dict():
            refuse_kept_teacher(type(teacher).__name__)


def refuse_kept_teacher(name: str) -> NoReturn:
    """Raise a UsageError for a teacher, by the name of its class, whose weights checkpoints hold."""
    raise UsageError(
        f"model.teacher is {name}, whose weights are in checkpoints, but {BY_SHARDING}: take the strategy ddp, or "
        "another teacher"
    )


def check_sharded(options: Mapping[str, Any], precision: Any) -> None:
    """Raise a UsageError if an option does not go with sharded weights.

    Args:
        options: values by their keys under ``model``; None or False is off.
        precision: the trainer's.
    """
    for key, value in options.items():
        mend = _UNSHARDED.get(key.rpartition(".")[2])
        require(
            not value or mend is None,
            f"model.{key} is {str(value).lower()}, but {BY_SHARDING}: {mend}, or take the strategy ddp",
        )
    require(
        str(precision) not in ("16", "16-mixed"),
        f"trainer.precision is {precision}, but {BY_SHARDING}, each of which would scale the loss in its own way: use "
        "bf16-mixed",
    )


def check_overlap(*, sharded: bool, compiles: bool) -> None:
    """Raise a UsageError if a thread cannot sample beside a training step.

    Args:
        sharded: the strategy shards the weights over the processes.
        compiles: the student is compiled.
    """
    require(
        not sharded,
        f"data.reuse.overlap is 1, but {BY_SHARDING}, which exchange them in every pass, and no other pass may run "
        "beside it: set it to 0, or take the strategy ddp",
    )
    # While torch.fx traces, modules are patched in all threads.
    require(
        not compiles,
        "data.reuse.overlap is 1, but model.student.compile is true, and while torch compiles, no other thread may use "
        "a model: set overlap to 0 or compile to false",
    )


def check_verdicts(objective: Objective, judged: bool, num_samples: int, share: float, num_prompts: int) -> None:
    """Raise a UsageError if an objective needs verdicts, or several of a prompt, which a run does not have.

    Args:
        objective: the module's objective.
        judged: True if the training problems have a verifier.
        num_samples: rollouts of each prompt.
        share: of the rollouts that take their response from the data, whose verdicts are not compared.
        num_prompts: of a buffer.
    """
    reader, weight = _reader_of_verdicts(objective), getattr(objective, "reward_weight", None)
    require(
        judged or not {"correct", *_GROUP} & set(objective.needs),
        f"{reader}, which needs the verifier's verdict on each rollout, but data.train has no verifier: give it one, "
        f"or {'set reward_weight to 0' if weight else 'take another objective'}",
    )
    if not _GROUP & set(objective.needs):
        return
    require(
        num_samples >= 2,
        f"{reader}, which compares the verdicts of one prompt's rollouts, but model.sampling.num_samples is "
        f"{num_samples}: raise it to 2 or more",
    )
    sampled = num_samples - demonstrations_per_prompt(share, num_prompts, num_samples)[0]
    require(
        sampled >= 2,
        f"{reader}, which compares the verdicts of one prompt's sampled rollouts, but data.demonstrations.share is "
        f"{share}, which leaves {sampled} of {num_samples} to be sampled: lower it, or raise "
        "model.sampling.num_samples",
    )


def _reader_of_verdicts(objective: Objective) -> str:
    """Return the objective and its weight of the reward, for messages."""
    weight = getattr(objective, "reward_weight", None)
    return f"model.objective is {type(objective).__name__}" + (f" with reward_weight {weight}" if weight else "")


def check_training(teacher: Teacher, gate: GateStrategy, judged: bool) -> None:
    """Raise a UsageError if training has no teacher, or if a gate needs verdicts and there is no verifier.

    Args:
        teacher: the module's teacher.
        gate: the module's gate.
        judged: True if the training problems have a verifier.
    """
    require(not isinstance(teacher, NoTeacher), "model.teacher is NoTeacher, but training needs a teacher: give one")
    require(
        judged or "correct" not in gate.needs,
        f"model.gate is {type(gate).__name__}, which needs the verifier's verdict on each rollout, but "
        "data.train has no verifier: give it one, or take another gate",
    )


def warn_of_own_teacher(teacher: Teacher, prompts: PromptSet | None) -> None:
    """Warn if a teacher that is the student itself has nothing to teach it.

    Args:
        teacher: the module's teacher.
        prompts: the training prompts, if they are known.
    """
    scorer = teacher.teacher if isinstance(teacher, TargetCache) else teacher
    if isinstance(scorer, SelfTeacher) and prompts and not prompts.facts.teachers_see_others:
        rank_zero_warn(
            "model.teacher is a SelfTeacher that sees the student's prompts, so it starts as the student's equal and "
            "teaches it nothing: give data.train a teacher_text, such as '{problem} {solution}'"
        )


def warn_of_demonstrations(objective: Objective, num_samples: int, share: float, num_prompts: int) -> None:
    """Warn if demonstrations bias an objective, or leave it a single verdict of some prompts.

    Args:
        objective: the module's objective.
        num_samples: rollouts of each prompt.
        share: of the rollouts that take their response from the data.
        num_prompts: of a buffer.
    """

    def least_sampled(samples: int) -> int:
        given, more = demonstrations_per_prompt(share, num_prompts, samples)
        return samples - given - bool(more)

    if _GROUP & set(objective.needs) and least_sampled(num_samples) < 2:
        least, more = demonstrations_per_prompt(share, num_prompts, num_samples)
        enough = next(n for n in count(num_samples) if least_sampled(n) >= 2)  # share 1 is refused
        rank_zero_warn(
            f"{_reader_of_verdicts(objective)}, which compares the verdicts of one prompt's sampled rollouts, but "
            f"data.demonstrations.share is {share}, which leaves 1 of model.sampling.num_samples {num_samples} for "
            f"{more} of the {num_prompts} prompts of a buffer and {num_samples - least} for the others; the single "
            f"verdict has no effect: raise model.sampling.num_samples to {enough}, or lower the share"
        )
    estimator = getattr(objective, "estimator", "policy_gradient")
    if share and isinstance(objective, SampledTokenOPD) and estimator != "nll":
        rank_zero_warn(
            f"model.objective estimates with {estimator} from sampled tokens, but nobody sampled the tokens of "
            f"demonstrations (data.demonstrations.share is {share}), on which it is biased: take an objective on a "
            "support, such as teacher_topk, or the estimator nll"
        )


def check_checkpoint(checkpoint: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Raise a UsageError if a checkpoint was not written by opdlab, or is of another model.

    Args:
        checkpoint: the loaded checkpoint.
        own: the module's state dict.
    """
    require(
        CHECKPOINT_KEY in checkpoint,
        "ckpt_path is a checkpoint that opdlab did not write: give one from this run's checkpoints folder",
    )
    saved = checkpoint["state_dict"]
    for name in own.keys() | saved.keys():
        ours, theirs = own.get(name), saved.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [str(tuple(t.shape)) if t is not None else "absent" for t in (theirs, ours)]
            raise UsageError(
                f"ckpt_path is a checkpoint of another model: {name} is {shapes[0]} in it and {shapes[1]} in "
                "model.student; resume with the configuration that the run was started with"
            )
    # Masks among a model's buffers may be infinite by design.
    broken = non_finite((name, tensor) for name, tensor in saved.items() if non_finite([(name, own[name])]) is None)
    require(
        broken is None,
        f"ckpt_path is a checkpoint with NaN or infinite weights, first in {broken}: resume from an earlier one",
    )


def stop_on_non_finite(
    loss: Tensor,
    gate: GateStrategy,
    weights: Tensor,
    inputs: GateInputs,
    rollouts: Rollouts,
    targets: Targets,
    folder: Path,
) -> None:
    """Write the micro-batch of a NaN or infinite loss to a folder, and raise :class:`NonFiniteLossError`.

    Raises:
        UsageError: it is the gate whose weights are not finite, on a batch that is.
    """
    step, valid = inputs.step, inputs.mask.bool()
    seen = (inputs.behavior_logprobs, inputs.current_logprobs, inputs.position_losses)
    # Of a student with NaN weights all is NaN, and so is the drift that a gate weighs.
    sound = all(bool(torch.isfinite(each[valid]).all()) for each in seen if each is not None)
    require(
        not sound or bool(torch.isfinite(weights).all()),
        f"model.gate is {type(gate).__name__}, whose weights are NaN or infinite at step {step}: its raw weights must "
        "be at least 0 and finite",
    )
    path = folder / f"non_finite_loss_step_{step}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "rollouts": rollouts.state_dict(), "targets": targets.state_dict()}, path)
    raise NonFiniteLossError(
        f"train/loss is {float(loss.detach())} at step {step} on rollouts "
        f"{rollouts.rollout_ids.tolist()}; the batch is in {path}: lower the learning rate, "
        "or look at the batch for infinite log-probabilities"
    )
