"""Evaluation loop: sample answers, verify them while the next batch is sampled, and update the metrics."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from opdlab.errors import require
from opdlab.evaluation.benchmark_metrics import MEAN, BenchmarkMetrics, metric_names, over_benchmarks
from opdlab.evaluation.config import EvaluationConfig
from opdlab.evaluation.samples import Sample, SampleFolder
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import Sampler, SamplingConfig, sample_rollouts
from opdlab.policies.teacher import Teacher
from opdlab.policies.transformers_sampler import TransformersSampler
from opdlab.progress import Progress
from opdlab.seeds import DEFAULT_SEED, derive_streams
from opdlab.types import EvaluationBatch, Rollouts, StopReason, TeacherRequest, Verdicts


class Evaluator(nn.Module):
    """Evaluator that samples and verifies answers, benchmark by benchmark.

    A batch is verified while the next one is sampled. Batches are counted and written to disk in order.

    Args:
        config: see :class:`EvaluationConfig`; its seed is a number in :attr:`config`.
        sampling: sampling options of the answers.
        benchmarks: names of the benchmarks.

    Raises:
        UsageError: a benchmark has the name of the mean over benchmarks.
    """

    def __init__(self, config: EvaluationConfig, sampling: SamplingConfig, benchmarks: Iterable[str]) -> None:
        super().__init__()
        benchmarks = list(benchmarks)
        require(
            MEAN not in benchmarks,
            f"data.benchmarks has the name '{MEAN}', under which the mean over all is logged: take another name",
        )
        self.config = replace(config, seed=DEFAULT_SEED) if config.seed is None else config
        self.sampling = sampling
        self._own_sampler = TransformersSampler()
        self._weights = object()  # stands for the weights of this evaluation
        self.benchmarks = benchmarks
        # A list, because a ModuleDict takes no name that a module has an attribute of, such as train or eval.
        self._metrics = nn.ModuleList(BenchmarkMetrics(config, sampling.num_samples) for _ in benchmarks)
        self.folder: SampleFolder | None = None
        # Samples whose answers the verifier is still checking, and its verdicts.
        self._pending: tuple[list[Sample], Verdicts | None] | None = None

    @property
    def metrics(self) -> dict[str, BenchmarkMetrics]:
        """Return the metrics by the name of their benchmark."""
        return dict(zip(self.benchmarks, cast(Iterable[BenchmarkMetrics], self._metrics), strict=True))

    def start(self, folder: SampleFolder | None = None) -> None:
        """Reset the metrics and write new samples to ``folder``.

        Call this when an evaluation begins, in its inference mode: inference tensors cannot be updated outside of it.
        """
        self.close()
        self.folder = folder
        self._weights = object()
        for metrics in self.metrics.values():
            metrics.reset()

    def evaluate(
        self,
        model: LanguageModel,
        batch: EvaluationBatch,
        progress: Progress,
        teacher: Teacher | None = None,
        *,
        sampler: Sampler | None = None,
        step: int = 0,
    ) -> None:
        """Sample answers to a batch of problems and submit them to the verifier, or read them from the folder.

        An answer depends on the seed, its benchmark, its problem's id and its number, not on the batch.

        Args:
            model: the model to sample from; its weights do not change until the next :meth:`start`.
            batch: problems.
            progress: shows a progress bar.
            teacher: reference of the reverse KL; None to skip it.
            sampler: takes over the weights before the first batch; None for a :class:`TransformersSampler`.
            step: optimizer steps that the weights have taken.
        """
        num_samples, ids = self.sampling.num_samples, [prompt.problem.id for prompt in batch.prompts]
        keys = [(problem_id, number) for problem_id in ids for number in range(num_samples)]
        if self.folder is not None and (written := self.folder.take(batch.benchmark, keys)) is not None:
            self.finish()  # another benchmark's last batch may be pending
            self._count(written)
            return
        assert self.config.seed is not None  # set in the constructor
        sampler = sampler or self._own_sampler
        try:
            parts = ("evaluation", self.config.seed, batch.benchmark)
            streams = derive_streams(*parts, keys=ids, num_samples=num_samples)
            prompts, rows = [p.tokens for p in batch.prompts], [p.index for p in batch.prompts]
            sampler.use(model, step, self._weights)
            facts: dict[str, Any] = {"progress": progress, "prompt_ids": rows}
            rollouts = sample_rollouts(sampler, model, prompts, streams, self.sampling, **facts)
            texts = model.responses(rollouts)
            verdicts = batch.submit(texts, rollouts)
            reverse_kl = _reverse_kl(model, teacher, rollouts) if teacher is not None else None
        finally:
            self.finish()  # the previous batch, also if this one failed
        self._pending = _samples(batch, rollouts, texts, streams, reverse_kl), verdicts

    def finish(self) -> None:
        """Wait for the pending verdicts, and count and write their batch."""
        if self._pending is None:
            return
        (samples, verdicts), self._pending = self._pending, None
        if verdicts is not None:
            samples = [replace(sample, **vars(each)) for sample, each in zip(samples, verdicts(), strict=True)]
        if self.folder is not None:
            self.folder.write(samples)
        self._count(samples)

    def close(self) -> None:
        """Close the files and drop the pending batch."""
        self._pending = None
        if self.folder is not None:
            self.folder.close()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as ``benchmark/name``, and their unweighted means over benchmarks as ``mean/name``."""
        rows = {name: metrics.compute() for name, metrics in self.metrics.items()}
        rows[MEAN] = over_benchmarks(rows)
        return {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}

    def metric_names(self) -> set[str]:
        """Return all names that :meth:`compute` may return."""
        return metric_names(self.benchmarks, self.config, self.sampling.num_samples)

    def _count(self, samples: list[Sample]) -> None:
        self.metrics[samples[0].benchmark].update(samples)


def _samples(
    batch: EvaluationBatch, rollouts: Rollouts, texts: list[str], streams: Tensor, reverse_kl: list[float] | None
) -> list[Sample]:
    num_samples = len(rollouts) // len(batch.prompts)
    reasons, tokens = rollouts.stop_reasons.tolist(), rollouts.num_tokens.tolist()
    seeds = streams.flatten().tolist()
    problems = [prompt.problem for prompt in batch.prompts for _ in range(num_samples)]
    return [
        Sample(
            benchmark=batch.benchmark,
            id=problem.id,
            sample=row % num_samples,
            problem=problem.text,
            gold=problem.answer,
            response=texts[row],
            extracted=None,
            correct=None,
            reason=None,
            stop_reason=StopReason(reasons[row]).name.lower(),
            tokens=tokens[row],
            seed=seeds[row],
            reverse_kl=None if reverse_kl is None else reverse_kl[row],
        )
        for row, problem in enumerate(problems)
    ]


def _reverse_kl(model: LanguageModel, teacher: Teacher, rollouts: Rollouts, batch_size: int = 16) -> list[float]:
    """Return the mean of ``logpi - logq`` over the tokens of each fresh rollout, [B], nats."""
    targets = teacher.score(rollouts, TeacherRequest(vocab_size=model.vocab_size))
    sums = torch.zeros(len(rollouts), dtype=torch.float64)
    for rows, scored in model.score_in_chunks(rollouts, batch_size):
        logprobs = scored.padded(scored.statistics().logprobs).cpu()  # [rows, T]
        sums[rows] = ((logprobs - targets.logprobs[rows]) * rollouts.mask[rows]).double().sum(1)
    return (sums / rollouts.num_tokens).tolist()
