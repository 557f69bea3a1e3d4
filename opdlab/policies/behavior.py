"""The behavior policy: a frozen copy of the student, from whose weights the rollouts are sampled."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.collectives import sum_over_processes
from opdlab.errors import require
from opdlab.policies.demonstrations import Given, sample_beside
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.loading import DType
from opdlab.policies.offload import Conversion, on_device, pin_memory, without_moving
from opdlab.policies.sampler import Sampler, SamplingConfig, sample_rollouts
from opdlab.policies.sharding import local
from opdlab.policies.transformers_sampler import TransformersSampler
from opdlab.progress import Progress, SilentProgress
from opdlab.scoring import topk_with_statistics
from opdlab.seeds import derive_streams
from opdlab.types import Rollouts, assign_rows, id_dtype


@dataclass(frozen=True)
class BehaviorConfig:
    """Options of the behavior snapshot.

    Args:
        dtype: dtype of the snapshot's weights; null keeps the student's. With a narrower dtype, the drift of fresh
            rollouts equals the rounding error instead of 0.
        score_batch_size: rollouts scored at a time.
        offload: keep the weights in host memory, with a copy on the device only during sampling and scoring. No effect
            on a CPU. Not with an adapter or with sharded weights.
    """

    dtype: DType | None = None
    score_batch_size: int = 32
    offload: bool = False


class BehaviorPolicy(nn.Module):
    """A snapshot of the student, which gives a sampler its weights and scores the rollouts as the student does.

    The log-probabilities of a rollout are always the snapshot's, whatever sampled it, so a fresh rollout has drift 0.

    Args:
        student: copied immediately; the copy never takes a gradient. If the student has an adapter, only the adapter
            is copied and the weights below it are shared.
        sampling: how rollouts are sampled.
        dtype: dtype of the copy; None keeps the student's. A narrower dtype saves memory, and the drift of a fresh
            rollout then equals the rounding error instead of 0. Not with an adapter.
        score_batch_size: rollouts scored at a time.
        offload: keep the weights in host memory, with a copy on the device only during :meth:`sample`. ``.to()`` then
            changes only the device used for work; the state dict is the same. Not with an adapter.
        sampler: samples from the snapshot's weights; None for a :class:`TransformersSampler`.

    Raises:
        UsageError: ``dtype`` or ``offload`` is given for a student with an adapter.
    """

    def __init__(
        self,
        student: LanguageModel,
        sampling: SamplingConfig,
        dtype: DType | None = None,
        score_batch_size: int = 32,
        offload: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        for value, said, mend in (
            (offload, "offload is true", "set it to false, because they cannot leave the device"),
            (dtype, f"dtype is '{dtype}'", "leave it null"),
        ):
            require(
                not (value and student.has_adapter),
                f"behavior.{said}, but a student with an adapter shares its weights with the snapshot: {mend}",
            )
        self.policy = student.snapshot()
        self.offload = offload
        self._device = student.device  # device on which an offloaded snapshot runs
        if offload:
            self.policy.cpu()
        if dtype is not None:
            self.policy.to(getattr(torch, dtype))
        self.sampling, self.sampler = sampling, sampler or TransformersSampler()
        self.sampler.setup(self.policy)
        self._version = 0  # of the weights, for the sampler
        self.register_load_state_dict_post_hook(_count_version)  # type: ignore[no-untyped-call]
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.step: Tensor
        self._score_batch_size = score_batch_size

    def _apply(self, fn: Conversion, recurse: bool = True) -> Any:
        """Apply a conversion such as ``.to()``, see :class:`torch.nn.Module`; offloaded weights do not move."""
        if self.offload:
            self._device = fn(torch.empty(0, device=self._device)).device
            self.policy._apply(without_moving(fn))  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse and not self.offload)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self, student: LanguageModel, step: int = 0) -> None:
        """Copy the student's weights into the snapshot.

        Args:
            student: the source of the weights.
            step: optimizer steps that the student has taken.
        """
        self.step.fill_(step)
        _count_version(self)
        if self.offload:
            pin_memory(self.policy, student.device)
        for tensors in ("parameters", "buffers"):  # parameters() lists tied weights once, in the same order for both
            for own, other in zip(getattr(self.policy, tensors)(), getattr(student, tensors)(), strict=True):
                if own is not other:  # weights below an adapter are shared
                    own.copy_(other, non_blocking=self.offload)
        if self.offload and student.device.type != "cpu":
            torch.accelerator.synchronize(student.device)  # the host may read only finished copies

    @property
    def device(self) -> torch.device:
        """Return the device on which the snapshot samples and scores."""
        return self._device if self.offload else self.policy.device

    def twin(self) -> "BehaviorPolicy":
        """Return a copy with weights of its own, except those below an adapter, and the same sampler."""
        return copy.deepcopy(self, {id(self.policy): self.policy.snapshot(), id(self.sampler): self.sampler})

    def equals(self, student: LanguageModel) -> bool:
        """True if the snapshot's weights are bitwise equal to the student's, in all processes that share them."""
        same = all(
            own is other or (own.dtype == other.dtype and torch.equal(local(own), local(other).to(own.device)))
            for own, other in zip(self.policy.parameters(), student.parameters(), strict=True)
        )
        if student.sharding is None:
            return same
        return not int(sum_over_processes(torch.tensor(int(not same), device=student.device)))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        seed: int,
        num_samples: int | None = None,
        first_rollout_id: int = 0,
        step: int = 0,
        unscored: Tensor | None = None,
        given: Sequence[Given] | None = None,
        top_k: int = 0,
        progress: Progress | None = None,
    ) -> Rollouts:
        """Return sampled responses with their log-probabilities, and the snapshot's most likely tokens if requested.

        Args:
            prompts: token ids of each prompt.
            prompt_ids: the prompts' rows in the prompt set.
            seed: determines the samples, each by the prompt's row and its number among the prompt's samples.
            num_samples: responses per prompt; None for the configured number.
            first_rollout_id: id of the first rollout; the others follow consecutively.
            step: optimizer steps taken so far.
            unscored: rows whose log-probabilities stay 0, because the training step fills them in.
            given: for each prompt, the response that the data gives, and how many rollouts take it; None for none.
            top_k: number of the snapshot's most likely tokens at each position, :attr:`Rollouts.behavior_support_ids`;
                0 for none. They need a pass over every row, so over the ``unscored`` ones too.
            progress: shows progress bars.

        Returns:
            ``len(prompts) * num_samples`` rollouts, in host memory.
        """
        progress = progress or SilentProgress()
        each = self.sampling.num_samples if num_samples is None else num_samples
        streams = derive_streams("rollouts", seed, keys=prompt_ids, num_samples=each)
        with on_device(self.policy, self._device) if self.offload else self.policy.whole():
            self.sampler.use(self.policy, int(self.step), self._version)
            facts: dict[str, Any] = {"progress": progress, "prompt_ids": prompt_ids}
            model, config = self.policy, self.sampling
            if given is None:
                rollouts = sample_rollouts(self.sampler, model, prompts, streams, config, **facts)
            else:
                rollouts = sample_beside(self.sampler, model, prompts, given, streams, config, **facts)
            self.sampler.release()
            wanted = torch.ones(len(rollouts), dtype=torch.bool)
            if unscored is not None and not top_k:
                wanted[unscored] = False
            rows = wanted.nonzero().view(-1)
            ids = torch.zeros(*rollouts.tokens.shape, top_k, dtype=id_dtype(self.policy.vocab_size)) if top_k else None
            if len(rows):  # empty if the next optimizer batch is the whole buffer
                with progress.task("scoring (behavior)", len(rows)) as advance:
                    for chunk, scored in self.policy.score_in_chunks(rollouts.rows(rows), self._score_batch_size):
                        if ids is None:
                            statistics = scored.statistics()
                        else:
                            top, statistics = topk_with_statistics(scored.hidden, scored.head, scored.tokens, top_k)
                            assign_rows(ids, rows[chunk], scored.padded(top.ids.int()).cpu())
                        rollouts.behavior_logprobs[rows[chunk]] = scored.padded(statistics.logprobs).cpu()
                        advance(len(chunk))
            if unscored is not None:
                rollouts.behavior_logprobs[unscored] = 0.0
        return replace(
            rollouts,
            behavior_support_ids=ids,
            rollout_ids=rollouts.rollout_ids + first_rollout_id,
            sampled_at_step=rollouts.sampled_at_step + step,
            snapshot_step=rollouts.snapshot_step + self.step.cpu(),
        )


def _count_version(behavior: BehaviorPolicy, *_: object) -> None:
    """Note that the snapshot's weights have changed, for the sampler."""
    behavior._version += 1
