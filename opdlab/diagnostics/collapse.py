"""Signs that training has gone wrong, as pure functions of a step's trace.

Shapes: B rollouts, T response tokens, V vocabulary. Log-probabilities are in nats.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from opdlab.diagnostics.trace import StepTrace
from opdlab.errors import require

_NGRAM = 4
_MAX_RATIO = 10.0  # of importance, in the estimate of the teacher's entropy


@dataclass(frozen=True)
class CollapseLimits:
    """Limits beyond which training counts as collapsed. Healthy runs stay far away from them.

    Args:
        patience: optimizer steps without any weight, or with a loss of exactly 0; or logged steps in a row with a
            wrong entropy. At least 1.
        min_weight: a step with a lower mean weight counts as one without any weight.
        min_entropy_ratio: least entropy of the student, as a share of the teacher's on the same positions.
        min_entropy: least entropy of the student, nats.
        max_uniformity: largest entropy of the student, as a share of ln V, that of equal probabilities.
        max_repeated: largest share of 4-grams that repeat an earlier one of their response.
        max_truncated: largest share of truncated responses; it counts only where 4-grams repeat more as well.
        min_rise: least rise of these two shares since the first buffer.
        max_length_factor: largest factor between the mean length of a buffer's responses and of the first buffer's,
            either way.
        max_reverse_kl_factor: largest reverse KL to the teacher on fresh rollouts, as a multiple of the run's best.
        min_reverse_kl_rise: least rise of the reverse KL above the best, nats per token.

    Raises:
        UsageError: a value is out of range.
    """

    patience: int = 3
    min_weight: float = 1e-3
    min_entropy_ratio: float = 0.05
    min_entropy: float = 1e-6
    max_uniformity: float = 0.9998
    max_repeated: float = 0.6
    max_truncated: float = 0.9
    min_rise: float = 0.3
    max_length_factor: float = 8.0
    max_reverse_kl_factor: float = 4.0
    min_reverse_kl_rise: float = 2.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = 1 if name == "patience" or name.endswith("factor") else 0
            require(value >= low, f"{name} is {value}, but must be at least {low}")


@torch.no_grad()
def step_sums(trace: StepTrace) -> Tensor:
    """Return sums over a micro-batch's valid positions, [4] float64, on the device.

    They are: positions, weights, absolute weighted losses, absolute gaps between teacher and student (NaN if they are
    not known).
    """
    inputs, weights, mask = trace.inputs, trace.gates.weights, trace.inputs.mask
    gap, losses = inputs.teacher_gap, inputs.position_losses
    gap = inputs.divergence if gap is None else gap  # of a teacher that does not know the sampled tokens
    assert losses is not None
    gap = torch.full_like(losses, torch.nan) if gap is None else gap  # nothing says where the models differ
    # The weight of a masked position is 0, but its loss may be anything.
    weighted = (trace.loss_shares * weights * losses).masked_fill(~mask, 0.0)
    sums = [mask.sum(), weights.sum(), weighted.abs().sum(), gap.abs().sum()]
    return torch.stack([value.double() for value in sums])


def dead(sums: Tensor, limits: CollapseLimits) -> Tensor:
    """Return whether an optimizer step had no weight, and whether its loss was exactly 0; [2] long, on the device.

    A loss of 0 counts only where student and teacher differ, by more than a thousandth of a nat in the mean.

    Args:
        sums: of all its micro-batches, see :func:`step_sums`.
        limits: with the least mean weight.
    """
    num, weights, losses, gaps = sums.unbind()
    return torch.stack([weights <= limits.min_weight * num, (losses == 0) & (gaps > 1e-3 * num)]).long() * (num > 0)


@torch.no_grad()
def buffer_sums(trace: StepTrace) -> Tensor:
    """Return sums over a micro-batch's sampled rollouts, for the first pass over a buffer; [4] float64, on the device.

    Demonstrations are left out: nobody sampled them. The sums are: valid positions, behavior less teacher
    log-probability (NaN if the teacher does not know it), 4-grams that repeat an earlier one of their response,
    4-grams; see :func:`repeated_ngrams`.
    """
    inputs, mask = trace.inputs, _sampled(trace)
    of_teacher = inputs.teacher_logprobs
    of_teacher = inputs.behavior_logprobs * torch.nan if of_teacher is None else of_teacher
    gap = (inputs.behavior_logprobs - of_teacher).masked_fill(~mask, 0.0)
    repeats, grams = repeated_ngrams(trace.rollouts.tokens, mask)
    return torch.stack([mask.sum().double(), gap.sum(dtype=torch.float64), repeats.double(), grams.double()])


def _sampled(trace: StepTrace) -> Tensor:
    """Return the mask of the valid positions that the snapshot sampled, [B, T] bool."""
    mask, demonstration = trace.inputs.mask, trace.rollouts.demonstration
    return mask if demonstration is None else mask & ~demonstration[:, None]


@torch.no_grad()
def repeated_ngrams(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of 4-grams that repeat an earlier one of their response, and of all 4-grams, on the device.

    4-grams are compared by a hash of 64 bits.

    Args:
        tokens: [B, T] long.
        mask: [B, T] bool; a 4-gram with a masked position does not count.

    Example:
        >>> tokens = torch.tensor([[7, 8, 7, 8, 7, 8]])
        >>> repeated_ngrams(tokens, torch.ones_like(tokens).bool())
        (tensor(1), tensor(3))
    """
    repeats = grams = mask.new_zeros((), dtype=torch.long)
    if mask.shape[1] >= _NGRAM:
        factors = torch.tensor([pow(1_000_003, n) for n in range(_NGRAM)], device=mask.device)
        valid = mask.unfold(1, _NGRAM, 1).all(-1)
        keys = (tokens.unfold(1, _NGRAM, 1) * factors).sum(-1)
        # Masked 4-grams get keys that no other has.
        keys = keys.where(valid, -1 - torch.arange(keys.shape[1], device=keys.device)).sort(1).values
        repeats, grams = (keys[:, 1:] == keys[:, :-1]).sum(), valid.sum()
    return repeats, grams


