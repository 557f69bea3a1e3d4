"""Divergences between student and teacher at one position, as pure functions of tensors.

``a`` is the student's distribution, ``b`` the teacher's. Letters: N positions, K support, V vocabulary, H and G
hidden sizes. Logarithms are natural.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.registry import suggestion
from opdlab.scoring import Head, divergence_statistics

Divergence = Literal["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]
Tail = Literal["renormalize", "bucket", "drop"]
Estimator = Literal["k2", "k3", "abs", "nll"]

# The least tail mass that 1 - P can tell from 0: float32 rounds near 1 to 6e-8, and a sum of K terms adds to that.
_MIN_TAIL_MASS = 1e-6
# Logarithm of the mass of an empty tail: its exponential is 0, and unlike -inf it may be subtracted and multiplied.
_LOG_NO_MASS = -1e4
# exp(20) is 5e8. A larger ratio carries no information, and without a bound one token could overflow the batch.
MAX_LOG_RATIO = 20.0


def support_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: Divergence,
    tail: Tail,
    student_log_normalizer: Tensor | None = None,
    teacher_log_normalizer: Tensor | None = None,
    student_log_tail: Tensor | None = None,
    teacher_log_tail: Tensor | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    valid: Tensor | None = None,
) -> Tensor:
    """Return a divergence between student and teacher on a support of K tokens.

    ``reverse_kl = sum a (log a - log b)``, ``forward_kl = sum b (log b - log a)``, ``jsd = beta KL(b, m) + (1 - beta)
    KL(a, m)`` with ``m = (1 - beta) a + beta b``, ``skew_reverse_kl = KL(a, (1 - alpha) b + alpha a)``,
    ``skew_forward_kl = KL(b, (1 - alpha) a + alpha b)``. ``tail`` says which ``a`` and ``b``: ``renormalize``, both
    softmaxes over the support; ``bucket``, the probabilities over the vocabulary and one more outcome, the mass outside
    the support, so that the value never exceeds the divergence over the vocabulary; ``drop``, the probabilities on the
    support alone, so that the sums are partial and all but ``jsd`` may be negative.

    Args:
        student_logits: [..., K]; takes a gradient.
        teacher_logits: [..., K]; detached.
        divergence: see above.
        tail: see above.
        student_log_normalizer: [...], log-sum-exp of the logits over the vocabulary; takes a gradient. ``bucket`` and
            ``drop`` need it.
        teacher_log_normalizer: [...], the teacher's; detached.
        student_log_tail: [...], log-sum-exp of the logits outside the support, for ``bucket``; takes a gradient. If it
            is None, the mass is one minus that of the support, and at least 1e-6: less is lost to rounding.
        teacher_log_tail: [...], the teacher's; detached.
        beta: the teacher's share in ``m`` of ``jsd``, between 0 and 1.
        alpha: the share of the first distribution in the second of the skewed ones, at least 0 and below 1.
        valid: [..., K] bool, False at entries to leave out, such as the second occurrence of an id; None for no such.

    Returns:
        [...], nats, float32 (float64 for float64 logits).

    Raises:
        UsageError: an option is unknown or out of range, K is 1 with ``renormalize``, or a normalizer is missing.

    Example:
        The student gives the two tokens 0.5 and 0.25, the teacher 0.5 and 0.4.

        >>> student, teacher = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5, 0.4]).log()
        >>> whole = {"student_log_normalizer": torch.tensor(0.0), "teacher_log_normalizer": torch.tensor(0.0)}
        >>> for tail in ("renormalize", "bucket", "drop"):
        ...     print(f"{support_divergence(student, teacher, divergence='reverse_kl', tail=tail, **whole):.4f}")
        0.0257
        0.1116
        -0.1175

    Reference:
        Skewed divergences: Ko et al., arXiv 2402.03898. Generalized JSD: Agarwal et al., arXiv 2306.13649.
    """
    check_divergence(divergence, beta, alpha)
    require_choice("tail", tail, get_args(Tail))
    k = student_logits.shape[-1]
    require(
        k >= 2 or tail != "renormalize",
        f"k is {k}, but must be at least 2: renormalised over a single token the loss is always zero",
    )
    for whose, normalizer in (("student", student_log_normalizer), ("teacher", teacher_log_normalizer)):
        needed = f"tail is {tail}, which needs {whose}_log_normalizer: give it"
        require(tail == "renormalize" or normalizer is not None, needed)
    return divergence_on_support(
        (student_logits, student_log_normalizer, student_log_tail),
        (teacher_logits, teacher_log_normalizer, teacher_log_tail),
        divergence=divergence,
        tail=tail,
        beta=beta,
        alpha=alpha,
        valid=valid,
    )


def divergence_on_support(
    student: tuple[Tensor, Tensor | None, Tensor | None],
    teacher: tuple[Tensor, Tensor | None, Tensor | None],
    *,
    divergence: Divergence,
    tail: Tail,
    beta: float,
    alpha: float,
    valid: Tensor | None,
) -> Tensor:
    """Return :func:`support_divergence` of options that are known to be right.

    Args:
        student: logits, log-normalizer and log-sum of the logits outside the support.
        teacher: the same.
        divergence: see there.
        tail: see there.
        beta: see there.
        alpha: see there.
        valid: see there.
    """
    sides: list[Tensor] = []
    for logits, normalizer, log_tail in (student, teacher):
        logits = logits.to(torch.promote_types(student[0].dtype, torch.float32))
        if valid is not None:
            logits = logits.masked_fill(~valid, -torch.inf)
        if tail == "renormalize":
            log_mass = logits.log_softmax(-1)
        else:
            assert normalizer is not None
            log_mass = logits - normalizer.unsqueeze(-1)
            if tail == "bucket":
                log_mass = torch.cat([log_mass, _log_tail_mass(log_mass, normalizer, log_tail).unsqueeze(-1)], -1)
        sides.append(log_mass if not sides else log_mass.detach())
    left_out = None if valid is None else ~valid
    if left_out is not None and tail == "bucket":
        left_out = torch.cat([left_out, torch.zeros_like(left_out[..., :1])], -1)
    return _divergence(sides[0], sides[1], divergence, beta, alpha, left_out)


def full_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
) -> Tensor:
    """Return a divergence between student and teacher over the whole vocabulary, without materializing [N, V].

    The formulas are those of :func:`support_divergence`, with ``a = softmax(student_hidden @ student_weight.T /
    temperature)`` and ``b`` likewise. Rows that one weight lacks are one more outcome, with probability 0 there. Both
    heads are evaluated tile by tile, and the gradient ``a (g - sum a g)``, ``g = dD/da``, of the student's logits too.

    Args:
        student_hidden: [N, H]; differentiable.
        student_weight: [V, H]; differentiable.
        teacher_hidden: [N, G]; detached.
        teacher_weight: [V, G], or with another number of rows; detached.
        divergence: ``reverse_kl``, ``forward_kl``, ``jsd``, ``skew_reverse_kl`` or ``skew_forward_kl``.
        beta: the teacher's share in the mixture of ``jsd``, between 0 and 1.
        alpha: the share of the first distribution in the second of the skewed ones, at least 0 and below 1.
        temperature: of both, above 0.

    Returns:
        [N], nats, float32 (float64 for float64 inputs).

    Raises:
        UsageError: an option is unknown or out of range; or one side lacks ids, and the divergence is infinite there.

    Example:
        >>> student, teacher = torch.randn(5, 8), torch.randn(5, 6)
        >>> heads = torch.randn(11, 8), torch.randn(11, 6)
        >>> log_a, log_b = (student @ heads[0].T).log_softmax(-1), (teacher @ heads[1].T).log_softmax(-1)
        >>> ours = full_divergence(student, heads[0], teacher, heads[1], divergence="reverse_kl")
        >>> torch.allclose(ours, (log_a.exp() * (log_a - log_b)).sum(-1), atol=1e-4)
        True
    """
    check_divergence(divergence, beta, alpha)
    heads = Head(student_weight, temperature=temperature), Head(teacher_weight, temperature=temperature)
    unused = torch.zeros(len(student_hidden), dtype=torch.long, device=student_hidden.device)
    values, _ = divergence_statistics(
        student_hidden, heads[0], teacher_hidden, heads[1], unused, divergence=divergence, beta=beta, alpha=alpha
    )
    return values


def require_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a UsageError if an option is none of the known values; the message suggests the nearest.

    Example:
        >>> require_choice("tail", "buckets", ["bucket", "drop"])
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: tail is 'buckets'; did you mean 'bucket'? it must be one of bucket, drop
    """
    hint = suggestion(str(value), known) or ";"
    require(value in known, f"{name} is '{value}'{hint} it must be one of {', '.join(known)}")


