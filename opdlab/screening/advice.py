"""The support, the tail and the objective that follow from where the probability is."""

from dataclasses import dataclass

from opdlab.screening.gap import Gap
from opdlab.screening.thresholds import LIMITS

LEAST_K = 4
"""Smallest K that is advised: on the toy pair, K = 2 was the only size that did worse."""


@dataclass(frozen=True)
class Advice:
    """An objective that suits a pair.

    Args:
        objective: registered name.
        k: size of the support, or None for the whole vocabulary.
        tail: what becomes of the tokens outside, or None.
        mass: the smaller of the student's and the teacher's probability of the teacher's K most likely tokens.
        options: for the command line of ``opdlab fit``.
    """

    objective: str
    k: int | None
    tail: str | None
    mass: float
    options: str


def advise(gap: Gap, gives_hidden: bool) -> Advice:
    """Return the objective that follows from the probabilities by K.

    The smallest K, from 4 up, whose tokens hold 97% for both: LSM on it. If none does, a bucket for the rest keeps the
    probability outside in the loss. If the student has less than half of its probability in the largest support, the
    whole vocabulary is compared, or the union of both supports if the teacher gives no hidden states.

    Args:
        gap: the measured probabilities.
        gives_hidden: True if the teacher can be compared over the whole vocabulary.
    """
    look, bad = LIMITS["objective"].look or 0.0, LIMITS["objective"].bad or 0.0
    masses = {k: min(mass, gap.teacher_mass.get(k, mass)) for k, mass in gap.student_mass.items()}
    found = next((k for k, mass in masses.items() if k >= min(LEAST_K, gap.k) and mass >= look), None)
    if found is not None:
        options = f"--model.objective teacher_topk --model.objective.k {found}"
        return Advice("teacher_topk", found, "renormalize", masses[found], options)
    support = f"--model.objective support_divergence --model.objective.k {gap.k} --model.objective.tail bucket"
    if masses[gap.k] >= bad:
        return Advice("support_divergence", gap.k, "bucket", masses[gap.k], support)
    if gives_hidden:
        return Advice("full_divergence", None, None, masses[gap.k], "--model.objective full_divergence")
    return Advice("support_divergence", gap.k, "bucket", masses[gap.k], f"{support} --model.objective.support union")
