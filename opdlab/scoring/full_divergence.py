"""Divergences between the distributions of two heads over the whole vocabulary, in bounded memory.

``a`` is the student's distribution, ``b`` the teacher's. Both heads are evaluated tile by tile, and a few floats per
position are kept. With ``g`` the derivative of the divergence with respect to ``a``, the gradient of the student's
logits is ``a (g - sum a g)``; the backward pass computes it tile by tile from the sums of the forward pass.

Ids that only one side has are one more outcome, whose probability is 0 on the other side.

Shapes: N positions, V vocabulary, C of its columns, H student's hidden size, G teacher's.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdlab.errors import require
from opdlab.scoring.head import Buffers, Head, LogitTiles, autocast_inputs, places, reused, tiles, wide_dtype
from opdlab.scoring.head_gradients import HeadGradients
from opdlab.scoring.logprobs import OnlineSoftmax, TokenStatistics

# Logits of a tile to which elementwise operations are applied at a time on a CPU: the operands fit in its caches.
MAX_PIECE = 1 << 18
# Stands for a logit of -inf. Times the smallest probability, 1e-38, it is 0 to any precision.
_LOWEST = -1e15


def divergence_statistics(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    targets: Tensor,
    *,
    divergence: str,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> tuple[Tensor, TokenStatistics]:
    """Return the divergence from the teacher at every position, and the student's token statistics, in one pass.

    The formulas are those of :func:`opdlab.objectives.functional.full_divergence`. The statistics are without gradient.

    Args:
        hidden: [N, H]; differentiable.
        head: the student's; its weight, bias and low-rank update are differentiable.
        teacher_hidden: [N, G].
        teacher_head: the teacher's, which takes no gradient; options such as the temperature are its own.
        targets: [N] long, for the statistics.
        divergence: name of the divergence.
        beta: the teacher's share in the mixture of ``jsd``.
        alpha: the share of the first distribution in the second one of the skewed divergences.

    Returns:
        The divergence [N], nats, and the :class:`TokenStatistics`; float32, or float64 for float64 inputs.

    Raises:
        UsageError: one side has ids that the other one lacks, and the divergence is infinite for these.

    Example:
        >>> hidden, head = torch.ones(1, 1), Head(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> other, targets = Head(torch.tensor([[0.0], [1.0], [3.0]])), torch.tensor([2])
        >>> values, statistics = divergence_statistics(hidden, head, hidden, other, targets, divergence="reverse_kl")
        >>> values, statistics.logprobs
        (tensor([0.0970]), tensor([-0.4076]))
    """
    head, rule = head.gathered(), Rule.of(divergence, beta, alpha)
    teacher = teacher_head.gathered().detached(), teacher_hidden.detach()
    rule.check(head.num_ids, teacher[0].num_ids)
    with autocast_inputs(hidden) as states:
        outputs: tuple[Tensor, ...] = _FullDivergence.apply(  # type: ignore[no-untyped-call]
            states, *head.tensors, targets, head, teacher, rule
        )
    return outputs[0], TokenStatistics(*outputs[1:])


# -- the divergences ---------------------------------------------------------------------------------------------------

# Of a tile: ``a``, ``a g`` up to a multiple of ``a``, and the part of the divergence, [N'], if it is wanted.
Terms = tuple[Tensor, Tensor, Tensor | None]
# Both logarithms are overwritten, and so are the terms by those of the next tile.
TermsOf = Callable[[Tensor, Tensor, float, bool, Buffers], Terms]


def _exp(logarithms: Tensor, name: str, buffers: Buffers) -> Tensor:
    """Return probabilities; those that underflow are as small as normal numbers get, since others take far longer."""
    found = reused(buffers, name, logarithms.shape, logarithms)
    return torch.clamp(logarithms, min=math.log(torch.finfo(found.dtype).tiny), out=found).exp_()


def _mixture(a: Tensor, b: Tensor, share: float, buffers: Buffers) -> Tensor:
    """Return ``(1 - share) a + share b``."""
    return torch.mul(a, 1 - share, out=reused(buffers, "mixture", a.shape, a)).add_(b, alpha=share)


def _reverse_kl(log_a: Tensor, log_b: Tensor, _share: float, value: bool, buffers: Buffers) -> Terms:
    a = _exp(log_a, "a", buffers)
    weighted = log_a.sub_(log_b).mul_(a)
    return a, weighted, weighted.sum(1) if value else None


def _forward_kl(log_a: Tensor, log_b: Tensor, _share: float, value: bool, buffers: Buffers) -> Terms:
    a, b = _exp(log_a, "a", buffers), _exp(log_b, "b", buffers)
    total = log_b.sub_(log_a).mul_(b).sum(1) if value else None
    return a, b.neg_(), total


def _jsd(log_a: Tensor, log_b: Tensor, beta: float, value: bool, buffers: Buffers) -> Terms:
    a, b = _exp(log_a, "a", buffers), _exp(log_b, "b", buffers)
    log_m = _mixture(a, b, beta, buffers).log_()
    weighted = log_a.sub_(log_m).mul_(a).mul_(1 - beta)
    total = weighted.sum(1).add_(log_b.sub_(log_m).mul_(b).sum(1), alpha=beta) if value else None
    return a, weighted, total


def _skew_reverse_kl(log_a: Tensor, log_b: Tensor, alpha: float, value: bool, buffers: Buffers) -> Terms:
    a, b = _exp(log_a, "a", buffers), _exp(log_b, "b", buffers)
    m = _mixture(b, a, alpha, buffers)
    share = torch.div(a, m, out=b)
    log_ratio = log_a.sub_(m.log_())
    total = torch.mul(a, log_ratio, out=m).sum(1) if value else None
    return a, log_ratio.sub_(share, alpha=alpha).mul_(a), total


def _skew_forward_kl(log_a: Tensor, log_b: Tensor, alpha: float, value: bool, buffers: Buffers) -> Terms:
    a, b = _exp(log_a, "a", buffers), _exp(log_b, "b", buffers)
    m = _mixture(a, b, alpha, buffers)
    weighted = torch.div(b, m, out=log_a).mul_(a).mul_(alpha - 1)
    total = log_b.sub_(m.log_()).mul_(b).sum(1) if value else None
    return a, weighted, total


_TERMS: dict[str, TermsOf] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skew_reverse_kl": _skew_reverse_kl,
    "skew_forward_kl": _skew_forward_kl,
}


@dataclass(frozen=True)
class Rule:
    """A divergence as sums over outcomes.

    Args:
        name: of the divergence.
        share: ``beta`` or ``alpha``; 0 if there is none.
        value_of_student: divergence per probability of an outcome that the teacher lacks.
        value_of_teacher: divergence per probability of an outcome that the student lacks.
        slope: derivative ``g`` at an outcome that the teacher lacks.
    """

    name: str
    share: float
    value_of_student: float
    value_of_teacher: float
    slope: float

    @classmethod
    def of(cls, divergence: str, beta: float, alpha: float) -> "Rule":
        """Return the rule of a divergence; a skewed one with alpha 0 is the plain one."""
        if divergence == "jsd":
            own = -(1 - beta) * math.log1p(-beta)
            return cls(divergence, beta, own, -beta * math.log(beta), own)
        if divergence.startswith("skew") and not alpha:
            divergence = divergence.removeprefix("skew_")
        if divergence == "reverse_kl":
            return cls(divergence, 0.0, math.inf, 0.0, math.inf)
        if divergence == "forward_kl":
            return cls(divergence, 0.0, 0.0, math.inf, 0.0)
        if divergence == "skew_reverse_kl":
            return cls(divergence, alpha, -math.log(alpha), 0.0, -math.log(alpha) - 1)
        return cls(divergence, alpha, 0.0, -math.log(alpha), 0.0)

    @property
    def one_pass(self) -> bool:
        """True if the divergence is a mean of differences of logits, so that no normalizer is needed for its sums."""
        return self.name in ("reverse_kl", "forward_kl")

    def check(self, student_size: int, teacher_size: int) -> None:
        """Raise a UsageError if the divergence is infinite for two vocabularies of these sizes."""
        lacking, value = (
            ("teacher", self.value_of_student) if student_size > teacher_size else ("student", self.value_of_teacher)
        )
        require(
            student_size == teacher_size or math.isfinite(value),
            f"divergence is {self.name}, which is infinite if the {lacking} lacks ids, and the student has "
            f"{student_size} of them, the teacher {teacher_size}: take jsd, or models with equal vocabularies",
        )

    def terms(self, log_a: Tensor, log_b: Tensor, value: bool, buffers: Buffers) -> Terms:
        """Return the terms of a tile, see :data:`Terms`; the logarithms [N', C] are overwritten."""
        return _TERMS[self.name](log_a, log_b, self.share, value, buffers)


# -- passes over both vocabularies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Logits of student and teacher, tile by tile.

    Args:
        student: the student's.
        teacher: the teacher's.
    """

    student: LogitTiles
    teacher: LogitTiles

    @property
    def num_shared(self) -> int:
        """Return the number of ids that both sides have."""
        return min(self.student.head.num_ids, self.teacher.head.num_ids)

    def shared(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield rows, columns, and both logits [N', C], of tiles that cover the shared ids."""
        num_rows, head = len(self.student.hidden), replace(self.student.head, vocab_size=self.num_shared)
        for rows, columns in tiles(num_rows, head):
            ours, theirs = _finite(self.student, rows, columns), _finite(self.teacher, rows, columns)
            yield rows, columns, ours, theirs.to(ours.dtype)

    def alone(self, side: LogitTiles) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and logits [N', C] of tiles that cover the ids that only one side has."""
        for rows, columns in tiles(len(side.hidden), side.head, start=self.num_shared):
            yield rows, columns, _finite(side, rows, columns).to(wide_dtype(self.student.hidden))


def _finite(side: LogitTiles, rows: slice, columns: slice) -> Tensor:
    """Return the logits of a tile, all of them finite."""
    logits = side.tile(rows, columns)
    # Only a bias makes a logit of -inf, and the difference of two of them is NaN.
    return logits if side.head.bias is None else logits.clamp_(min=_LOWEST)


def _pieces(tile: Tensor, start: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of a tile's rows, in the tile and among all positions, of which each fits in the cache of a CPU."""
    step = len(tile) if tile.is_cuda else max(1, MAX_PIECE // max(tile.shape[1], 1))
    for top in range(0, len(tile), step):
        stop = min(top + step, len(tile))
        yield slice(top, stop), slice(start + top, start + stop)


class _Sums:
    """Sums over both vocabularies, of one pass; of two for a mixture, whose logarithm needs both normalizers.

    Args:
        pair: the logits.
        rule: the divergence.
        targets: [N] long.

    Attributes:
        value: [N], the divergence.
        mean: [N], ``sum a g``, up to the multiple that :data:`Terms` leaves out.
        statistics: the student's token statistics.
        teacher_normalizer: [N], log-sum-exp of the teacher's logits.
    """

    def __init__(self, pair: _Pair, rule: Rule, targets: Tensor) -> None:
        self._pair, self._rule, self._targets = pair, rule, targets
        self._like = pair.student.hidden.new_empty(0, dtype=wide_dtype(pair.student.hidden))
        self._softmax = [OnlineSoftmax(len(targets), self._like) for _ in range(2)]  # the student's, the teacher's
        self._chosen = self._like.new_full((len(targets), 1), -torch.inf)  # the targets' logits
        differences = self._add_shared()
        masses = [self._add_alone(place, side) for place, side in enumerate((pair.student, pair.teacher))]
        student, teacher = self._softmax
        self.statistics = student.statistics(self._chosen.squeeze(1))
        self.teacher_normalizer = teacher.statistics(student.max_logit).log_normalizer
        if rule.one_pass:
            shift = self.teacher_normalizer - self.statistics.log_normalizer
            if rule.name == "forward_kl":
                mean = differences * (teacher.max_logit - self.teacher_normalizer).exp()
                self.value, self.mean = -(mean + shift), -torch.ones_like(mean)
            else:
                mean = differences * (student.max_logit - self.statistics.log_normalizer).exp()
                self.value = self.mean = mean + shift
        else:
            self.value, self.mean = self._of_mixture()
            own, others = (  # probabilities of the ids that one side lacks
                0.0 if log_sum is None else (log_sum - normalizer).exp()
                for log_sum, normalizer in zip(
                    masses, (self.statistics.log_normalizer, self.teacher_normalizer), strict=True
                )
            )
            self.value += rule.value_of_student * own + rule.value_of_teacher * others
            self.mean += rule.slope * own

    def _add_shared(self) -> Tensor:
        """Add the shared ids to the softmaxes.

        Returns:
            [N], the sum of ``exp(z - max)`` times the difference of student's and teacher's logits for a divergence of
            one pass, 0 for another; ``z`` is the teacher's for the forward KL, else the student's.
        """
        student, teacher = self._softmax
        weighting = teacher if self._rule.name == "forward_kl" else student
        summed, buffers = self._like.new_zeros(len(self._targets)), Buffers()
        for rows, columns, ours, theirs in self._pair.shared():
            self._choose(rows, columns, ours)
            for inner, outer in _pieces(ours, rows.start):
                x, y = ours[inner], theirs[inner]
                before, difference = weighting.max_logit[outer].clone(), None
                if self._rule.one_pass:
                    difference = torch.sub(x, y, out=reused(buffers, "difference", x.shape, x))
                both = student.add(outer, x), teacher.add(outer, y)
                if difference is not None:
                    factor = (before - weighting.max_logit[outer]).exp()
                    summed[outer] = summed[outer] * factor + difference.mul_(both[weighting is teacher]).sum(1)
        return summed

    def _add_alone(self, place: int, side: LogitTiles) -> Tensor | None:
        """Add the ids that only one side has to its softmax; return their log-sum-exp, [N], or None without such."""
        if self._pair.num_shared == side.head.num_ids:
            return None
        alone = OnlineSoftmax(len(self._targets), self._like)
        for rows, columns, logits in self._pair.alone(side):
            if place == 0:
                self._choose(rows, columns, logits)
            alone.add(rows, logits.clone())
            self._softmax[place].add(rows, logits)
        return alone.statistics(alone.max_logit).log_normalizer

    def _of_mixture(self) -> tuple[Tensor, Tensor]:
        """Return value and mean over the shared ids, from a second pass."""
        value, mean = (self._like.new_zeros(len(self._targets)) for _ in range(2))
        buffers: Buffers = {}
        for rows, _, ours, theirs in self._pair.shared():
            for inner, outer in _pieces(ours, rows.start):
                log_a = ours[inner].sub_(self.statistics.log_normalizer[outer, None])
                log_b = theirs[inner].sub_(self.teacher_normalizer[outer, None])
                _, weighted, part = self._rule.terms(log_a, log_b, value=True, buffers=buffers)
                mean[outer] += weighted.sum(1)
                assert part is not None
                value[outer] += part
        return value, mean

    def _choose(self, rows: slice, columns: slice, logits: Tensor) -> None:
        inside, place = places(self._targets[rows, None], columns)
        self._chosen[rows] = torch.where(inside, logits.gather(1, place), self._chosen[rows])


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, targets, head, teacher, rule = inputs  # the tensors are the head's
        sums = _Sums(_Pair(LogitTiles(head, hidden), LogitTiles(*teacher)), rule, targets)
        ctx.head, ctx.teacher, ctx.rule = head, teacher, rule
        ctx.save_for_backward(hidden, *tensors, sums.statistics.log_normalizer, sums.teacher_normalizer, sums.mean)
        ctx.mark_non_differentiable(*sums.statistics)
        return sums.value, *sums.statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *_, student_normalizer, teacher_normalizer, mean = ctx.saved_tensors
        pair, upstream, rule = _Pair(LogitTiles(ctx.head, hidden), LogitTiles(*ctx.teacher)), gradients[0], ctx.rule
        sums, buffers = HeadGradients(ctx, pair.student), Buffers()
        for rows, columns, ours, theirs in pair.shared():
            for inner, outer in _pieces(ours, rows.start):
                slope = ctx.head.slope(ours[inner])
                log_a = ours[inner].sub_(student_normalizer[outer, None])
                log_b = theirs[inner].sub_(teacher_normalizer[outer, None])
                a, weighted, _ = rule.terms(log_a, log_b, value=False, buffers=buffers)
                weighted.addcmul_(a, mean[outer, None], value=-1)  # [N', C]
                factor = upstream[outer, None] * slope  # [N', 1], or [N', C] with a soft cap
                torch.mul(weighted, factor, out=ours[inner])
            sums.add_tile(rows, columns, ours)
        for rows, columns, logits in pair.alone(pair.student):
            slope = ctx.head.slope(logits)
            a = logits.sub_(student_normalizer[rows, None]).exp_()
            factor = (rule.slope - mean[rows]) * upstream[rows]
            sums.add_tile(rows, columns, a.mul_(factor[:, None]).mul_(slope))
        return *sums.returned(), None, None, None, None
