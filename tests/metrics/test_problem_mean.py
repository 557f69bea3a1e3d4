"""Means over problems and their standard errors against the bootstrap in full and the textbook's formula."""

import itertools

import numpy as np
import pytest
import torch

from opdlab.metrics import PassAtK, ProblemMean
from opdlab.metrics.functional import moments, standard_error, standard_error_of_mean


def test_error_equals_the_whole_bootstrap() -> None:
    values = [0.0, 0.125, 1.0, 0.5]
    metric = ProblemMean()
    metric.update(torch.tensor(values))
    resamples = itertools.product(values, repeat=len(values))
    # The bootstrap over problems divides by P where the variance estimate divides by P - 1.
    expected = np.std([np.mean(each) for each in resamples]) * (4 / 3) ** 0.5
    assert metric.standard_error().item() == pytest.approx(expected, rel=1e-6)
    assert metric.compute().item() == pytest.approx(np.mean(values))


def test_error_of_pass_at_k_takes_the_problem_as_the_unit() -> None:
    correct = torch.rand(30, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    correct[:15] = correct[:15, :1]  # answers to a problem are equal, so more of them add no information
    metric = PassAtK(k=1)
    metric.update(correct)
    clustered = np.std(correct.double().mean(1).numpy(), ddof=1) / 30**0.5
    naive = np.std(correct.double().numpy(), ddof=1) / 240**0.5
    assert metric.standard_error().item() == pytest.approx(clustered, rel=1e-6)
    assert clustered > 1.5 * naive


def test_weighted_error_is_near_the_jackknife() -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 500, 60).astype(float)
    values = generator.normal(0.3, 0.1, 60)
    metric = ProblemMean()
    metric.update(torch.tensor(values), torch.tensor(weights))
    assert metric.compute().item() == pytest.approx(np.average(values, weights=weights), rel=1e-6)
    left_out = [np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(60)]
    jackknife = (59 / 60 * np.sum((left_out - np.mean(left_out)) ** 2)) ** 0.5
    assert metric.standard_error().item() == pytest.approx(jackknife, rel=0.03)


def test_long_answers_do_not_drown_their_variance() -> None:
    lengths = 16000 + torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    metric = ProblemMean()
    metric.update(lengths)
    assert metric.standard_error().item() == pytest.approx(lengths.std().item() / 500**0.5, rel=1e-4)


def test_one_problem_has_no_error() -> None:
    metric = ProblemMean()
    metric.update(torch.tensor([0.5]))
    assert metric.standard_error().isnan()
    metric.update(torch.tensor([0.5]))
    assert metric.standard_error().item() == pytest.approx(0, abs=1e-7)


def test_moments_add_up() -> None:
    values = torch.rand(9, generator=torch.Generator().manual_seed(2))
    parts = moments(values[:2], torch.ones(2)) + moments(values[2:], torch.ones(7))
    whole = standard_error(moments(values, torch.ones(9)), torch.tensor(9))
    assert standard_error(parts, torch.tensor(9)).item() == pytest.approx(whole.item(), rel=1e-12)


def test_error_of_a_mean_over_benchmarks() -> None:
    draws = np.random.default_rng(3).normal(0, [0.02, 0.09, 0.05], size=(200_000, 3)).mean(1)
    assert standard_error_of_mean(torch.tensor([0.02, 0.09, 0.05])).item() == pytest.approx(draws.std(), rel=0.01)
