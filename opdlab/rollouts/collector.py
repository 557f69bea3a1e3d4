"""Filling the rollout buffer: sample, mask, score with the teacher, verify the answers."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.policies import BehaviorPolicy, Teacher, check_targets
from opdlab.policies.routed_teacher import check_teacher
from opdlab.progress import Progress, SilentProgress
from opdlab.rollouts.demonstrations import choose_demonstrations
from opdlab.rollouts.masking import mask_first_occurrences, mask_uncounted
from opdlab.rollouts.pool import Pool
from opdlab.types import EvaluationBatch, Prompt, Rollouts, StopReason, TeacherRequest, left_padded
from opdlab.verifiers.verifier import Verifier

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Sampled:
    """Rollouts of a buffer, or of one process's share of it, that the teacher has not scored yet.

    Args:
        rollouts: with the snapshot's log-probabilities, in host memory.
        seconds: time of sampling and of the snapshot's scoring.
        unscored: True if the next training step fills in the log-probabilities of the first optimizer batch.
        waited: seconds that training waited for them, if a worker samples beside it; None without one.
    """

    rollouts: Rollouts
    seconds: float
    unscored: bool = False
    waited: float | None = None


class Collector:
    """Collector of rollouts with targets for prompts; used by training and replay.

    The behavior snapshot samples and scores the rollouts. Then the positions excluded from the loss are masked, and
    the teacher scores the others once, while the verifier checks the answers.

    Args:
        behavior: the snapshot that samples.
        teacher: scores the rollouts.
        request: the required teacher outputs.
        masked_first: token ids whose first occurrence in each response is masked.
    """

    def __init__(
        self,
        behavior: BehaviorPolicy,
        teacher: Teacher,
        request: TeacherRequest,
        masked_first: Sequence[int] = (),
    ) -> None:
        self._behavior, self._teacher, self._request = behavior, teacher, request
        self._masked_first = tuple(masked_first)

    def asking(self, request: TeacherRequest) -> "Collector":
        """Return a collector that differs in what it requests of the teacher."""
        return Collector(self._behavior, self._teacher, request, self._masked_first)

    def sampling_from(self, behavior: BehaviorPolicy) -> "Collector":
        """Return a collector that differs in the snapshot that samples."""
        return Collector(behavior, self._teacher, self._request, self._masked_first)

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        share: range | None = None,
        verifier: Verifier | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Pool:
        """Return sampled rollouts with targets, in host memory.

        Args:
            prompts: prompts of the buffer.
            share: positions of the prompts whose rollouts are returned, one process's share; None for all.
            verifier: checks the answers; None to skip the check.
            progress: shows progress bars.
            **options: see :meth:`sample`.
        """
        sampled = self.sample(prompts, share=share, progress=progress, **options)
        return self.label(sampled, prompts, share=share, verifier=verifier, progress=progress)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        share: range | None = None,
        num_samples: int | None = None,
        first_rollout_id: int = 0,
        step: int = 0,
        unscored: Tensor | None = None,
        demonstrations: float = 0.0,
        autocast: Autocast = nullcontext,
        progress: Progress | None = None,
    ) -> Sampled:
        """Return rollouts that the snapshot has sampled and scored; it may run beside a training step, in a thread.

        Args:
            prompts: prompts of the buffer.
            seed: determines the samples.
            share: positions of the prompts whose rollouts are returned, one process's share; None for all.
            num_samples: responses per prompt; None for the configured number.
            first_rollout_id: id of the buffer's first rollout; the others follow consecutively.
            step: optimizer steps taken so far.
            unscored: rows of the buffer whose behavior log-probabilities the next training step fills in; None for
                none. Only if the student equals the snapshot: the forward pass of the step then scores them. The
                snapshot scores them nevertheless if its most likely tokens are requested, because the teacher needs
                these first.
            demonstrations: share of the rollouts that take their response from the data, 0 to 1.
            autocast: context of the snapshot's passes. It must equal that of the training step; otherwise fresh
                rollouts would show drift.
            progress: shows progress bars.
        """
        each = self._behavior.sampling.num_samples if num_samples is None else num_samples
        share = share or range(len(prompts))
        own, rows = slice(share.start, share.stop), range(share.start * each, share.stop * each)
        given = choose_demonstrations(prompts, each, demonstrations, seed)
        of_first = None if unscored is None else unscored[(unscored >= rows.start) & (unscored < rows.stop)]
        started = time.perf_counter()
        with autocast():
            rollouts = self._behavior.sample(
                [prompt.tokens for prompt in prompts[own]],
                [prompt.index for prompt in prompts[own]],
                seed=seed,
                num_samples=num_samples,
                first_rollout_id=first_rollout_id + rows.start,
                step=step,
                unscored=None if of_first is None else of_first - rows.start,
                given=given and given[own],
                top_k=self._request.behavior_top_k,
                progress=progress,
            )
        # Results are on the host, so the device has finished.
        return Sampled(rollouts, time.perf_counter() - started, unscored is not None)

    @torch.no_grad()
    def label(
        self,
        sampled: Sampled,
        prompts: Sequence[Prompt],
        *,
        share: range | None = None,
        verifier: Verifier | None = None,
        progress: Progress | None = None,
    ) -> Pool:
        """Return sampled rollouts with masks, targets and verdicts.

        Args:
            sampled: what :meth:`sample` returned for these prompts and this share.
            prompts: prompts of the buffer.
            share: positions of the prompts that were sampled from; None for all.
            verifier: checks the answers; None to skip the check.
            progress: shows progress bars.
        """
        progress, rollouts, buffer = progress or SilentProgress(), sampled.rollouts, prompts
        prompts = buffer if share is None else buffer[share.start : share.stop]
        texts = self._behavior.policy.responses(rollouts) if verifier is not None else []
        # The verifier runs while the teacher scores.
        verdicts = EvaluationBatch("train", prompts, verifier).submit(texts, rollouts)
        scoring = time.perf_counter()
        masked = mask_first_occurrences(mask_uncounted(rollouts), self._masked_first)
        pad_id = self._behavior.policy.tokenizer.pad_token_id
        masked = with_teachers(masked, prompts, self._teacher.names, pad_id, sees_other_prompts(buffer))
        # Teachers do this too; here it also holds for one that does not know of prompts of its own.
        targets = self._teacher.score(masked.as_teacher_sees(), self._request, progress)
        check_targets(self._teacher, self._request, targets)
        scored = time.perf_counter()
        drawn = torch.ones(len(rollouts)).bool() if rollouts.demonstration is None else ~rollouts.demonstration
        metrics = {  # of all tokens, masked ones included
            "rollout/length": float(rollouts.num_tokens.float().mean()),
            "rollout/truncated_share": float((rollouts.stop_reasons == StopReason.LENGTH).float().mean()),
            "time/sample_seconds": sampled.seconds,
            "time/teacher_seconds": scored - scoring,
            "rollout/sampled_tokens_per_second": float(rollouts.mask[drawn].sum()) / max(sampled.seconds, 1e-9),
            **self._teacher.metrics(),
        }
        if sampled.waited is not None:
            metrics["time/sample_wait_seconds"] = sampled.waited
            metrics["rollout/hidden_share"] = max(0.0, 1.0 - sampled.waited / max(sampled.seconds, 1e-9))
        if rollouts.demonstration is not None:
            metrics["rollout/demonstration_share"] = 1.0 - float(drawn.float().mean())
        if verdicts is not None:
            correct = torch.tensor([verdict.correct for verdict in verdicts()], dtype=torch.int8)
            if bool(drawn.any()):  # demonstrations say nothing about the policy
                metrics["rollout/accuracy"] = float(correct[drawn].float().mean())
            masked = with_groups(replace(masked, correct=correct))
        weights = {"rollout/accuracy": float(drawn.sum()), "train/support_overlap": 0.0}
        if targets.support_overlap is not None:
            measured = targets.support_overlap[masked.mask.bool() & (targets.support_overlap >= 0)]
            weights["train/support_overlap"] = float(len(measured))
            metrics |= {"train/support_overlap": float(measured.mean())} if len(measured) else {}
            targets = replace(targets, support_overlap=None)  # a metric only
        for number, name in enumerate(self._teacher.names):
            weights[f"targets/{name}/logprob"] = float(masked.mask[masked.teacher_ids == number].sum())
        return Pool(masked, targets, metrics, sampled.unscored, weights, pad_id)


def sees_other_prompts(prompts: Sequence[Prompt]) -> bool:
    """True if the teacher sees another prompt than the student for one of the problems."""
    return any(prompt.teacher_tokens is not None for prompt in prompts)


def with_teachers(
    rollouts: Rollouts, prompts: Sequence[Prompt], names: Sequence[str], pad_id: int, other_prompts: bool | None = None
) -> Rollouts:
    """Return the rollouts with the prompts that the teacher sees, and the teacher that each problem names.

    Args:
        rollouts: the same number for each prompt, those of a prompt in consecutive rows.
        prompts: in the order of the rollouts.
        names: of the teachers; empty if there is one for all.
        pad_id: token id of padding.
        other_prompts: :func:`sees_other_prompts` of the buffer, of which ``prompts`` may be a share; None if they are
            the buffer's.

    Raises:
        UsageError: a problem names none of these teachers.
    """
    each = len(rollouts) // len(prompts)
    if sees_other_prompts(prompts) if other_prompts is None else other_prompts:
        padded = left_padded([prompt.teacher_tokens or prompt.tokens for prompt in prompts], pad_id)
        tokens, mask = (tensor.repeat_interleave(each, 0) for tensor in padded)
        rollouts = replace(rollouts, teacher_prompt_tokens=tokens, teacher_prompt_mask=mask)
    if names:
        for prompt in prompts:
            check_teacher(prompt.problem, names)
        numbers = torch.tensor([names.index(prompt.problem.teacher or "") for prompt in prompts])
        rollouts = replace(rollouts, teacher_ids=numbers.repeat_interleave(each, 0))
    return rollouts


def with_groups(rollouts: Rollouts) -> Rollouts:
    """Return judged rollouts with ``group_accuracy`` and ``group_size``, over the rollouts of the same prompt.

    Demonstrations and rollouts that were not judged are not counted.

    Args:
        rollouts: of a whole buffer, with verdicts.

    Example:
        Three rollouts of prompt 7, of which one was not judged, and one of prompt 4.

        >>> zeros, mask = torch.zeros(4).long(), torch.ones(4, 1).bool()
        >>> rollouts = Rollouts(*2 * (zeros[:, None], mask), torch.zeros(4, 1), *5 * (zeros,))
        >>> prompts, verdicts = torch.tensor([7, 7, 7, 4]), torch.tensor([1, 0, -1, 1], dtype=torch.int8)
        >>> grouped = with_groups(replace(rollouts, prompt_ids=prompts, correct=verdicts))
        >>> grouped.group_accuracy, grouped.group_size
        (tensor([0.5000, 0.5000, 0.5000, 1.0000]), tensor([2, 2, 2, 1]))
    """
    assert rollouts.correct is not None
    counted = rollouts.correct >= 0
    if rollouts.demonstration is not None:
        counted &= ~rollouts.demonstration
    prompts, group = rollouts.prompt_ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    size = torch.zeros_like(prompts).index_add_(0, group, counted.long())
    hits = torch.zeros_like(prompts).index_add_(0, group, (counted & (rollouts.correct > 0)).long())
    accuracy = hits / size.clamp(min=1)
    return replace(rollouts, group_accuracy=accuracy[group], group_size=size[group])
