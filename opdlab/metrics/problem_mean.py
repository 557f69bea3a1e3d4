"""A mean over problems with its standard error, as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opdlab.metrics.functional import moments, standard_error, weighted_mean


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
