"""Sampling answers to problems, checking them, and counting: what a validation step does."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from opdlab.data.datamodule import EvaluationBatch
from opdlab.errors import require
from opdlab.metrics import PassAtK
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.sampler import Sampler, SamplingConfig
from opdlab.policies.teacher import Teacher, TeacherRequest
from opdlab.progress import Progress
from opdlab.rollouts.batch import Rollouts, StopReason
from opdlab.seeds import derive_seed


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated, apart from how answers are sampled.

    Args:
        pass_at: values of k; each must be at most ``eval_sampling.num_samples``.
        reverse_kl: also estimate the reverse KL to the teacher per token, ``mean(logpi - logq)`` over the fresh
            samples; costs a pass of student and teacher over them. Unbiased at ``top_p`` 1.
        teacher: evaluate the teacher too, once, when training ends.
        seed: decides what is sampled, so that evaluations differ by their weights alone.
    """

    pass_at: tuple[int, ...] = (1, 8)
    reverse_kl: bool = False
    teacher: bool = True
    seed: int = 0

    def check(self, sampling: SamplingConfig) -> None:
        """Refuse a k that the number of samples cannot support."""
        require(bool(self.pass_at), "model.evaluation.pass_at is empty: give at least one k")
        for k in self.pass_at:
            require(k >= 1, f"model.evaluation.pass_at has {k}, but k must be at least 1")
            require(
                k <= sampling.num_samples,
                f"model.evaluation.pass_at has {k}, but model.eval_sampling.num_samples is {sampling.num_samples}: "
                "sample at least as many answers, or lower k",
            )


class BenchmarkMetrics(nn.Module):
    """The figures of one benchmark, accumulated over its batches and over processes.

    Args:
        config: which figures.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        super().__init__()
        self.pass_at = nn.ModuleDict({f"pass@{k}": PassAtK(k) for k in config.pass_at})
        self.means = nn.ModuleDict({name: MeanMetric() for name in ("truncated", "length", "reverse_kl")})

    def update(self, correct: Tensor, stop_reasons: Tensor, lengths: Tensor) -> None:
        """Count a batch: ``correct`` [P, n] bool; ``stop_reasons`` and ``lengths`` [P * n]."""
        for metric in self.pass_at.values():
            metric.update(correct)  # type: ignore[operator]
        self.means["truncated"].update((stop_reasons == StopReason.LENGTH).float())  # type: ignore[operator]
        self.means["length"].update(lengths.float())  # type: ignore[operator]

    def update_reverse_kl(self, estimate: Tensor) -> None:
        """Count log-ratios of single tokens, [N], nats."""
        self.means["reverse_kl"].update(estimate)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Figures by name."""
        metrics = [*self.pass_at.items(), *self.means.items()]
        return {name: metric.compute() for name, metric in metrics if metric.update_called}  # type: ignore[operator]

    def reset(self) -> None:
        """Start anew."""
        for metric in [*self.pass_at.values(), *self.means.values()]:
            metric.reset()  # type: ignore[operator]


class Evaluator(nn.Module):
    """Samples and checks answers, benchmark by benchmark.

    Args:
        config: see :class:`EvaluationConfig`.
        sampling: how answers are sampled.
        benchmarks: names of the benchmarks.
    """

    def __init__(self, config: EvaluationConfig, sampling: SamplingConfig, benchmarks: Iterable[str]) -> None:
        super().__init__()
        self.config = config
        self.sampler = Sampler(sampling)
        self.metrics = nn.ModuleDict({name: BenchmarkMetrics(config) for name in benchmarks})

    def evaluate(
        self, model: LanguageModel, batch: EvaluationBatch, seed_parts: tuple[int | str, ...], progress: Progress
    ) -> Rollouts:
        """Sample answers to a batch of problems and count the right ones; returns them as rollouts."""
        seed = derive_seed("evaluation", self.config.seed, batch.benchmark, *seed_parts)
        samples = self.sampler.sample(model, [prompt.tokens for prompt in batch.prompts], seed, progress)
        num_samples = self.sampler.config.num_samples
        rollouts = Rollouts(
            *samples[:4],
            behavior_logprobs=torch.zeros(samples.tokens.shape),
            stop_reasons=samples.stop_reasons,
            rollout_ids=torch.arange(len(samples.tokens)),
            prompt_ids=torch.tensor([prompt.index for prompt in batch.prompts]).repeat_interleave(num_samples),
            sampled_at_step=torch.zeros(len(samples.tokens), dtype=torch.long),
            temperature=self.sampler.config.temperature,
        )
        correct = check_answers(model, rollouts, batch)
        self._of(batch).update(correct.view(-1, num_samples), rollouts.stop_reasons, rollouts.num_tokens)
        return rollouts

    def measure_reverse_kl(
        self, model: LanguageModel, teacher: Teacher, batch: EvaluationBatch, rollouts: Rollouts, batch_size: int = 16
    ) -> None:
        """Count ``logpi - logq`` of every token of fresh rollouts."""
        targets = teacher.score(rollouts, TeacherRequest())
        for rows, scored in model.score_in_chunks(rollouts, batch_size):
            logprobs = scored.padded(scored.statistics().logprobs).cpu()
            self._of(batch).update_reverse_kl((logprobs - targets.logprobs[rows])[rollouts.mask[rows]].to(model.device))

    def reset(self) -> None:
        """Start anew. Call it where an evaluation begins: tensors made in inference mode stay bound to it."""
        for metrics in self.metrics.values():
            metrics.reset()  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Figures as ``benchmark/name``, and ``mean/name``: their unweighted mean over the benchmarks."""
        figures = {name: metrics.compute() for name, metrics in self.metrics.items()}  # type: ignore[operator]
        named = {f"{name}/{key}": value for name, row in figures.items() for key, value in row.items()}
        shared = set.intersection(*(set(row) for row in figures.values())) if figures else set()
        means = {f"mean/{key}": torch.stack([row[key] for row in figures.values()]).mean() for key in sorted(shared)}
        return {**named, **means}

    def _of(self, batch: EvaluationBatch) -> BenchmarkMetrics:
        metrics = self.metrics[batch.benchmark]
        assert isinstance(metrics, BenchmarkMetrics)
        return metrics


def check_answers(model: LanguageModel, rollouts: Rollouts, batch: EvaluationBatch) -> Tensor:
    """Decode and verify responses.

    Returns:
        [B] bool; all False where there is no verifier.
    """
    if batch.verifier is None:
        return torch.zeros(len(rollouts), dtype=torch.bool)
    by_index = {prompt.index: prompt.problem.answer or "" for prompt in batch.prompts}
    golds = [by_index[index] for index in rollouts.prompt_ids.tolist()]
    return torch.tensor([v.correct for v in batch.verifier.verify(decode_responses(model, rollouts), golds)])


def decode_responses(model: LanguageModel, rollouts: Rollouts) -> list[str]:
    """Text of each response, without special tokens."""
    rows = zip(rollouts.tokens.tolist(), rollouts.num_tokens.tolist(), strict=True)
    texts: list[str] = model.tokenizer.batch_decode([r[:n] for r, n in rows], skip_special_tokens=True)
    return texts