def check_divergence(divergence: str, beta: float, alpha: float) -> None:
    """Raise a UsageError if a divergence is unknown, or the option that it uses is out of range.

    Example:
        >>> check_divergence("jsd", beta=1.0, alpha=0.1)
        Traceback (most recent call last):
        ...
        opdlab.errors.UsageError: beta is 1.0, where jsd is always 0: use divergence reverse_kl, its limit there
    """
    require_choice("divergence", divergence, get_args(Divergence))
    if divergence == "jsd":
        # GKD's code takes 0 and 1 as switches to the Kullback-Leibler divergences; the formula itself is 0 there.
        for end, limit in ((0, "forward_kl"), (1, "reverse_kl")):
            require(beta != end, f"beta is {beta}, where jsd is always 0: use divergence {limit}, its limit there")
        require(0 < beta < 1, f"beta is {beta}, but must lie between 0 and 1")
    if divergence.startswith("skew"):
        require(0 <= alpha < 1, f"alpha is {alpha}, but must be at least 0 and below 1")


def unused_by(divergence: str) -> set[str]:
    """Return which of the options ``beta`` and ``alpha`` a divergence does not use."""
    used = {"beta": divergence == "jsd", "alpha": divergence.startswith("skew")}
    return {name for name, uses in used.items() if not uses}


