"""The metrics of a benchmark, computed from samples that are new or read from disk."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
TEACHER = "teacher"
"""Prefix of the teacher's metrics, and with ``-NAME`` of each teacher's, if there are several."""
SHOWN = ("pass@*", "maj@*", "truncated", "length", "reverse_kl")
"""Patterns of the most important metrics. avg@n is pass@1, and the others are in the log and in results.json."""
Figures = dict[str, float]


class BenchmarkMetrics(nn.Module):
    """The metrics of one benchmark, accumulated over its batches and over processes.

    Args:
        config: selects the metrics.
        num_samples: n, answers to each problem.
    """

    def __init__(self, config: EvaluationConfig, num_samples: int) -> None:
        super().__init__()
        n = self._num_samples = num_samples
        pass_at = {f"pass@{k}": PassAtK(k) for k in config.pass_at}
        means = {name: ProblemMean() for name in (f"avg@{n}", "truncated", "boxed", "length", "reverse_kl")}
        self.metrics = nn.ModuleDict({**pass_at, f"maj@{n}": MajorityVote(), **means})

    def update(self, samples: Sequence[Sample]) -> None:
        """Add a batch of P problems: P * n samples, those of a problem consecutive."""
        n = self._num_samples

        def table(values: Iterable[float | None]) -> Tensor:  # [P, n]
            return torch.tensor(list(values), dtype=torch.float64).view(-1, n)

        metrics: Any = self.metrics
        if all(sample.correct is not None for sample in samples):
            correct = table(sample.correct for sample in samples).bool()
            answers = [[sample.extracted for sample in samples[i : i + n]] for i in range(0, len(samples), n)]
            for name in metrics:
                if name.startswith("pass@"):
                    metrics[name].update(correct)
            metrics[f"maj@{n}"].update(answers, correct)
            metrics[f"avg@{n}"].update(correct.double().mean(1))
        tokens = table(sample.tokens for sample in samples)
        metrics["truncated"].update(table(s.stop_reason == StopReason.LENGTH.name.lower() for s in samples).mean(1))
        metrics["boxed"].update(table(last_boxed(sample.response) is not None for sample in samples).mean(1))
        metrics["length"].update(tokens.mean(1))
        if all(sample.reverse_kl is not None for sample in samples):
            # Average over tokens and not over answers, because the KL per token measures the policies' distance.
            kl = table(sample.reverse_kl for sample in samples)
            metrics["reverse_kl"].update((kl * tokens).sum(1) / tokens.sum(1), tokens.sum(1))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by name, and their standard errors if there are at least two problems."""
        values: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, ProblemMean)
            if not metric.update_called or (value := metric.compute()).isnan():  # no answers to vote on
                continue
            values[name] = value
            error = metric.standard_error()
            if not error.isnan():
                values[name + ERROR_SUFFIX] = error
        return values

    def reset(self) -> None:
        """Reset all metrics."""
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]


def over_benchmarks(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the unweighted means of the metrics that all benchmarks have, with their standard errors.

    Example:
        >>> one, other = {"pass@1": 0.2, "pass@1_se": 0.03}, {"pass@1": 0.4, "pass@1_se": 0.04}
        >>> rows = {"a": one, "b": other}
        >>> over_benchmarks({name: {k: torch.tensor(v) for k, v in row.items()} for name, row in rows.items()})
        {'pass@1': tensor(0.3000), 'pass@1_se': tensor(0.0250)}
    """
    rows = list(values.values())
    shared = [key for key in rows[0] if all(key in row for row in rows)] if rows else []
    means = {}
    for key in shared:
        column = torch.stack([row[key] for row in rows])
        means[key] = standard_error_of_mean(column) if key.endswith(ERROR_SUFFIX) else column.mean()
    return means


def metric_names(benchmarks: Iterable[str], config: EvaluationConfig, num_samples: int) -> set[str]:
    """Return the names of all metrics that an evaluation of these benchmarks can log, without its prefix.

    Example:
        >>> names = metric_names(["toy"], EvaluationConfig(pass_at=(1,)), num_samples=8)
        >>> sorted(name for name in names if "@" in name and not name.endswith(ERROR_SUFFIX))
        ['mean/avg@8', 'mean/maj@8', 'mean/pass@1', 'toy/avg@8', 'toy/maj@8', 'toy/pass@1']
    """
    groups = [*benchmarks]
    left_out = set() if config.reverse_kl else {"reverse_kl"}
    metrics = BenchmarkMetrics(config, num_samples).metrics.keys() - left_out
    return {
        f"{group}/{metric}{suffix}"
        for group in (*groups, *([MEAN] if groups else []))
        for metric in metrics
        for suffix in ("", ERROR_SUFFIX)
    }


def figures_of(metrics: Mapping[str, Any], prefix: str) -> Figures:
    """Return the metrics of one evaluation without its prefix; the mean over benchmarks only if there are several.

    Args:
        metrics: by their name in the log.
        prefix: of the evaluation, such as ``val/``.
    """
    # With a single benchmark the mean over benchmarks is the same number.
    benchmarks = {key.split("/")[1] for key in metrics if key.startswith(prefix)} - {MEAN}
    return {
        key.removeprefix(prefix): float(value)
        for key, value in metrics.items()
        if key.startswith(prefix) and not (len(benchmarks) == 1 and key.startswith(f"{prefix}{MEAN}/"))
    }
