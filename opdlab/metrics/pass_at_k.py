"""pass@k as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opdlab.errors import require
from opdlab.metrics.functional import pass_at_k


class PassAtK(Metric):
    """Unbiased pass@k, averaged over problems and synchronised across processes.

    Args:
        k: samples of which one must be correct.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        UsageError: k is below 1, or an update has fewer than k samples a problem.

    Example:
        >>> metric = PassAtK(k=2)
        >>> metric.update(torch.tensor([[True, False, False, False], [False, False, False, False]]))
        >>> metric.compute()
        tensor(0.2500)

    Reference:
        Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    num_problems: Tensor

    def __init__(self, k: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require(k >= 1, f"k is {k}, but must be at least 1")
        self.k = k
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Count some problems.

        Args:
            correct: [P, n] bool, whether each of n samples of P problems is right; n may differ between updates.
        """
        num_samples = correct.shape[1]
        require(num_samples >= self.k, f"pass@{self.k} needs at least {self.k} samples a problem, got {num_samples}")
        self.total += pass_at_k(correct.sum(1), num_samples, self.k).sum()
        self.num_problems += correct.shape[0]

    def compute(self) -> Tensor:
        """Mean over problems, a scalar, 0 to 1."""
        return (self.total / self.num_problems).float()
