"""Metrics over problems, synchronised across processes: a mean with its standard error, pass@k and maj@n."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opdlab.errors import require
from opdlab.metrics.functional import majority_vote, moments, pass_at_k, standard_error, weighted_mean


class ProblemMean(Metric):
    """A mean with a standard error clustered by problem, synchronised across processes.

    Only sums are kept. They add up over processes for any division of the problems, and float64 keeps the variance
    accurate under subtraction.

    Args:
        kwargs: see :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ProblemMean()
        >>> metric.update(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        >>> metric.compute(), metric.standard_error()
        (tensor(0.5000), tensor(0.2887))
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    num_problems: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add P problems.

        Args:
            values: [P], estimate of each problem.
            weights: [P], number of units averaged in each estimate, to weight units equally; None weights problems
                equally.
        """
        weights = torch.ones_like(values) if weights is None else weights
        self.sums += moments(values.double() * weights.double(), weights).to(self.sums.device)
        self.num_problems += len(values)

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return weighted_mean(self.sums).float()

    def standard_error(self) -> Tensor:
        """Return the standard error of the mean over all processes, a scalar; NaN for fewer than two problems."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return standard_error(self.sums, self.num_problems).float()


class PassAtK(ProblemMean):
    """Unbiased pass@k, averaged over problems and synchronised across processes.

    Args:
        k: number of samples of which at least one must be correct.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        UsageError: k is below 1, or an update has fewer than k samples a problem.

    Example:
        >>> import torch
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[True, False, False, False], [False, False, False, False]]))
        >>> metric.compute(), metric.standard_error()
        (tensor(0.2500), tensor(0.2500))

    Reference:
        Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """

    higher_is_better = True

    def __init__(self, k: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(k >= 1, f"k is {k}, but must be at least 1")
        self.k = k

    def update(self, correct: Tensor) -> None:  # type: ignore[override] # as torchmetrics' own subclasses do
        """Add P problems.

        Args:
            correct: [P, n] bool, True for correct samples; n may differ between updates.
        """
        num_samples = correct.shape[1]
        require(num_samples >= self.k, f"pass@{self.k} needs at least {self.k} samples a problem, got {num_samples}")
        super().update(pass_at_k(correct.sum(1), num_samples, self.k))


class MajorityVote(ProblemMean):
    """Share of problems whose most frequent answer is correct, synchronised across processes.

    See :func:`opdlab.metrics.functional.majority_vote` for the counting of votes and the handling of ties.

    Example:
        >>> import torch
        >>> metric = MajorityVote()
        >>> correct = torch.tensor([[True, True, False], [True, False, False]])
        >>> metric.update([["4", "4", "5"], ["1", "2", None]], correct)
        >>> metric.compute()
        tensor(0.7500)

    Reference:
        Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv 2203.11171.
    """

    higher_is_better = True
    num_votes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("num_votes", torch.tensor(0), dist_reduce_fx="sum")

    def update(  # type: ignore[override] # as torchmetrics' own subclasses do
        self, answers: Sequence[Sequence[str | None]], correct: Tensor
    ) -> None:
        """Add P problems.

        Args:
            answers: P rows of n answers, None if none was extracted.
            correct: [P, n] bool.
        """
        self.num_votes += sum(answer is not None for row in answers for answer in row)
        super().update(majority_vote(answers, correct))

    def compute(self) -> Tensor:
        """Return the share, a scalar; NaN if no problem has an extracted answer."""
        return torch.where(self.num_votes > 0, super().compute(), torch.nan)
