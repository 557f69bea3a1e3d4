"""Scoring against plain log-softmax in float64."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import opdlab.scoring.gradients
import opdlab.scoring.head
from opdlab.scoring import (
    Head,
    support_logits,
    support_statistics,
    token_logprobs,
    token_statistics,
    topk_with_statistics,
)

N, H, V, K = 13, 7, 61, 4

HEADS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"softcap": 3.0},
    {"scale": 0.0625},
    {"scale": 2.5, "softcap": 5.0},
    {"scale": 2.5, "softcap": 5.0, "temperature": 0.7},
]


@pytest.fixture(params=[(1, 1), (5, 40), (13, 14 * 13), (4096, 1 << 24)], ids=["logits", "5 x 8", "13 x 14", "whole"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one logit each; of some rows and columns with rests; of all rows and some columns; of everything."""
    rows, logits = request.param
    monkeypatch.setattr(opdlab.scoring.head, "_MAX_TILE_ROWS", rows)
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", logits)
    monkeypatch.setattr(opdlab.scoring.gradients, "MAX_PIECE", logits)


def inputs(bias: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    return hidden, weight, offset if bias else None


def draw(*shape: int, high: int = V) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


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
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 2 * V)
    hidden, weight, bias = inputs(bias=True)
    assert bias is not None
    index = draw(N, 3) if function is support_logits else draw(N)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = function(hidden, weight, index, bias=bias, temperature=0.8, softcap=4.0, scale=1.5)
        return result

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


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


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        self.numel = max(self.numel, *made, 0)
        return result


@pytest.fixture
def _wide_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 8 * 4096)
    monkeypatch.setattr(opdlab.scoring.gradients, "MAX_PIECE", 8 * 4096)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _forward_and_backward(kind: str) -> int:
    """The largest tensor made while 512 positions are scored over 4096 tokens."""
    hidden, weight = torch.randn(512, 6, requires_grad=True), torch.randn(4096, 6, requires_grad=True)
    targets, support = torch.randint(0, 4096, (512,)), torch.randint(0, 4096, (512, 32))
    with _LargestTensor() as largest:
        if kind == "plain":
            (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
        elif kind == "logprobs":
            token_logprobs(hidden, weight, targets).sum().backward()
        elif kind == "support":
            support_logits(hidden, weight, support).sum().backward()
        elif kind == "support and statistics":
            support_statistics(hidden, Head(weight), targets, support)[0].sum().backward()
        elif kind == "frozen head":
            token_logprobs(hidden, weight.detach(), targets).sum().backward()
        else:
            topk_with_statistics(hidden, Head(weight), targets, 32)
    return int(largest.numel)


@pytest.mark.usefixtures("_wide_vocabulary")
@pytest.mark.parametrize("kind", ["logprobs", "frozen head", "support", "support and statistics", "topk"])
def test_never_holds_all_logits(kind: str) -> None:
    # The largest that may be: a tile. The weight and its gradient hold 6 * 4096.
    assert _forward_and_backward(kind) <= 8 * 4096


@pytest.mark.usefixtures("_wide_vocabulary")
def test_memory_probe_sees_all_logits() -> None:
    assert _forward_and_backward("plain") == 512 * 4096


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
    head, targets = Head(weight, bias, scale=1.5, softcap=6.0, temperature=0.9), draw(N)
    top, statistics = topk_with_statistics(hidden, head, targets, K, vocab_size)
    logits = plain_logits(hidden, weight, bias, scale=1.5, softcap=6.0, temperature=0.9)
    logprobs = logits.log_softmax(-1)
    wanted = logprobs[:, :vocab_size].topk(K)
    assert torch.equal(top.ids, wanted.indices)
    # A narrowed support does not change the distribution: the normalizer is over all rows of the head.
    torch.testing.assert_close(top.logits - statistics.log_normalizer[:, None], wanted.values)
    torch.testing.assert_close(top.logits, logits.gather(1, wanted.indices))
    torch.testing.assert_close(statistics.logprobs, logprobs[torch.arange(N), targets])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert not top.logits.requires_grad


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


def test_no_positions() -> None:
    hidden, weight, _ = inputs(bias=False)
    none = hidden[:0]
    loss = token_logprobs(none, weight, draw(0)).sum() + support_logits(none, weight, draw(0, K)).sum()
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert all(not gradient.any() for gradient in gradients)


def test_weight_of_another_dtype() -> None:
    hidden, weight, _ = inputs(bias=False)
    ours = support_logits(hidden.float(), weight, draw(N, 20))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), (hidden @ weight.T).gather(1, draw(N, 20)), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[0, 1000], ids=["rows gathered", "whole head"])
def _backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opdlab.scoring.gradients, "_DENSE", request.param)


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
            products += func is torch.ops.aten.mm.default
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


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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
