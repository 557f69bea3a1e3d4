"""Narrow types, autocast, and logits that are large, infinite or certain."""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import pytest
import torch
from torch import Tensor

import opdlab.scoring.head
from opdlab.scoring import Head, support_logits, token_logprobs, token_statistics
from tests.scoring.plain import K, N, draw, inputs, plain_logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(dtype: torch.dtype) -> None:
    hidden, weight, bias = inputs(bias=True, dtype=dtype)
    assert bias is not None
    targets, support = draw(N), draw(N, K)
    logprobs = token_logprobs(hidden, weight, targets, bias=bias, temperature=0.8)
    logits = support_logits(hidden, weight, support, bias=bias, temperature=0.8)
    assert logprobs.dtype == logits.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    plain = plain_logits(wide[0], wide[1], wide[2], temperature=0.8)
    atol = 1e-5  # inputs are exact, and their products are summed in float32
    expected = plain.log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(logits.double(), plain.gather(1, support), rtol=0, atol=atol)
    for output, reference in ((logprobs, expected), (logits, plain.gather(1, support))):
        gradients = torch.autograd.grad(output.sum(), [hidden, weight, bias])
        references = torch.autograd.grad(reference.sum(), wide, retain_graph=True)
        for gradient, wanted in zip(gradients, references, strict=True):
            assert gradient.dtype == dtype
            assert (gradient.double() - wanted).norm() < 0.03 * wanted.norm()


def test_weight_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 equal contributions, one a chunk: bfloat16 sums stop growing at 256 times the increment.
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 1)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(512, dtype=torch.long)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]


@pytest.mark.parametrize("function", [token_logprobs, support_logits])
def test_autocast_gradient_is_that_of_its_own_logits(function: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator) * s for n, s in ((64, 3.0), (1000, 1.0)))
    weight.requires_grad_()
    index = torch.randint(0, 1000, (64, 5) if function is support_logits else (64,), generator=generator)

    def gradient_error(values: Tensor, exact: Tensor) -> float:
        (gradient,) = torch.autograd.grad(values.sum(), weight)
        return float((gradient - exact).norm() / exact.norm())

    (exact,) = torch.autograd.grad(function(hidden, weight, index).sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours = function(hidden, weight, index)
        z = (hidden @ weight.T).float()
        plain = z.gather(1, index) if index.ndim == 2 else z.log_softmax(-1).gather(1, index[:, None])
    assert ours.dtype == torch.float32
    assert gradient_error(ours, exact) < 1.3 * gradient_error(plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minus_infinity_is_probability_zero(dtype: torch.dtype) -> None:
    hidden, weight, bias = inputs(bias=True, dtype=dtype)
    assert bias is not None
    with torch.no_grad():
        bias[5:] = -torch.inf
    targets = draw(N, high=5)
    statistics = token_statistics(hidden, Head(weight, bias), targets)
    narrow = torch.distributions.Categorical(logits=plain_logits(hidden, weight, bias)[:, :5])
    torch.testing.assert_close(statistics.entropy, narrow.entropy())
    torch.testing.assert_close(statistics.logprobs, narrow.log_prob(targets))
    gradients = torch.autograd.grad(statistics.logprobs.sum(), [hidden, weight])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_certain_distribution_has_no_entropy() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1e4], [-1e4]])
    statistics = token_statistics(hidden, Head(weight), torch.tensor([1]))
    assert statistics.entropy.tolist() == [0.0]
    assert statistics.logprobs.tolist() == [0.0]


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    logprobs = token_logprobs(hidden, weight, torch.tensor([1]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [-2e4]
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-1.0, 1.0]]


def test_weight_of_another_dtype() -> None:
    hidden, weight, _ = inputs(bias=False)
    ours = support_logits(hidden.float(), weight, draw(N, 20))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), (hidden @ weight.T).gather(1, draw(N, 20)), rtol=1e-5, atol=1e-5)
