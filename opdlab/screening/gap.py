"""How far student and teacher are apart on the student's answers, and whose tokens carry their probability.

Shapes: B rollouts, T response tokens, N valid positions, K support, V vocabulary. Log-probabilities, divergences and
entropies are in nats. The vocabulary is read tile by tile; only [B, T] and [B, T, K] are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.metrics.functional import moments, standard_error
from opdlab.objectives.functional import support_divergence
from opdlab.policies import LanguageModel
from opdlab.scoring import SupportTail, topk_with_statistics
from opdlab.types import Rollouts, Targets, TeacherRequest

NUM_BINS = 8
"""Number of intervals of positions."""


@dataclass(frozen=True)
class Bin:
    """Means over an interval of response positions.

    Args:
        start: first position, from 0.
        end: position after the last one.
        count: number of tokens there.
        reverse_kl: nats.
        student_entropy: nats.
        teacher_entropy: nats, or None if the teacher does not tell it.
        confidence: probability of the teacher's most likely token, or None.
    """

    start: int
    end: int
    count: int
    reverse_kl: float
    student_entropy: float
    teacher_entropy: float | None
    confidence: float | None


@dataclass(frozen=True)
class Gap:
    """Differences of student and teacher on the student's answers; means over tokens.

    Args:
        k: size of the largest support.
        reverse_kl: KL(student, teacher) over the teacher's K most likely tokens and one outcome for all others: never
            above that of the vocabulary, and equal to it at K = V - 1.
        reverse_kl_error: its standard error, clustered by prompt.
        forward_kl: KL(teacher, student), the same way.
        sampled_kl: mean of the student's log-probability of its tokens less the teacher's: an estimate of the reverse
            KL over the vocabulary, unbiased at ``top_p`` 1; or None.
        whole: False if the teacher knows its probabilities only relative to each other: both divergences are then
            between distributions over the support.
        difference: mean absolute difference of the log-probabilities of the sampled tokens, or None.
        student_entropy: nats.
        teacher_entropy: nats, or None.
        confidence: probability of the teacher's most likely token, or None.
        student_mass: the student's probability of the teacher's K most likely tokens, by K.
        teacher_mass: the teacher's probability of them, by K; empty if it is not known.
        overlap: share of the student's K most likely tokens that are among the teacher's, by K.
        bins: means by position.
        num_tokens: N.
    """

    k: int
    reverse_kl: float
    reverse_kl_error: float
    forward_kl: float
    sampled_kl: float | None
    whole: bool
    difference: float | None
    student_entropy: float
    teacher_entropy: float | None
    confidence: float | None
    student_mass: Mapping[int, float]
    teacher_mass: Mapping[int, float]
    overlap: Mapping[int, float]
    bins: Sequence[Bin]
    num_tokens: int


def ladder(k: int) -> list[int]:
    """Return the sizes of a support that are looked at: powers of two below ``k``, and ``k``.

    Example:
        >>> ladder(37)
        [1, 2, 4, 8, 16, 32, 37]
    """
    return [size for size in (1 << power for power in range(k.bit_length())) if size < k] + [k]


def requests(k: int, vocab_size: int) -> list[TeacherRequest]:
    """Return what the teacher is asked for, the richest first; a served teacher may know less than a local one."""
    most = TeacherRequest(top_k=k, vocab_size=vocab_size, entropy=True, tail=True)
    return [most, replace(most, entropy=False), replace(most, entropy=False, tail=False, logprobs=False)]


@torch.no_grad()
def measure_gap(student: LanguageModel, rollouts: Rollouts, targets: Targets, batch_size: int) -> Gap:
    """Return the differences of the student and of the teacher that gave ``targets``.

    Args:
        student: scores the rollouts.
        rollouts: B answers of the student.
        targets: the teacher's, with a support, see :func:`requests`.
        batch_size: rollouts scored at a time.
    """
    assert targets.support_ids is not None
    k, shape = targets.support_ids.shape[-1], rollouts.mask.shape
    columns: dict[str, Tensor] = {}
    student_mass, overlaps = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for rows, found, overlap, tail in _chunks(student, rollouts, targets, batch_size):
        for name, values in found.items():
            columns.setdefault(name, torch.zeros(shape, dtype=torch.float64))[rows] = values.cpu().double()
        overlaps += overlap.cpu()
        logs = tail.logits - tail.statistics.log_normalizer[:, None]
        student_mass += logs.exp().cumsum(1).sum(0).cpu().double()
    columns |= _of_teacher(targets, columns["logprobs"])
    mask = rollouts.mask.bool()
    count = int(mask.sum())
    means = {name: float(values[mask].mean()) for name, values in columns.items()}
    sizes = torch.tensor(ladder(k))
    return Gap(
        k=k,
        reverse_kl=means["reverse_kl"],
        reverse_kl_error=_error(columns["reverse_kl"], rollouts),
        forward_kl=means["forward_kl"],
        sampled_kl=means.get("sampled_kl"),
        whole=targets.log_normalizer is not None,
        difference=means.get("difference"),
        student_entropy=means["entropy"],
        teacher_entropy=means.get("teacher_entropy"),
        confidence=means.get("confidence"),
        student_mass=_by_size(student_mass / count, sizes),
        teacher_mass=_teacher_mass(targets, mask, sizes),
        overlap=_by_size(overlaps.cumsum(0) / (count * torch.arange(1, k + 1)), sizes),
        bins=_bins(columns, mask),
        num_tokens=count,
    )


def _chunks(
    student: LanguageModel, rollouts: Rollouts, targets: Targets, batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor, SupportTail]]:
    """Yield rows, their columns [b, T], the number of tokens that both rank above each place, [K], and the support."""
    for rows, scored in student.score_in_chunks(rollouts, batch_size):
        part = targets.rows(rows).to(student.device)
        assert part.support_ids is not None
        assert part.support_logits is not None
        mask = scored.mask
        tail = scored.support_tail(part.support_ids)
        of_teacher: dict[str, Any] = {}
        if part.log_normalizer is not None and part.log_tail is not None:
            of_teacher = {
                "student_log_normalizer": tail.statistics.log_normalizer,
                "teacher_log_normalizer": part.log_normalizer[mask],
                "student_log_tail": tail.log_tail,
                "teacher_log_tail": part.log_tail[mask],
            }
        kind = "bucket" if of_teacher else "renormalize"
        sides = tail.logits, part.support_logits[mask]
        values = {
            name: support_divergence(*sides, divergence=name, tail=kind, **of_teacher)  # type: ignore[arg-type]
            for name in ("reverse_kl", "forward_kl")
        }
        values |= {"entropy": tail.statistics.entropy, "logprobs": tail.statistics.logprobs}
        own = topk_with_statistics(scored.hidden, scored.head, scored.tokens, tail.ids.shape[1])[0].ids
        found = {name: scored.padded(each) for name, each in values.items()}
        yield rows, found, shared_ranks(own, tail.ids), tail


def shared_ranks(a: Tensor, b: Tensor) -> Tensor:
    """Return how many ids two rankings share, by the worse of the two ranks of an id; summed over positions.

    The running sum up to K is the number of ids that the first K of both have in common.

    Args:
        a: [N, K] long, ids, each once in a row.
        b: the same.

    Returns:
        [K] long.

    Example:
        >>> shared_ranks(torch.tensor([[5, 7, 9]]), torch.tensor([[7, 5, 8]]))
        tensor([0, 2, 0])
    """
    k = a.shape[1]
    ordered, place = torch.cat([a, b], 1).sort(dim=1, stable=True)
    same = ordered[:, 1:] == ordered[:, :-1]  # the one in front is of ``a``, since the sort is stable
    ranks = torch.maximum(place[:, :-1], place[:, 1:] - k)
    return torch.bincount(ranks[same], minlength=k)


def _of_teacher(targets: Targets, logprobs: Tensor) -> dict[str, Tensor]:
    """Return the columns that the teacher's targets give, [B, T] each."""
    found: dict[str, Tensor] = {}
    if (known := targets.known_logprobs) is not None:
        found["sampled_kl"] = logprobs - known.double()
        found["difference"] = found["sampled_kl"].abs()
    if targets.entropy is not None:
        found["teacher_entropy"] = targets.entropy.double()
    if targets.log_normalizer is not None and targets.support_logits is not None:
        found["confidence"] = (targets.support_logits[..., 0] - targets.log_normalizer).double().exp()
    return found


