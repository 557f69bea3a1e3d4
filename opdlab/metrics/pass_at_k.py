"""pass@k as a torchmetrics metric."""

from typing import Any

from torch import Tensor

from opdlab.errors import require
from opdlab.metrics.functional import pass_at_k
from opdlab.metrics.problem_mean import ProblemMean


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
