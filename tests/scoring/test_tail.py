"""The log-sum of the logits outside a support, against plain softmax in float64."""

# mypy: disable-error-code="no-untyped-call"

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opdlab.scoring import (
    Head,
    LowRank,
    SupportTail,
    support_tail,
    token_statistics,
    topk_with_statistics,
    topk_with_tail,
)
from tests.scoring.plain import HEADS, H, K, N, V, draw, inputs, leaves, plain_logits


def outside(logits: Tensor, support: Tensor) -> Tensor:
    """The log-sum-exp of the logits outside the support, [N, V] and [N, K] -> [N]."""
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, support, True)
    return logits.masked_fill(inside, -torch.inf).logsumexp(1)


def differentiable(tail: SupportTail) -> list[Tensor]:
    return [tail.logits, tail.log_tail, tail.statistics.logprobs, tail.statistics.log_normalizer]


def compare(tail: SupportTail, logits: Tensor, support: Tensor, targets: Tensor, variables: list[Tensor]) -> None:
    """Values, and gradients from a cotangent that is different everywhere, of each output and of all together."""
    log_p = logits.log_softmax(1)
    wanted = [
        logits.gather(1, support),
        outside(logits, support),
        log_p[torch.arange(N), targets],
        logits.logsumexp(1),
    ]
    ours = differentiable(tail)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tail.statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(tail.statistics.max_logit, logits.amax(1))
    if not variables:
        return
    cotangents = [torch.linspace(-2, 3, each.numel(), dtype=torch.float64).view(each.shape) for each in ours]
    for some in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(0, 4)):
        gradients = [
            torch.autograd.grad(values[some], variables, cotangents[some], retain_graph=True)
            for values in (ours, wanted)
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


CASES = list(zip(HEADS, cycle([False, True])))  # half of them with a bias


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_support_tail_and_gradients(head: dict[str, Any], bias: bool) -> None:
    hidden, weight, offset = inputs(bias)
    targets, support = draw(N), draw(N, 20)  # with repetitions within rows: an id is in the support once
    tail = support_tail(hidden, Head(weight, offset, **head), targets, support)
    assert bool((~tail.valid).any())
    assert bool((support == targets[:, None]).any())
    assert not bool((support == targets[:, None]).any(1).all())
    compare(tail, plain_logits(hidden, weight, offset, **head), support, targets, leaves(hidden, weight, offset))


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize(("head", "bias"), CASES, ids=str)
def test_hidden_gradient_of_a_frozen_head(head: dict[str, Any], bias: bool) -> None:
    hidden, weight, offset = inputs(bias)
    targets, support = draw(N), draw(N, 20)
    tail = support_tail(hidden, Head(weight, offset, **head).detached(), targets, support)
    compare(tail, plain_logits(hidden, weight, offset, **head), support, targets, [hidden])


def test_a_frozen_heads_logits_are_made_once() -> None:
    hidden, weight, _ = inputs(bias=False)
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    with Count():
        support_tail(hidden, Head(weight.detach()), draw(N), draw(N, 1)).log_tail.sum().backward()
    assert products == 2  # the logits, and their probabilities times the head


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("trained", ["all", "adapter", "weight", "bias", "down", "up", "nothing"])
@pytest.mark.parametrize("head", [HEADS[0], HEADS[-1]], ids=str)
def test_low_rank_update(head: dict[str, Any], trained: str) -> None:
    hidden, weight, bias = inputs(bias=True)
    generator = torch.Generator().manual_seed(7)
    down, up = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, H), (V, 3)))
    own = {"weight": weight, "bias": bias, "down": down, "up": up}
    chosen = {"all": tuple(own), "adapter": ("down", "up"), "nothing": ()}.get(trained, (trained,))
    for name, tensor in own.items():
        assert tensor is not None
        tensor.requires_grad_(name in chosen)
    targets, support = draw(N), draw(N, 20)
    tail = support_tail(hidden, Head(weight, bias, low_rank=LowRank(down, up, 1.7), **head), targets, support)
    logits = plain_logits(hidden, weight + 1.7 * up @ down, bias, **head)
    variables = [tensor for tensor in leaves(hidden, weight, bias, down, up) if tensor.requires_grad]
    compare(tail, logits, support, targets, variables)


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_beyond_the_vocabulary_have_no_part(frozen: bool) -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    targets, support = draw(N, high=40), draw(N, 20, high=40)
    head = Head(weight, bias, temperature=0.7, vocab_size=40)
    tail = support_tail(hidden, head.detached() if frozen else head, targets, support)
    logits = plain_logits(hidden, weight[:40], bias[:40], temperature=0.7)
    compare(tail, logits, support, targets, [hidden] if frozen else [hidden, weight, bias])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_support_of_everything_has_no_tail(frozen: bool) -> None:
    hidden, weight, bias = inputs(bias=True)
    head = Head(weight, bias)
    support = torch.arange(V).expand(N, V)
    tail = support_tail(hidden, head.detached() if frozen else head, draw(N), support)
    assert (tail.log_tail == -torch.inf).all()
    variables = [hidden] if frozen else leaves(hidden, weight, bias)
    logits = plain_logits(hidden, weight, bias)
    for ours, wanted in ((tail.statistics.log_normalizer, logits.logsumexp(1)), (tail.logits[:, 3], logits[:, 3])):
        gradients = [torch.autograd.grad(each.sum(), variables, retain_graph=True) for each in (ours, wanted)]
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_accumulated_in_place(dtype: torch.dtype) -> None:
    hidden, weight, _ = inputs(bias=False, dtype=dtype)
    targets, support = draw(N), draw(N, K)

    def loss(head: Head) -> Tensor:
        return torch.stack([each.sum() for each in differentiable(support_tail(hidden, head, targets, support))]).sum()

    expected = torch.autograd.grad(loss(Head(weight)), [hidden, weight])
    weight.grad = torch.full_like(weight, 3.0)
    loss(Head(weight, accumulate_grad=True)).backward()
    rtol, atol = (0.02, 0.05) if dtype == torch.bfloat16 else (1e-9, 1e-9)
    torch.testing.assert_close(weight.grad, 3 + expected[1], rtol=rtol, atol=atol)
    torch.testing.assert_close(hidden.grad, expected[0])