def _teacher_mass(targets: Targets, mask: Tensor, sizes: Tensor) -> dict[int, float]:
    if targets.log_normalizer is None or targets.support_logits is None:
        return {}
    logs = targets.support_logits[mask] - targets.log_normalizer[mask][:, None]  # [N, K]
    return _by_size(logs.double().exp().cumsum(1).mean(0), sizes)


def _by_size(values: Tensor, sizes: Tensor) -> dict[int, float]:
    return dict(zip(sizes.tolist(), values[sizes - 1].tolist(), strict=True))


def _error(values: Tensor, rollouts: Rollouts) -> float:
    """Return the standard error of the mean of [B, T] values over valid positions, clustered by prompt."""
    prompts, group = rollouts.prompt_ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    totals, weights = torch.zeros(2, len(prompts), dtype=torch.float64)
    totals.index_add_(0, group, values.masked_fill(~rollouts.mask.bool(), 0.0).sum(1))
    weights.index_add_(0, group, rollouts.num_tokens.double())
    return float(standard_error(moments(totals, weights), torch.tensor(len(prompts))))


def _bins(columns: Mapping[str, Tensor], mask: Tensor) -> list[Bin]:
    """Return means by position; intervals without a token are left out."""
    width = -(-mask.shape[1] // NUM_BINS)
    place = (torch.arange(mask.shape[1]) // width).expand_as(mask)[mask]
    counts = torch.bincount(place, minlength=NUM_BINS)
    sums = {name: torch.bincount(place, values[mask], minlength=NUM_BINS) for name, values in columns.items()}

    def mean(name: str, number: int) -> float | None:
        return float(sums[name][number] / counts[number]) if name in sums else None

    return [
        Bin(
            start=number * width,
            end=min((number + 1) * width, mask.shape[1]),
            count=int(counts[number]),
            reverse_kl=mean("reverse_kl", number) or 0.0,
            student_entropy=mean("entropy", number) or 0.0,
            teacher_entropy=mean("teacher_entropy", number),
            confidence=mean("confidence", number),
        )
        for number in range(NUM_BINS)
        if counts[number]
    ]
