"""Random numbers of streams, and the tokens that they select."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from opdlab.policies.draws import BLOCK, draw, uniforms

LARGE = 151_936  # the vocabulary of Qwen3: not a multiple of a block


def softmax(size: int, spread: float, seed: int = 0) -> Tensor:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.softmax(-1)


def test_numbers_are_those_of_splitmix64() -> None:
    # The reference implementation's first outputs for the seed 1234567.
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
    numbers = uniforms(torch.tensor(1234567), torch.arange(5))
    assert numbers.tolist() == [(value >> 11) * 2**-53 for value in known]
    assert torch.equal(uniforms(torch.tensor([5, 1234567])[:, None], torch.arange(5))[1], numbers)


@pytest.mark.parametrize("streams", [torch.arange(400), torch.arange(400) * 2**40, 2**63 - 1 - torch.arange(400)])
def test_numbers_of_streams_and_positions_are_independent(streams: Tensor) -> None:
    # Neighbouring seeds are the worst case: real streams are hashes.
    numbers = uniforms(streams[:, None], torch.arange(500))  # [streams, positions]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    neighbours = {
        "next position": (numbers[:, :-1], numbers[:, 1:]),
        "next stream": (numbers[:-1], numbers[1:]),
        "next stream, earlier position": (numbers[:-1, 1:], numbers[1:, :-1]),
        "far position": (numbers[:, :-256], numbers[:, 256:]),
    }
    for one, other in neighbours.values():
        cells = (one * 16).long() * 16 + (other * 16).long()
        assert stats.chisquare(cells.flatten().bincount(minlength=256).numpy()).pvalue > 1e-3
    # No stream is a shifted copy of another.
    assert len(set(numbers.flatten().tolist())) == numbers.numel()


@pytest.mark.parametrize("size", [7, 2 * BLOCK, 2 * BLOCK + 1, 5000])
def test_equally_spaced_numbers_give_each_token_its_share(size: int) -> None:
    probabilities, count = softmax(size, 2.0), 20_000
    numbers = (torch.arange(count).double() + 0.5) / count
    drawn = torch.cat([draw(probabilities.expand(len(part), -1), part) for part in numbers.view(-1, 500)])
    counts = drawn.bincount(minlength=size).double()
    expected = count * probabilities.double() / probabilities.double().sum()
    # The ends of a token's interval lie between two numbers each.
    assert float((counts - expected).abs().max()) <= 1 + 1e-6 * count
    assert bool((drawn.diff() >= 0).all())


def test_unlikely_tokens_of_a_large_vocabulary_have_their_probability() -> None:
    probabilities = softmax(LARGE, 4.0)  # float32: from 1e-12 to 0.1
    exact = probabilities.double() / probabilities.double().sum()
    order = exact.argsort()
    ends = torch.tensor([0, BLOCK - 1, BLOCK, LARGE - LARGE % BLOCK, LARGE - 1])  # of blocks
    tokens = torch.cat([order[:: LARGE // 40], order[:5], order[-5:], ends])
    rows = probabilities.expand(len(tokens), -1)

    def smallest(first: Tensor) -> Tensor:
        """Return the smallest number that selects one of the tokens from ``first`` on, by bisection."""
        low, high = torch.zeros(len(first)).double(), torch.ones(len(first)).double()
        for _ in range(53):
            middle = (low + high) / 2
            beyond = draw(rows, middle) >= first
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return high

    widths = smallest(tokens + 1) - smallest(tokens)
    assert exact[tokens].min() < 1e-10
    # Numbers are multiples of 2^-53; the sum of a block is rounded to single precision.
    torch.testing.assert_close(widths, exact[tokens], rtol=1e-6, atol=2**-52)


@pytest.mark.parametrize("size", [38, LARGE])
def test_tokens_follow_the_probabilities(size: int) -> None:
    probabilities = softmax(size, 2.0)
    probabilities[::3] = 0
    streams = torch.arange(20_000)
    parts = [
        draw(probabilities.expand(len(part), -1), uniforms(part, torch.tensor(7))) for part in streams.view(-1, 200)
    ]
    drawn = torch.cat(parts)
    assert not (drawn % 3 == 0).any()
    likely = (-probabilities).argsort()[:30]
    counts = drawn.bincount(minlength=size)[likely]
    shares = (probabilities / probabilities.sum())[likely].double()
    observed = torch.cat([counts, 20_000 - counts.sum(keepdim=True, dim=0)]).numpy()
    expected = 20_000 * torch.cat([shares, 1 - shares.sum(keepdim=True, dim=0)])
    kept = (expected > 0).numpy()
    expected = expected / expected.sum() * 20_000
    assert stats.chisquare(observed[kept], expected.numpy()[kept]).pvalue > 1e-3


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.3, 1e-3, 1e-30])
def test_tokens_of_probability_zero_are_never_drawn(number: float, scale: float) -> None:
    numbers = torch.tensor([number], dtype=torch.float64)
    small = scale * torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert draw(small, numbers).item() == (1 if number < 0.5 else 2)
    large = torch.zeros(1, 5000)
    large[0, [700, 4000]] = 0.5 * scale
    assert draw(large, numbers).item() == (700 if number < 0.5 else 4000)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [2, 5000])
def test_rows_without_a_distribution_are_marked(bad: float, size: int) -> None:
    rows = torch.zeros(3, size)
    rows[0, :2], rows[1, 1], rows[2, -2:] = torch.tensor([0.5, bad]), 1.0, torch.tensor([bad, 0.5])
    assert draw(rows, torch.full((3,), 0.5).double()).tolist() == [-1, 1, -1]