def _log_tail_mass(log_mass: Tensor, normalizer: Tensor, log_tail: Tensor | None) -> Tensor:
    """Return the logarithm of the mass outside the support, [...]."""
    if log_tail is not None:
        mass = log_tail - normalizer
        return mass.masked_fill(mass == -torch.inf, _LOG_NO_MASS)
    # log(1 - P) from log P, which stays accurate for a small P
    return (-log_mass.logsumexp(-1).expm1()).clamp(min=_MIN_TAIL_MASS).log()


def _divergence(
    log_a: Tensor, log_b: Tensor, divergence: Divergence, beta: float, alpha: float, left_out: Tensor | None
) -> Tensor:
    """Return the divergence of two distributions, [..., K] logarithms each -> [...]."""
    a, b = log_a.exp(), log_b.exp()
    if left_out is not None:  # a and b are 0 there; a finite logarithm keeps 0 * -inf out of value and gradient
        log_a, log_b = log_a.masked_fill(left_out, 0.0), log_b.masked_fill(left_out, 0.0)

    def mixture(share: float) -> Tensor:
        """Return ``log((1 - share) a + share b)``."""
        return torch.logaddexp(log_a + math.log(1 - share), log_b + math.log(share))

    if divergence == "reverse_kl" or (divergence == "skew_reverse_kl" and not alpha):
        terms = a * (log_a - log_b)
    elif divergence == "forward_kl" or (divergence == "skew_forward_kl" and not alpha):
        terms = b * (log_b - log_a)
    elif divergence == "jsd":
        log_m = mixture(beta)
        terms = beta * b * (log_b - log_m) + (1 - beta) * a * (log_a - log_m)
    elif divergence == "skew_reverse_kl":
        terms = a * (log_a - mixture(1 - alpha))
    else:
        terms = b * (log_b - mixture(alpha))
    return terms.sum(-1)


def sampled_token_divergence(logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: Estimator) -> Tensor:
    """Return a direct estimate of the divergence from the sampled token alone.

    With ``r = logq - logpi``: ``k2 = r^2 / 2``, ``k3 = exp(r) - 1 - r`` with ``r`` at most 20, ``abs = |r|``,
    ``nll = -logpi``. There is no importance ratio. On fresh rollouts, the expected gradient of ``k2`` is that of the
    reverse KL and of ``k3`` that of the forward KL; of ``abs`` it is neither. On stale rollouts all are biased.

    Args:
        logprobs: [...], nats, under the student; takes the gradient.
        teacher_logprobs: [...], nats; detached. ``nll`` ignores it.
        estimator: see above.

    Returns:
        [...], nats (``k2``: nats squared).

    Raises:
        UsageError: the estimator is unknown.

    Example:
        >>> student, teacher = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
        >>> for estimator in ("k2", "k3", "abs", "nll"):
        ...     print(estimator, sampled_token_divergence(student, teacher, estimator=estimator))
        k2 tensor([0.0000, 0.5000])
        k3 tensor([0.0000, 0.7183])
        abs tensor([0., 1.])
        nll tensor([1., 2.])

    Reference:
        J. Schulman, "Approximating KL divergence", 2020, names k2 and k3.
    """
    require_choice("estimator", estimator, get_args(Estimator))
    log_ratio = teacher_logprobs.detach() - logprobs
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        # Bounded as a whole: with exp alone bounded, what is left of the gradient would lower a probability that is
        # far too low already.
        bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
        return bounded.expm1() - bounded  # exp(r) - 1 without cancellation near 0
    return log_ratio.abs() if estimator == "abs" else -logprobs
