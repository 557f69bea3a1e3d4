"""The metrics of a benchmark, computed from samples that are new or read from disk."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from opdlab.evaluation.config import EvaluationConfig
from opdlab.evaluation.samples import Sample
from opdlab.metrics import MajorityVote, PassAtK, ProblemMean
from opdlab.metrics.functional import standard_error_of_mean
from opdlab.types import StopReason
from opdlab.verifiers.verifier import last_boxed

ERROR_SUFFIX = "_se"
MEAN = "mean"


class BenchmarkMetrics(nn.Module):
    """The metrics of one benchmark, accumulated over its batches and over processes.

    Args:
        config: selects the metrics.
        num_samples: n, answers to each problem.
    """

    def __init__(self, config: EvaluationConfig, num_samples: int) -> None:
        super().__init__()
        self._num_samples = num_samples
        self.pass_at = nn.ModuleDict({f"pass@{k}": PassAtK(k) for k in config.pass_at})
        self.majority = MajorityVote()
        self.means = nn.ModuleDict(
            {name: ProblemMean() for name in ("correct", "truncated", "boxed", "length", "reverse_kl")}
        )

    def update(self, samples: Sequence[Sample]) -> None:
        """Add a batch of P problems: P * n samples, those of a problem consecutive."""
        shape = (-1, self._num_samples)
        if all(sample.correct is not None for sample in samples):
            correct = torch.tensor([bool(sample.correct) for sample in samples]).view(shape)
            for metric in self.pass_at.values():
                metric.update(correct)  # type: ignore[operator]
            answers = [sample.extracted for sample in samples]
            n = self._num_samples
            self.majority.update([answers[i : i + n] for i in range(0, len(answers), n)], correct)
            self._mean("correct").update(correct.double().mean(1))
        tokens = torch.tensor([float(sample.tokens) for sample in samples]).view(shape)
        truncated = torch.tensor([sample.stop_reason == StopReason.LENGTH.name.lower() for sample in samples])
        boxed = torch.tensor([last_boxed(sample.response) is not None for sample in samples])
        self._mean("truncated").update(truncated.view(shape).double().mean(1))
        self._mean("boxed").update(boxed.view(shape).double().mean(1))
        self._mean("length").update(tokens.double().mean(1))
        if all(sample.reverse_kl is not None for sample in samples):
            # Average over tokens and not over answers, because the KL per token measures the policies' distance.
            kl = torch.tensor([sample.reverse_kl for sample in samples], dtype=torch.float64).view(shape)  # [P, n]
            self._mean("reverse_kl").update((kl * tokens).sum(1) / tokens.sum(1), tokens.sum(1))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name, and their standard errors if there are at least two problems."""
        n = self._num_samples
        names = {"correct": f"avg@{n}"}
        means = {names.get(name, name): metric for name, metric in self.means.items()}
        metrics: dict[str, nn.Module] = {**self.pass_at, f"maj@{n}": self.majority, **means}
        figures: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            assert isinstance(metric, ProblemMean)
            if not metric.update_called or (value := metric.compute()).isnan():  # no answers to vote on
                continue
            figures[name] = value
            error = metric.standard_error()
            if not error.isnan():
                figures[name + ERROR_SUFFIX] = error
        return figures

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in [*self.pass_at.values(), self.majority, *self.means.values()]:
            metric.reset()  # type: ignore[operator]

    def _mean(self, name: str) -> ProblemMean:
        metric = self.means[name]
        assert isinstance(metric, ProblemMean)
        return metric


def over_benchmarks(figures: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the unweighted means of the metrics that all benchmarks have, with their standard errors.

    Example:
        >>> one, other = {"pass@1": 0.2, "pass@1_se": 0.03}, {"pass@1": 0.4, "pass@1_se": 0.04}
        >>> rows = {"a": one, "b": other}
        >>> over_benchmarks({name: {k: torch.tensor(v) for k, v in row.items()} for name, row in rows.items()})
        {'pass@1': tensor(0.3000), 'pass@1_se': tensor(0.0250)}
    """
    rows = list(figures.values())
    shared = [key for key in rows[0] if all(key in row for row in rows)] if rows else []
    means = {}
    for key in shared:
        values = torch.stack([row[key] for row in rows])
        means[key] = standard_error_of_mean(values) if key.endswith(ERROR_SUFFIX) else values.mean()
    return means