@torch.no_grad()
def entropy_sums(trace: StepTrace) -> Tensor:
    """Return sums over a micro-batch's valid positions: number, student's and teacher's entropy; [3] float64.

    The teacher's entropy is taken from its targets. If they have none, from its support: the entropy of the
    support's tokens and of one more outcome for all others, a lower bound. Without a support it is the estimate
    ``-(q(y) / pi_b(y)) log q(y)`` from the sampled tokens y, whose expectation is the entropy; ratios above 10 are
    clipped, so that it errs towards 0, and demonstrations, which nobody sampled, are left out of all three sums. NaN if
    the targets have none of these.
    """
    targets, mask = trace.targets, trace.inputs.mask
    assert targets is not None
    if targets.entropy is not None:
        teacher = targets.entropy
    elif targets.support_logits is not None and targets.support_mass is not None:
        mass = targets.support_mass.clamp(0, 1)
        logits, valid = targets.support_logits, targets.support_valid
        if valid is not None:  # an id may stand in a union twice
            logits = logits.masked_fill(~valid & mask[..., None], -torch.inf)
        inside = torch.special.entr(logits.softmax(-1)).sum(-1)
        teacher = mass * inside + torch.special.entr(mass) + torch.special.entr(1 - mass)
    elif targets.known_logprobs is None:
        teacher = torch.full_like(trace.values["entropy"], torch.nan)
    else:
        mask, logprobs = _sampled(trace), targets.logprobs.clamp(min=-1e4)
        teacher = -(logprobs - trace.inputs.behavior_logprobs).exp().clamp(max=_MAX_RATIO) * logprobs
    columns = torch.stack([torch.ones_like(teacher), trace.values["entropy"], teacher])
    return columns.masked_fill(~mask, 0.0).sum((1, 2), dtype=torch.float64)


@dataclass(frozen=True)
class BufferSigns:
    """What the first pass over a buffer shows.

    Args:
        length: mean length of the responses, tokens.
        truncated: share of truncated responses.
        repeated: share of 4-grams that repeat an earlier one of their response.
        reverse_kl: of the snapshot that sampled to the teacher, nats per token.
    """

    length: float
    truncated: float
    repeated: float
    reverse_kl: float


def entropy_sign(student: float, teacher: float, vocab_size: int, limits: CollapseLimits) -> str | None:
    """Return what is wrong with the entropy of a step, or None.

    Args:
        student: mean entropy, nats.
        teacher: the teacher's on the same positions, nats.
        vocab_size: V.
        limits: beyond which it is wrong.

    Example:
        >>> entropy_sign(0.001, 0.8, 100, CollapseLimits())
        "the student's entropy is 0.001 nats, the teacher's 0.8 on the same positions"
        >>> entropy_sign(0.5, 0.8, 100, CollapseLimits())
    """
    if student >= limits.max_uniformity * math.log(vocab_size):
        return f"the student's entropy is {student:.3g} nats: all {vocab_size} tokens are equally likely"
    if student < limits.min_entropy_ratio * teacher:
        return f"the student's entropy is {student:.2g} nats, the teacher's {teacher:.2g} on the same positions"
    if student < limits.min_entropy:
        return f"the student's entropy is {student:.2g} nats: one token has all probability"
    return None


def buffer_signs(
    now: BufferSigns, first: BufferSigns, best_reverse_kl: float, limits: CollapseLimits
) -> dict[str, str]:
    """Return what is wrong with a buffer, by the name of the sign.

    Args:
        now: of the buffer.
        first: of the run's first buffer.
        best_reverse_kl: of the run's buffers so far, nats per token.
        limits: beyond which it is wrong.
    """
    signs = {}
    repeats = f"{now.repeated:.0%} of the responses' 4-grams repeat an earlier one ({first.repeated:.0%} at first)"
    rise = now.repeated - first.repeated
    if now.repeated > limits.max_repeated and rise > limits.min_rise:
        signs["repeated"] = repeats
    if now.truncated > limits.max_truncated and min(now.truncated - first.truncated, 2 * rise) > limits.min_rise:
        cut = f"{now.truncated:.0%} of the responses are cut off ({first.truncated:.0%} at first)"
        signs["truncated"] = f"{cut}, {repeats}"
    if not first.length / limits.max_length_factor <= now.length <= first.length * limits.max_length_factor:
        signs["length"] = f"responses have {now.length:.3g} tokens in the mean ({first.length:.3g} at first)"
    best = best_reverse_kl
    if now.reverse_kl > max(limits.max_reverse_kl_factor * best, best + limits.min_reverse_kl_rise):
        signs["reverse_kl"] = (
            f"the reverse KL on fresh rollouts is {now.reverse_kl:.3g} nats per token, and was {best:.3g}"
        )
    return signs
