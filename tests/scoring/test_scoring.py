"""Scoring against plain log-softmax in float64."""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opdlab.scoring.head
from opdlab.scoring import (
    Head,
    support_logits,
    support_statistics,
    token_logprobs,
    token_statistics,
    topk_with_statistics,
)
from tests.scoring.plain import HEADS, K, N, V, draw, inputs, leaves, plain_logits


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_token_logprobs_and_gradients(head: dict[str, Any], bias: bool) -> None:
    hidden, weight, offset = inputs(bias)
    targets, cotangent = draw(N), torch.linspace(-2, 3, N, dtype=torch.float64)
    ours = token_logprobs(hidden, weight, targets, bias=offset, **head)
    plain = plain_logits(hidden, weight, offset, **head).log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    variables = leaves(hidden, weight, offset)
    torch.testing.assert_close(
        torch.autograd.grad(ours, variables, cotangent),
        torch.autograd.grad(plain, variables, cotangent),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("k", [K, 2 * V])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_support_logits_and_gradients(head: dict[str, Any], bias: bool, k: int) -> None:
    hidden, weight, offset = inputs(bias)
    support = draw(N, k)  # with repetitions, within rows and between them: gradients must add up
    cotangent = torch.linspace(-2, 3, N * k, dtype=torch.float64).view(N, k)
    ours = support_logits(hidden, weight, support, bias=offset, **head)
    plain = plain_logits(hidden, weight, offset, **head).gather(1, support)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    variables = leaves(hidden, weight, offset)
    torch.testing.assert_close(
        torch.autograd.grad(ours, variables, cotangent),
        torch.autograd.grad(plain, variables, cotangent),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("function", [token_logprobs, support_logits])
def test_gradcheck(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 2 * V)  # several tiles also in a test
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    index = draw(N, 3) if function is support_logits else draw(N)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = function(hidden, weight, index, bias=bias, temperature=0.8, softcap=4.0, scale=1.5)
        return result

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_frozen_tensors_get_no_gradient() -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    (token_logprobs(hidden, weight, draw(N), bias=bias).sum()).backward()
    support_logits(hidden, weight, draw(N, K), bias=bias).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert bias.grad is None
    weight.requires_grad_()
    detached = hidden.detach()
    token_logprobs(detached, weight, draw(N)).sum().backward()
    support_logits(detached, weight, draw(N, K)).sum().backward()
    assert weight.grad is not None
    assert detached.grad is None


def test_second_derivatives_are_refused() -> None:
    hidden, weight, _ = inputs(bias=False)
    (gradient,) = torch.autograd.grad(token_logprobs(hidden, weight, draw(N)).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_topk_with_statistics(vocab_size: int | None) -> None:
    hidden, weight, bias = inputs(bias=True)
    head = Head(weight, bias, scale=1.5, softcap=6.0, temperature=0.9, vocab_size=vocab_size)
    targets = draw(N, high=vocab_size or V)
    top, statistics = topk_with_statistics(hidden, head, targets, K)
    logits = plain_logits(hidden, weight, bias, scale=1.5, softcap=6.0, temperature=0.9)[:, :vocab_size]
    logprobs = logits.log_softmax(-1)
    wanted = logprobs.topk(K)
    assert torch.equal(top.ids, wanted.indices)
    torch.testing.assert_close(top.logits - statistics.log_normalizer[:, None], wanted.values)
    torch.testing.assert_close(top.logits, logits.gather(1, wanted.indices))
    torch.testing.assert_close(statistics.logprobs, logprobs[torch.arange(N), targets])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert not top.logits.requires_grad


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("accumulate", [False, True])
def test_rows_beyond_the_vocabulary_have_no_part(accumulate: bool) -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    targets, support = draw(N, high=40), draw(N, K, high=40)

    def loss(head: Head) -> Tensor:
        logits, statistics = support_statistics(hidden, head, targets, support)
        return (logits * statistics.log_normalizer[:, None]).sum() + token_statistics(hidden, head, targets)[0].sum()

    ours = loss(Head(weight, bias, temperature=0.7, vocab_size=40, accumulate_grad=accumulate))
    plain = loss(Head(weight[:40], bias[:40], temperature=0.7))
    torch.testing.assert_close(ours, plain)
    wanted = torch.autograd.grad(plain, [hidden, weight, bias])
    ours.backward()
    torch.testing.assert_close([hidden.grad, weight.grad, bias.grad], list(wanted))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("wrong", [45, -1, -100])
def test_an_id_beyond_the_vocabulary_is_impossible(wrong: int) -> None:
    hidden, weight, _ = inputs(bias=False)
    targets = torch.full((N,), wrong)
    statistics = token_statistics(hidden, Head(weight, vocab_size=40), targets)
    assert (statistics.logprobs == -torch.inf).all()
    assert statistics.entropy.isfinite().all()


@pytest.mark.usefixtures("_tiles")
def test_statistics_match_categorical() -> None:
    hidden, weight, bias = inputs(bias=True)
    targets = draw(N)
    statistics = token_statistics(hidden, Head(weight, bias, temperature=0.7), targets)
    categorical = torch.distributions.Categorical(logits=plain_logits(hidden, weight, bias, temperature=0.7))
    torch.testing.assert_close(statistics.entropy, categorical.entropy())
    torch.testing.assert_close(statistics.logprobs, categorical.log_prob(targets))
    assert statistics.logprobs.requires_grad
    assert not statistics.entropy.requires_grad
    assert not statistics.log_normalizer.requires_grad


def test_no_positions() -> None:
    hidden, weight, _ = inputs(bias=False)
    none = hidden[:0]
    loss = token_logprobs(none, weight, draw(0)).sum() + support_logits(none, weight, draw(0, K)).sum()
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_support_with_statistics(head: dict[str, Any], bias: bool) -> None:
    hidden, weight, offset = inputs(bias)
    targets, support = draw(N), draw(N, K)  # with repetitions: gradients must add up
    logits, statistics = support_statistics(hidden, Head(weight, offset, **head), targets, support)
    whole = plain_logits(hidden, weight, offset, **head)
    torch.testing.assert_close(logits, whole.gather(1, support), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(statistics.logprobs, whole.log_softmax(-1)[torch.arange(N), targets])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=whole).entropy())
    torch.testing.assert_close(statistics.log_normalizer, whole.logsumexp(-1))
    torch.testing.assert_close(statistics.max_logit, whole.amax(-1))
    assert not any(tensor.requires_grad for tensor in statistics)
    cotangent = torch.linspace(-2, 3, N * K, dtype=torch.float64).view(N, K)
    variables = leaves(hidden, weight, offset)
    torch.testing.assert_close(
        torch.autograd.grad(logits, variables, cotangent),
        torch.autograd.grad(whole.gather(1, support), variables, cotangent),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_hidden_gradient_of_a_frozen_head(head: dict[str, Any]) -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    targets, cotangent = draw(N), torch.linspace(-2, 3, N, dtype=torch.float64)
    ours = token_logprobs(hidden, weight.detach(), targets, bias=bias.detach(), **head)
    plain = plain_logits(hidden, weight, bias, **head).log_softmax(-1)[torch.arange(N), targets]
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(ours, hidden, cotangent),
        torch.autograd.grad(plain, hidden, cotangent),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_frozen_heads_logits_are_made_once() -> None:
    hidden, weight, _ = inputs(bias=False)
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    with Count():
        token_logprobs(hidden, weight.detach(), draw(N)).sum().backward()
    assert products == 2  # the logits, and their probabilities times the head


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("kind", ["logprobs", "support"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_accumulated_in_place(kind: str, dtype: torch.dtype) -> None:
    hidden, weight, _ = inputs(bias=False, dtype=dtype)
    targets, support = draw(N), draw(N, K)

    def loss(head: Head) -> Tensor:
        if kind == "logprobs":
            return token_statistics(hidden, head, targets).logprobs.sum()
        return support_statistics(hidden, head, targets, support)[0].sum()

    expected = torch.autograd.grad(loss(Head(weight)), [hidden, weight])
    weight.grad = torch.full_like(weight, 3.0)
    buffer = weight.grad
    for _ in range(2):
        loss(Head(weight, accumulate_grad=True)).backward()
    assert weight.grad is buffer
    rtol, atol = (0.02, 0.05) if dtype == torch.bfloat16 else (1e-9, 1e-9)
    torch.testing.assert_close(weight.grad, 3 + 2 * expected[1], rtol=rtol, atol=atol)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, 2 * expected[0])
    weight.grad = None
    loss(Head(weight, accumulate_grad=True)).backward()
    torch.testing.assert_close(weight.grad, expected[1], rtol=rtol, atol=atol)


@pytest.mark.usefixtures("_process_group")
def test_sharded_head() -> None:
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    shards = [distribute_tensor(tensor.detach(), mesh, [Shard(0)]).requires_grad_() for tensor in (weight, bias)]
    targets, support = draw(N), draw(N, K)

    def loss(head: Head) -> Tensor:
        logits, statistics = support_statistics(hidden, head, targets, support)
        return logits.sum() + token_statistics(hidden, head, targets).logprobs.sum() + statistics.entropy.sum()

    sharded = loss(Head(shards[0], shards[1], accumulate_grad=True))
    torch.testing.assert_close(sharded, loss(Head(weight, bias)))
    gradients = torch.autograd.grad(sharded, [hidden, *shards])
    expected = torch.autograd.grad(loss(Head(weight, bias)), [hidden, weight, bias])
    torch.testing.assert_close(gradients[0], expected[0])
    for gradient, wanted in zip(gradients[1:], expected[1:], strict=True):
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), wanted)
