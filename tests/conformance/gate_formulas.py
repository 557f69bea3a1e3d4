"""The formulas of the control gates, as loops over plain numbers: raw weights, row by row, before normalization."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opdlab.gating import GateInputs
from opdlab.strategies import PrefixGate
from opdlab.testing import GateTester

INPUTS = replace(GateTester(PrefixGate, num_tokens=40).inputs(torch.float64), step=25)
"""Rows full, short, with holes in the mask, of one token, and empty."""
Rows = list[list[float]]


def rows(tensor: Tensor | None, inputs: GateInputs = INPUTS) -> Rows:
    """Values of the valid positions, row by row."""
    assert tensor is not None
    return [values[mask].tolist() for values, mask in zip(tensor, inputs.mask, strict=True)]


def combined(function: Callable[[float, float], float], first: Rows, second: Rows) -> Rows:
    return [[function(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


def scaled(values: Rows, low: float, high: float) -> Rows:
    """Values between two quantiles of all, as 0 to 1."""
    ordered = sorted(value for row in values for value in row)
    bottom, top = quantile(ordered, low), quantile(ordered, high)
    return [[min(1.0, max(0.0, (value - bottom) / (top - bottom))) for value in row] for row in values]


def quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def kept(scores: Rows, share: float) -> Rows:
    """1 at the positions of each row with the highest scores, by repeated search for the largest."""
    found = []
    for row in scores:
        weights = [0.0] * len(row)
        for _ in range(max(1, math.floor(share * len(row) + 1e-9)) if row else 0):
            best = max((t for t in range(len(row)) if not weights[t]), key=lambda t: (row[t], -t))
            weights[best] = 1.0
        found.append(weights)
    return found


def iw_opd(gamma: float) -> Rows:
    found = []
    for teacher, current in zip(rows(INPUTS.teacher_logprobs), rows(INPUTS.current_logprobs), strict=True):
        gaps = [abs(q - p) for q, p in zip(teacher, current, strict=True)]
        found.append([1 + gamma * (1 - math.fsum(gaps[:t]) / math.fsum(gaps)) for t in range(len(gaps))])
    return found


def fire_opd(dropped: float, alpha: float, beta: float) -> Rows:
    teacher, student = rows(INPUTS.teacher_entropy), rows(INPUTS.entropy)
    most_teacher, most_student = (max(h for row in entropies for h in row) for entropies in (teacher, student))
    likelihoods = [statistics.fmean(row) if row else math.nan for row in rows(INPUTS.teacher_logprobs)]
    threshold = quantile(sorted(value for value in likelihoods if not math.isnan(value)), dropped)
    return [
        [
            (likelihood >= threshold - 1e-12) * (1 + alpha * (1 - t / most_teacher)) * (1 + beta * s / most_student)
            for t, s in zip(teacher_row, student_row, strict=True)
        ]
        for likelihood, teacher_row, student_row in zip(likelihoods, teacher, student, strict=True)
    ]


def ratio_mask(min_ratio: float, max_ratio: float) -> Rows:
    return [[float(min_ratio <= math.exp(d) <= max_ratio) for d in row] for row in rows(INPUTS.drift)]


def truncated_ratio(max_ratio: float) -> Rows:
    return [[min(math.exp(d), max_ratio) for d in row] for row in rows(INPUTS.drift)]


def sequence_ratio_mask(min_ratio: float, max_ratio: float, aggregate: str) -> Rows:
    found = []
    for row in rows(INPUTS.drift):
        total = math.fsum(row) / (len(row) if aggregate == "geometric_mean" and row else 1)
        found.append([float(min_ratio <= math.exp(total) <= max_ratio)] * len(row))
    return found


def sign_consistency(strength: float) -> Rows:
    verdicts = {1: 1, 0: -1, -1: 0}
    gaps = combined(lambda q, p: q - p, rows(INPUTS.teacher_logprobs), rows(INPUTS.current_logprobs))
    return combined(
        lambda gap, correct: 1 + strength * math.copysign(1, gap) * verdicts[int(correct)], gaps, rows(INPUTS.correct)
    )


def entropy_top(share: float) -> Rows:
    return kept(rows(INPUTS.entropy), share)


def tip(share: float) -> Rows:
    h, d = scaled(rows(INPUTS.entropy), 0, 1), scaled(rows(INPUTS.divergence), 0, 1)
    return kept(combined(lambda a, b: a + b - a * b, h, d), share)


def ta_opd(share: float) -> Rows:
    d, c = (scaled(rows(values), 0.05, 0.95) for values in (INPUTS.divergence, INPUTS.compatible_mass))
    return kept(combined(lambda a, b: a * b, d, c), share)


def horizon(tokens: int, growth: int, every: int) -> Rows:
    columns = [[t for t, valid in enumerate(mask) if valid] for mask in INPUTS.mask.tolist()]
    return [[float(t < tokens + growth * (INPUTS.step // every)) for t in row] for row in columns]


def f_opd(alpha: float, threshold: float) -> Rows:
    found = []
    for drifts, ages in zip(rows(INPUTS.drift), rows(INPUTS.age), strict=True):
        distance = math.fsum(math.exp(d) * d - math.exp(d) + 1 for d in drifts) / max(len(drifts), 1)
        found.append([max(0.0, math.exp(-alpha * math.sqrt(distance)) / (age + 1) - threshold) for age in ages])
    return found


def rg_opd(margin: float, block_size: int | None) -> Rows:
    found: Rows = []
    tensors: list[Any] = [INPUTS.mask, INPUTS.teacher_logprobs, INPUTS.current_logprobs, INPUTS.correct]
    for mask, teacher, student, verdict in zip(*(tensor.tolist() for tensor in tensors), strict=True):
        places = [t for t, valid in enumerate(mask) if valid]
        row = []
        for t in places:
            span = places if block_size is None else [u for u in places if u // block_size == t // block_size]
            gap = math.fsum(teacher[u] - student[u] for u in span)
            row.append(float((verdict[t] == 1 and gap > margin) or (verdict[t] == 0 and gap < -margin)))
        found.append(row)
    return found


CONTROLS: dict[str, tuple[Callable[..., Rows], list[dict[str, Any]]]] = {
    "iw_opd": (iw_opd, [{"gamma": 0.7}]),
    "fire_opd": (fire_opd, [{"dropped": dropped, "alpha": 0.5, "beta": 2.0} for dropped in (0.0, 0.2, 0.5, 0.9)]),
    "ratio_mask": (ratio_mask, [{"min_ratio": 0.7, "max_ratio": 1.5}]),
    "truncated_ratio": (truncated_ratio, [{"max_ratio": 1.3}]),
    "sequence_ratio_mask": (
        sequence_ratio_mask,
        [
            {"min_ratio": 0.8, "max_ratio": 1.3, "aggregate": "geometric_mean"},
            {"min_ratio": 0.1, "max_ratio": 1.8, "aggregate": "product"},
        ],
    ),
    "sign_consistency": (sign_consistency, [{"strength": 0.4}]),
    "entropy_top": (entropy_top, [{"share": share} for share in (0.01, 0.2, 0.29, 0.5, 1.0)]),
    "tip": (tip, [{"share": share} for share in (0.1, 0.5)]),
    "ta_opd": (ta_opd, [{"share": share} for share in (0.1, 0.5)]),
    "horizon": (
        horizon,
        [{"tokens": 7, "growth": growth, "every": every} for growth, every in ((0, 1), (3, 10), (1, 1), (100, 25))],
    ),
    "f_opd": (f_opd, [{"alpha": a, "threshold": t} for a, t in ((1.0, 0.0), (0.3, 0.2), (0.0, 0.0))]),
    "rg_opd": (
        rg_opd,
        [{"margin": m, "block_size": size} for m, size in ((0.0, None), (3.0, None), (0.0, 1), (0.4, 1), (0.5, 7))],
    ),
}
"""The formula of each control gate, and options to try it with."""
