"""Filling the rollout buffer: sample, mask, score with the teacher, verify the answers."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opdlab.policies import BehaviorPolicy, Teacher, check_targets
from opdlab.progress import Progress, SilentProgress
from opdlab.rollouts.loader import Pool
from opdlab.rollouts.masking import mask_first_occurrences
from opdlab.types import EvaluationBatch, Prompt, StopReason, TeacherRequest
from opdlab.verifiers.verifier import Verifier

Autocast = Callable[[], AbstractContextManager[None]]


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

    @torch.no_grad()
    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        num_samples: int | None = None,
        first_rollout_id: int = 0,
        step: int = 0,
        unscored: Tensor | None = None,
        verifier: Verifier | None = None,
        autocast: Autocast = nullcontext,
        progress: Progress | None = None,
    ) -> Pool:
        """Return sampled rollouts with targets, in host memory.

        Args:
            prompts: prompts to sample from.
            seed: determines the samples.
            num_samples: responses per prompt; None for the configured number.
            first_rollout_id: id of the first rollout; the others follow consecutively.
            step: optimizer steps taken so far.
            unscored: rows whose behavior log-probabilities the next training step fills in; None for none. Only if
                the student equals the snapshot: the forward pass of the step then scores them. The snapshot scores
                them nevertheless if its most likely tokens are requested, because the teacher needs these first.
            verifier: checks the answers; None to skip the check.
            autocast: context of the snapshot's passes. It must equal that of the training step; otherwise fresh
                rollouts would show drift.
            progress: shows progress bars.
        """
        progress = progress or SilentProgress()
        started = time.perf_counter()
        with autocast():
            rollouts = self._behavior.sample(
                [prompt.tokens for prompt in prompts],
                [prompt.index for prompt in prompts],
                seed=seed,
                num_samples=num_samples,
                first_rollout_id=first_rollout_id,
                step=step,
                unscored=unscored,
                top_k=self._request.behavior_top_k,
                progress=progress,
            )
        sampled = time.perf_counter()  # results are on the host, so the device has finished
        texts = self._behavior.policy.responses(rollouts) if verifier is not None else []
        # The verifier runs while the teacher scores.
        verdicts = EvaluationBatch("train", prompts, verifier).submit(texts, rollouts)
        scoring = time.perf_counter()
        masked = mask_first_occurrences(rollouts, self._masked_first)
        targets = self._teacher.score(masked, self._request, progress)
        check_targets(self._teacher, self._request, targets)
        scored = time.perf_counter()
        metrics = {  # of all tokens, masked ones included
            "rollout/length": float(rollouts.num_tokens.float().mean()),
            "rollout/truncated_share": float((rollouts.stop_reasons == StopReason.LENGTH).float().mean()),
            "time/sample_seconds": sampled - started,
            "time/teacher_seconds": scored - scoring,
            "rollout/sampled_tokens_per_second": float(rollouts.mask.sum()) / max(sampled - started, 1e-9),
        }
        if verdicts is not None:
            correct = torch.tensor([verdict.correct for verdict in verdicts()], dtype=torch.int8)
            metrics["rollout/accuracy"] = float(correct.float().mean())
            masked = replace(masked, correct=correct)
        return Pool(masked, targets, metrics, first_batch_unscored=unscored is not None)