def test_gradcheck() -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    targets, support = draw(N), draw(N, K)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(differentiable(support_tail(hidden, Head(weight, bias, 1.5, 4.0, 0.8), targets, support)))

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("gap", [10.0, 30.0, 200.0])
def test_a_tiny_tail_keeps_its_digits(gap: float) -> None:
    """In float32 ``log(1 - P)`` is -inf from a gap of 17 nats on, and ``exp(z - max)`` is 0 from one of 104 nats on."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [-gap], [-gap - 1], [-gap - 2]], requires_grad=True)
    tail = support_tail(hidden, Head(weight), torch.tensor([2]), torch.tensor([[0]]))
    wanted = weight.detach().double()[1:, 0].logsumexp(0)
    assert tail.log_tail.item() == pytest.approx(float(wanted), rel=1e-6)
    (gradient,) = torch.autograd.grad(tail.log_tail.sum(), weight)
    torch.testing.assert_close(gradient[1:, 0], weight.detach()[1:, 0].softmax(0))
    assert topk_with_tail(hidden, Head(weight), torch.tensor([2]), 1).log_tail.item() == tail.log_tail.item()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("vocab_size", [None, 40])
@pytest.mark.parametrize("k", [0, 1, K, 38])
@pytest.mark.parametrize("num_given", [0, 1, K, 37])
def test_topk_with_tail(num_given: int, k: int, vocab_size: int | None) -> None:
    if not k + num_given:
        return
    hidden, weight, bias = inputs(bias=True)
    options: dict[str, Any] = {"scale": 1.5, "softcap": 6.0, "temperature": 0.9}
    head, targets = Head(weight, bias, **options, vocab_size=vocab_size), draw(N, high=vocab_size or V)
    logits = plain_logits(hidden, weight, bias, **options)[:, :vocab_size]
    given = (logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).topk(num_given).indices
    found = topk_with_tail(hidden, head, targets, k, given)
    ids = torch.cat([logits.topk(k).indices, given], dim=1)
    assert torch.equal(found.ids, ids)
    seen = (ids[:, :, None] == ids[:, None]).tril(-1).any(2)
    assert torch.equal(found.valid, ~seen)
    assert not found.log_tail.requires_grad
    compare(found, logits, ids, targets, [])
    if k and not num_given:
        assert torch.equal(found.logits, topk_with_statistics(hidden, head, targets, k)[0].logits)


@pytest.mark.usefixtures("_tiles")
def test_a_union_of_everything_has_no_tail() -> None:
    hidden, weight, bias = inputs(bias=True)
    given = torch.arange(V).expand(N, V)
    found = topk_with_tail(hidden, Head(weight, bias), draw(N), V, given)
    assert (found.log_tail == -torch.inf).all()
    assert torch.equal(found.valid, torch.arange(2 * V).expand(N, -1) < V)
    torch.testing.assert_close(found.statistics.log_normalizer, plain_logits(hidden, weight, bias).logsumexp(1))


def test_no_positions() -> None:
    hidden, weight, _ = inputs(bias=False)
    tail = support_tail(hidden[:0], Head(weight), draw(0), draw(0, K))
    gradients = torch.autograd.grad(
        torch.cat([each.flatten() for each in differentiable(tail)]).sum(), [hidden, weight]
    )
    assert all(not gradient.any() for gradient in gradients)
    assert topk_with_tail(hidden[:0], Head(weight), draw(0), 3, draw(0, K)).ids.shape == (0, 3 + K)


def test_the_log_probabilities_are_those_of_the_plain_pass() -> None:
    hidden, weight, bias = inputs(bias=True, dtype=torch.float32)
    targets = draw(N)
    ours = support_tail(hidden, Head(weight, bias), targets, draw(N, K)).statistics.logprobs
    torch.testing.assert_close(ours, token_statistics(hidden, Head(weight, bias), targets).logprobs, rtol=0, atol=2e-6)
