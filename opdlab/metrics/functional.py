"""Estimates as pure functions of counts."""

import torch
from torch import Tensor


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Unbiased probability that at least one of k samples is correct, per problem.

    ``1 - C(n - c, k) / C(n, k)``, computed as a product so that nothing overflows.

    Args:
        num_correct: [P], correct samples c of each problem.
        num_samples: n, samples of each problem.
        k: 1 to n.

    Returns:
        [P] float64, 0 to 1.

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 4]), num_samples=4, k=2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    Reference:
        Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """
    # C(n - c, k) / C(n, k) = product over i = 0 .. k - 1 of (n - c - i) / (n - i)
    i = torch.arange(k, dtype=torch.float64, device=num_correct.device)
    wrong = (num_samples - num_correct.double()).unsqueeze(-1)
    return 1 - ((wrong - i).clamp(min=0) / (num_samples - i)).prod(-1)
