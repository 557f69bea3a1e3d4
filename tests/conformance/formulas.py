"""The formulas of objectives, written with plain probabilities over the whole vocabulary.

``a`` is the student's distribution, ``b`` the teacher's; they need not sum to 1. Shapes: N positions, V vocabulary,
K support.
"""

import math
from typing import Any

import torch
from torch import Tensor

from opdlab.objectives import FullDivergence, SampledTokenOPD, SupportDivergence
from tests.conformance.batch import Case

BETA, ALPHA = 0.3, 0.2


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def divergence(name: str, a: Tensor, b: Tensor) -> Tensor:
    """The papers' divergences with the shares BETA and ALPHA, [N, K] -> [N]."""
    if name == "reverse_kl":
        return kl(a, b)
    if name == "forward_kl":
        return kl(b, a)
    if name == "skew_reverse_kl":
        return kl(a, (1 - ALPHA) * b + ALPHA * a)
    if name == "skew_forward_kl":
        return kl(b, (1 - ALPHA) * a + ALPHA * b)
    m = (1 - BETA) * a + BETA * b
    return BETA * kl(b, m) + (1 - BETA) * kl(a, m)


def restricted(probabilities: Tensor, ids: Tensor, tail: str) -> Tensor:
    """One side's distribution on the support, [N, V] -> [N, K], or [N, K + 1] with the tail."""
    on_support = probabilities.gather(-1, ids)
    if tail == "renormalize":
        return on_support / on_support.sum(-1, keepdim=True)
    outside = probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([on_support, outside], -1) if tail == "bucket" else on_support


def on_support(case: Case, objective: SupportDivergence) -> Tensor:
    """The loss of a divergence on a support, one position at a time: the union's ids once."""
    losses = []
    for student, teacher, behavior in zip(case.student, case.teacher, case.behavior, strict=True):
        sides = {"teacher": [teacher], "student": [behavior], "union": [teacher, behavior]}[objective.support]
        ids = torch.tensor(sorted({i for side in sides for i in side.topk(objective.k).indices.tolist()}))
        both = (restricted(side.softmax(-1)[None], ids[None], objective.tail) for side in (student, teacher))
        losses.append(divergence(objective.divergence, *both))
    return torch.cat(losses)


def advantage(case: Case, objective: SampledTokenOPD) -> Tensor:
    """The advantage of each sampled token, [N]: the teacher's part, the baseline and the reward."""
    logq = case.sampled(case.teacher)
    reference = case.sampled(case.behavior if objective.reference == "behavior" else case.student.detach())
    values = []
    for q, p in zip(logq.tolist(), reference.tolist(), strict=True):
        x = q - p
        if objective.shape == "power":
            x = math.exp(q) ** objective.power - math.exp(p) ** objective.power
        elif objective.shape == "signed_log":
            x = math.copysign(math.log(1 + abs(x)), x)
        elif objective.advantage_clamp is not None:
            x = min(max(x, -objective.advantage_clamp), objective.advantage_clamp)
        values.append(x)
    result = torch.tensor(values, dtype=torch.float64)
    if objective.baseline == "support_kl":
        ids = case.teacher.topk(objective.k).indices
        both = (restricted(side.softmax(-1), ids, "bucket") for side in (case.student.detach(), case.teacher))
        result = result + kl(*both)
    return (
        result + objective.reward_weight * rewards(case, objective.reward_scaled) if objective.reward_weight else result
    )


def rewards(case: Case, scaled: bool) -> Tensor:
    """The verdict of each position's rollout less the mean of its prompt's, [N]."""
    verdicts, prompts = case.states.correct.tolist(), case.states.prompt_ids.tolist()
    found = []
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        group = torch.tensor([float(v) for v, of in zip(verdicts, prompts, strict=True) if of == prompt])
        reward = verdict - float(group.mean())
        found.append(reward / float(group.std()) if scaled else reward)
    return torch.tensor(found, dtype=torch.float64).repeat_interleave(case.mask.sum(1))


def of_sampled_token(case: Case, objective: SampledTokenOPD) -> Tensor:
    """The loss of each sampled token, one at a time, [N]."""
    if objective.estimator != "policy_gradient":
        r = case.sampled(case.teacher) - case.sampled(case.student)
        direct = {"k2": r**2 / 2, "k3": r.exp() - 1 - r, "abs": r.abs(), "nll": -case.sampled(case.student)}
        return direct[objective.estimator]
    ratios = (case.sampled(case.student) - case.sampled(case.behavior)).exp()
    losses = []
    for ratio, gain in zip(ratios, advantage(case, objective), strict=True):
        surrogate = ratio * gain
        if objective.clip is not None:
            surrogate = torch.minimum(surrogate, ratio.clamp(1 - objective.clip, 1 + objective.clip) * gain)
            if gain < 0 and objective.dual_clip is not None:
                surrogate = torch.maximum(surrogate, objective.dual_clip * gain)
        losses.append(-surrogate)
    return torch.stack(losses)


def plain_losses(case: Case) -> Tensor:
    """The losses that the formulas give an objective's options, [N], with a gradient to the case's leaves."""
    objective: Any = case.objective
    if isinstance(objective, SampledTokenOPD):
        return of_sampled_token(case, objective)
    if isinstance(objective, FullDivergence):
        return divergence(objective.divergence, case.student.softmax(-1), case.teacher.softmax(-1))
    return on_support(case, objective)
