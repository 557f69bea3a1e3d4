"""How the buffer is filled: sample, mask, score with the teacher, judge."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from opdlab.policies import BehaviorPolicy, Teacher
from opdlab.progress import Progress, SilentProgress
from opdlab.rollouts.loader import Pool
from opdlab.rollouts.masking import mask_first_occurrences
from opdlab.types import EvaluationBatch, Prompt, StopReason, TeacherRequest
from opdlab.verifiers.verifier import Verifier

Autocast = Callable[[], AbstractContextManager[None]]


class Collector:
    """Turns prompts into rollouts with targets; training and replay share it.

    The behavior snapshot samples and scores the rollouts. Then the positions that the loss leaves out are masked, and
    the teacher scores the others once, while the verifier checks the answers.

    Args:
        behavior: the snapshot that samples.
        teacher: scores the rollouts.
        request: what the teacher must deliver.
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
        """Sample rollouts and label them, on the host.

        Args:
            prompts: what to sample from.
            seed: decides what is sampled.
            num_samples: responses per prompt; None for the configured number.
            first_rollout_id: number of the first rollout; the others count on.
            step: optimizer steps taken so far.
            unscored: rows whose behavior log-probabilities are left to the next training step; None for none. Only
                where the student equals the snapshot: the step's own forward pass then scores them.
            verifier: checks the answers; None checks none.
            autocast: context of the snapshot's passes. It must be that of the training step: otherwise a fresh rollout
                would seem to have drifted.
            progress: where to show bars.
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
                progress=progress,
            )
        sampled = time.perf_counter()  # results are on the host, so the device has finished
        texts = self._behavior.policy.responses(rollouts) if verifier is not None else []
        # Checked while the teacher scores.
        verdicts = EvaluationBatch("train", prompts, verifier).submit(texts, rollouts)
        scoring = time.perf_counter()
        masked = mask_first_occurrences(rollouts, self._masked_first)
        targets = self._teacher.score(masked, self._request, progress)
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
