"""Estimators as pure functions of counts and sums.

Shapes: P problems, n samples of each. A problem's samples are not independent, so every standard error is clustered by
problem.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Return the unbiased probability that at least one of k samples is correct, per problem.

    ``1 - C(n - c, k) / C(n, k)``, computed as a product to avoid overflow.

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
    return 1 - ((wrong - i).clamp(min=0) / (num_samples - i)).prod(-1)  # [P, k] -> [P]


def majority_vote(answers: Sequence[Sequence[str | None]], correct: Tensor) -> Tensor:
    """Return the probability that the most frequent answer to a problem is correct, per problem.

    Each sample votes for its extracted answer, stripped of surrounding white space; samples without an answer do not
    vote. The result is the expectation over a random choice among tied answers, so the order of the samples has no
    effect. If the verifier's verdicts on equal answers differ, the answer counts as correct with the share of its votes
    that are correct.

    Args:
        answers: P rows of n answers, None if none was extracted.
        correct: [P, n] bool.

    Returns:
        [P] float64, 0 to 1; 0 for problems without votes.

    Example:
        >>> correct = torch.tensor([[True, True, False, False], [True, False, False, False]])
        >>> majority_vote([["4", "4", "5", None], ["1", "2", None, None]], correct)
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Reference:
        Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv 2203.11171.
    """
    shares = []
    for row, flags in zip(answers, correct.tolist(), strict=True):
        votes: dict[str, list[bool]] = defaultdict(list)
        for answer, is_correct in zip(row, flags, strict=True):
            if answer is not None:
                votes[answer.strip()].append(is_correct)
        most = max(map(len, votes.values()), default=0)
        tied = [flags for flags in votes.values() if len(flags) == most]
        # Sum integers and divide last, so that rounding does not depend on the order.
        shares.append(sum(map(sum, tied)) / (most * len(tied)) if tied else 0.0)
    return torch.tensor(shares, dtype=torch.float64)


def moments(totals: Tensor, weights: Tensor) -> Tensor:
    """Return the sums that :func:`weighted_mean` and :func:`standard_error` need; sums of several batches add up.

    Args:
        totals: [P], sum of the quantity over each problem's units.
        weights: [P], number of these units: tokens, or 1 if the problem itself is the unit.

    Returns:
        [5] float64: sums over problems of total, weight, total², total x weight, weight².

    Example:
        >>> moments(torch.tensor([1.0, 3.0]), torch.ones(2)).tolist()
        [4.0, 2.0, 10.0, 4.0, 2.0]
    """
    s, t = totals.double(), weights.double()
    return torch.stack([s, t, s * s, s * t, t * t]).sum(1)


def weighted_mean(sums: Tensor) -> Tensor:
    """Return the mean of a quantity over all units: the sum of totals over the sum of weights.

    Args:
        sums: [5], see :func:`moments`.

    Returns:
        Scalar float64.

    Example:
        >>> float(weighted_mean(moments(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))))
        2.0
    """
    return sums[0] / sums[1]


def standard_error(sums: Tensor, num_problems: Tensor) -> Tensor:
    """Return the standard error of :func:`weighted_mean`, clustered by problem.

    ``sqrt(P / (P - 1) * sum((s_i - R t_i)²)) / sum(t_i)`` with total ``s_i``, weight ``t_i`` and mean ``R``. With equal
    weights this is ``sqrt(var / P)``, with the variance over problems and denominator P - 1.

    Args:
        sums: [5], see :func:`moments`.
        num_problems: scalar, P.

    Returns:
        Scalar float64; NaN for fewer than two problems.

    Example:
        >>> values = torch.tensor([0.0, 1.0, 1.0, 0.5])
        >>> standard_error(moments(values, torch.ones(4)), torch.tensor(4)), values.std() / 4**0.5
        (tensor(0.2394, dtype=torch.float64), tensor(0.2394))

    Reference:
        Miller, "Adding Error Bars to Evals", arXiv 2411.00640; for unequal weights the ratio estimator in Cochran,
        "Sampling Techniques", chapter 6.
    """
    mean = weighted_mean(sums)
    squares = (sums[2] - 2 * mean * sums[3] + mean**2 * sums[4]).clamp(min=0)
    error = (squares * num_problems / (num_problems - 1).clamp(min=1)).sqrt() / sums[1]
    return torch.where(num_problems > 1, error, torch.nan)


def standard_error_of_mean(errors: Tensor) -> Tensor:
    """Return the standard error of the unweighted mean of B independent estimates: ``sqrt(sum(se²)) / B``.

    Args:
        errors: [B], the standard errors of the estimates.

    Returns:
        Scalar.

    Example:
        >>> standard_error_of_mean(torch.tensor([0.3, 0.4]))
        tensor(0.2500)
    """
    return errors.square().sum().sqrt() / len(errors)
