"""Checks of what there is to learn, and of whether the teacher's signal reaches the student."""

import math

from opdlab.screening.answers import Compared
from opdlab.screening.measure import Measurements
from opdlab.screening.pair import Maybe, Missing
from opdlab.screening.thresholds import LIMITS
from opdlab.screening.verdicts import Check, checked, unmeasured, worse


def learning_checks(found: Measurements) -> list[Check]:
    """Return the checks of headroom, overlap, gap, answers and prefixes."""
    return [
        *(_headroom(name, compared) for name, compared in found.accuracy.items()),
        *_distances(found),
        *_answers(found),
        _prefixes(found),
    ]


def errors_above(compared: Compared) -> float:
    """Return the difference of two accuracies in standard errors; infinite if they differ without an error."""
    if compared.difference == 0:
        return 0.0
    return compared.difference / compared.error if compared.error else math.copysign(math.inf, compared.difference)


def _headroom(name: str, compared: Maybe[Compared]) -> Check:
    key = f"headroom:{name}"
    if isinstance(compared, Missing):
        return unmeasured(key, compared)
    n = compared.num_samples
    finding = (
        f"pass@1 {compared.student:.3f} of the student, {compared.teacher:.3f} of the teacher, ± {compared.error:.3f}; "
        f"pass@{n} {compared.student_any:.3f} and {compared.teacher_any:.3f}; {compared.num_problems} problems x {n}"
    )
    verdict = "bad" if not compared.teacher_any else LIMITS["headroom"].verdict(errors_above(compared))
    mend = "take a better teacher or other prompts: the student cannot learn from one that does no better"
    if verdict == "look":
        mend = "measure with a larger --num_prompts: the difference is within two standard errors"
    return checked(key, compared.difference, finding, mend, verdict=verdict, unit="pass@1")


def _distances(found: Measurements) -> list[Check]:
    gap = found.gap
    if isinstance(gap, Missing):
        return [unmeasured(name, gap) for name in ("same_model", "overlap", "gap", "entropy", "positions")]
    reason = Missing("the teacher does not know these probabilities at this temperature")
    checks = [unmeasured("same_model", reason)]
    if gap.difference is not None:
        finding = f"log-probabilities of the student's tokens differ by {gap.difference:.3g} nats in the mean"
        checks = [checked("same_model", gap.difference, finding, "give another teacher: it is the student itself")]
    masses = ", ".join(f"{k}: {mass:.3f}" for k, mass in gap.student_mass.items())
    shared = ", ".join(f"{k}: {share:.2f}" for k, share in gap.overlap.items())
    checks.append(
        checked(
            "overlap",
            gap.student_mass[gap.k],
            f"the student's probability of the teacher's K most likely tokens: {masses}; "
            f"shared tokens of both top K: {shared}",
            "begin with demonstrations of the teacher (data.demonstrations), or take a teacher closer to the student",
        )
    )
    bound = "" if gap.whole else " over the support"
    sampled = "" if gap.sampled_kl is None else f"; estimated from the sampled tokens {gap.sampled_kl:.3f}"
    finding = (
        f"reverse KL {gap.reverse_kl:.3f} ± {gap.reverse_kl_error:.3f} nats a token{bound}, "
        f"forward KL {gap.forward_kl:.3f}{sampled}"
    )
    mend = "begin with demonstrations of the teacher (data.demonstrations), or take a teacher closer to the student"
    checks.append(checked("gap", max(gap.reverse_kl, gap.sampled_kl or 0.0), finding, mend))
    return [*checks, _entropy(found), _positions(found)]


def _entropy(found: Measurements) -> Check:
    gap = found.gap
    assert not isinstance(gap, Missing)
    if gap.teacher_entropy is None:
        return unmeasured("entropy", Missing("the teacher does not tell its entropy"))
    ratio = gap.student_entropy / gap.teacher_entropy if gap.teacher_entropy else math.inf
    confidence = "" if gap.confidence is None else f"; the teacher's most likely token has {gap.confidence:.3f}"
    finding = (
        f"entropy {gap.student_entropy:.3f} nats of the student, {gap.teacher_entropy:.3f} of the teacher{confidence}"
    )
    mend = "the student hardly varies: sample at a higher temperature, or start from an earlier checkpoint"
    return checked("entropy", ratio, finding, mend)


def _positions(found: Measurements) -> Check:
    gap = found.gap
    assert not isinstance(gap, Missing)
    bins = gap.bins
    if len(bins) < 2:
        return unmeasured("positions", Missing("the answers are too short"))
    part = max(1, len(bins) // 4)
    ends = [
        sum(each.reverse_kl * each.count for each in side) / sum(each.count for each in side)
        for side in (bins[:part], bins[-part:])
    ]
    number = ends[1] / ends[0] if ends[0] > 0 else math.inf if ends[1] > 0 else 1.0
    sure = [each.confidence for each in (bins[0], bins[-1])]
    finding = f"reverse KL {ends[0]:.3f} nats at the first quarter of positions, {ends[1]:.3f} at the last"
    if sure[0] is not None and sure[1] is not None:
        finding += f"; the teacher's confidence goes from {sure[0]:.3f} to {sure[1]:.3f}"
    mend = "the teacher loses the thread late: lower max_new_tokens, or take a gate such as block64"
    return checked("positions", number, finding, mend)


def _answers(found: Measurements) -> list[Check]:
    own, other = found.lengths["student"], found.lengths.get("teacher")
    beside = "" if other is None else f" (the teacher's: {other.truncated:.0%} of answers of {other.mean:.0f} tokens)"
    cut = (
        f"{own.truncated:.0%} of the student's answers are cut off; they have {own.mean:.0f} tokens in the mean{beside}"
    )
    beside = "" if other is None else f" (of the teacher's: {other.repeated:.0%})"
    again = f"{own.repeated:.0%} of the 4-grams of the student's answers repeat an earlier one{beside}"
    return [
        checked(
            "truncated", own.truncated, cut, "raise max_new_tokens, or see stop tokens: what is cut off never ends"
        ),
        checked(
            "repeated",
            own.repeated,
            again,
            "the student loops: sample at temperature 1, or train it otherwise first",
        ),
    ]


def _prefixes(found: Measurements) -> Check:
    prefixes = found.prefixes
    if isinstance(prefixes, Missing):
        return unmeasured("prefixes", prefixes)
    rows = list(prefixes.items())
    said = "; ".join(f"from {share} {each.teacher:.3f} against {each.student:.3f}" for share, each in rows)
    mean = sum(each.difference for _, each in rows) / len(rows)
    # The shares have the same answers in common, so that their errors do not cancel out.
    error = sum(each.error for _, each in rows) / len(rows)
    number = 0.0 if mean == 0 else mean / error if error else math.copysign(math.inf, mean)
    verdict = LIMITS["prefixes"].verdict(number)
    if not any(each.teacher for _, each in rows):
        verdict = worse(verdict, "bad")
    finding = f"pass@1 of the teacher against the student where both go on from parts of the student's answers: {said}"
    mend = (
        "from the student's beginnings the teacher does no better, so its advice there is doubtful: train on shorter "
        "answers, or begin with demonstrations"
    )
    return checked("prefixes", mean, finding, mend, verdict=verdict, unit="pass@1")
