"""maj@n as a torchmetrics metric."""

from collections.abc import Sequence

from torch import Tensor

from opdlab.metrics.functional import majority_vote
from opdlab.metrics.problem_mean import ProblemMean


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

    def update(  # type: ignore[override] # as torchmetrics' own subclasses do
        self, answers: Sequence[Sequence[str | None]], correct: Tensor
    ) -> None:
        """Add P problems.

        Args:
            answers: P rows of n answers, None if none was extracted.
            correct: [P, n] bool.
        """
        super().update(majority_vote(answers, correct))
