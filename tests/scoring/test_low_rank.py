"""A head with a low-rank update, against one whose weight is ``weight + scaling * up @ down``, in float64."""

# mypy: disable-error-code="no-untyped-call"

from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opdlab.scoring.head
from opdlab.scoring import (
    Head,
    LowRank,
    support_statistics,
    token_statistics,
    topk_with_statistics,
)
from tests.scoring.plain import HEADS, H, K, N, V, draw, inputs, leaves, plain_logits

R, SCALING = 3, 1.7


@dataclass
class Adapted:
    """Hidden states, and a head with a low-rank update; all of them leaves, and those of ``trained`` take gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor

    @classmethod
    def make(cls, bias: bool = False, dtype: torch.dtype = torch.float64, trained: str = "adapter") -> "Adapted":
        hidden, weight, offset = inputs(bias, dtype)
        generator = torch.Generator().manual_seed(7)
        down, up = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((R, H), (V, R)))
        own = {"weight": weight, "bias": offset, "down": down, "up": up}
        chosen = {"all": own.keys(), "adapter": ("down", "up"), "nothing": ()}.get(trained, (trained,))
        for name, tensor in own.items():
            if tensor is not None:
                tensor.requires_grad_(name in chosen)
        return cls(hidden, weight, offset, down, up)

    def head(self, **options: Any) -> Head:
        return Head(self.weight, self.bias, low_rank=LowRank(self.down, self.up, SCALING), **options)

    def variables(self) -> list[Tensor]:
        everything = leaves(self.hidden, self.weight, self.bias, self.down, self.up)
        return [tensor for tensor in everything if tensor.requires_grad]

    def plain(self, **options: Any) -> Tensor:
        return plain_logits(self.hidden, self.weight + SCALING * self.up @ self.down, self.bias, **options)

    def double(self) -> "Adapted":
        wide = (None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in vars(self).values())
        return Adapted(*wide)  # type: ignore[arg-type]


def compare(ours: Tensor, plain: Tensor, variables: list[Tensor]) -> None:
    """Values, and gradients from a cotangent that is different everywhere."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.linspace(-2, 3, plain.numel(), dtype=torch.float64).view(plain.shape)
    gradients = torch.autograd.grad(ours, variables, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, variables, cotangent), rtol=1e-9, atol=1e-9)


CASES = list(zip(HEADS, cycle([False, True])))  # half of them with a bias


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("trained", ["adapter", "nothing"])
@pytest.mark.parametrize(("options", "bias"), CASES, ids=str)
def test_token_statistics(options: dict[str, Any], bias: bool, trained: str) -> None:
    model, targets = Adapted.make(bias, trained=trained), draw(N)
    statistics = token_statistics(model.hidden, model.head(**options), targets)
    logits = model.plain(**options)
    compare(statistics.logprobs, logits.log_softmax(-1)[torch.arange(N), targets], model.variables())
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(statistics.log_normalizer, logits.logsumexp(-1))
    torch.testing.assert_close(statistics.max_logit, logits.amax(-1))


@pytest.mark.usefixtures("_tiles", "_backward")
@pytest.mark.parametrize("trained", ["adapter", "nothing"])
@pytest.mark.parametrize(("options", "bias"), CASES, ids=str)
def test_support_statistics(options: dict[str, Any], bias: bool, trained: str) -> None:
    model, targets, support = Adapted.make(bias, trained=trained), draw(N), draw(N, K)  # with repetitions
    ours, statistics = support_statistics(model.hidden, model.head(**options), targets, support)
    logits = model.plain(**options)
    compare(ours, logits.gather(1, support), model.variables())
    torch.testing.assert_close(statistics.logprobs, logits.log_softmax(-1)[torch.arange(N), targets])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.usefixtures("_backward")
@pytest.mark.parametrize("trained", ["all", "weight", "bias", "down", "up"])
def test_what_takes_no_gradient_gets_none(trained: str) -> None:
    model, targets, support = Adapted.make(bias=True, trained=trained), draw(N), draw(N, K)
    options = HEADS[-1]
    expected = model.plain(**options).log_softmax(-1)[torch.arange(N), targets]
    compare(token_statistics(model.hidden, model.head(**options), targets).logprobs, expected, model.variables())
    ours, _ = support_statistics(model.hidden, model.head(**options), targets, support)
    compare(ours, model.plain(**options).gather(1, support), model.variables())
    # Hidden states without gradients, as in a model with only the head adapted.
    model.hidden.requires_grad_(False)
    expected = model.plain(**options).log_softmax(-1)[torch.arange(N), targets]
    compare(token_statistics(model.hidden, model.head(**options), targets).logprobs, expected, model.variables())
    ours, _ = support_statistics(model.hidden, model.head(**options), targets, support)
    compare(ours, model.plain(**options).gather(1, support), model.variables())


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("vocab_size", [None, 40])
def test_topk(vocab_size: int | None) -> None:
    model, targets = Adapted.make(bias=True), draw(N, high=vocab_size or V)
    options = {"scale": 1.5, "softcap": 6.0, "temperature": 0.9}
    head = model.head(**options, vocab_size=vocab_size)
    top, statistics = topk_with_statistics(model.hidden, head, targets, K)
    logits = model.plain(**options)[:, :vocab_size]
    wanted = logits.topk(K)
    assert torch.equal(top.ids, wanted.indices)
    torch.testing.assert_close(top.logits, wanted.values)
    torch.testing.assert_close(statistics.logprobs, logits.log_softmax(-1)[torch.arange(N), targets])


@pytest.mark.usefixtures("_backward")
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["logprobs", "support"])
def test_half_precision(kind: str, factors: torch.dtype) -> None:
    model = Adapted.make(bias=True, dtype=torch.bfloat16)
    # Adapters of narrow models stay in float32, unless the trainer casts the whole module.
    model.down, model.up = (t.detach().to(factors).requires_grad_() for t in (model.down, model.up))
    wide, targets, support = model.double(), draw(N), draw(N, K)

    def score(head: Head, hidden: Tensor) -> Tensor:
        if kind == "logprobs":
            return token_statistics(hidden, head, targets).logprobs
        return support_statistics(hidden, head, targets, support)[0]

    ours = score(model.head(temperature=0.8), model.hidden)
    plain = wide.plain(temperature=0.8)
    expected = plain.gather(1, support) if kind == "support" else plain.log_softmax(-1)[torch.arange(N), targets]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)  # inputs are exact, and products wide
    gradients = torch.autograd.grad(ours.sum(), model.variables())
    references = torch.autograd.grad(expected.sum(), wide.variables())
    for variable, gradient, wanted in zip(model.variables(), gradients, references, strict=True):
        assert gradient.dtype == variable.dtype
        assert (gradient.double() - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_leaves_the_update_wide() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, down, up = (
        torch.randn(*shape, generator=generator) for shape in ((64, 32), (1000, 32), (4, 32), (1000, 4))
    )
    targets = torch.randint(0, 1000, (64,), generator=generator)
    factors = [down.requires_grad_(), up.requires_grad_()]
    head = Head(weight, low_rank=LowRank(down, up, 0.5))

    def gradients(logprobs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(logprobs.sum(), factors)

    narrow = [t.detach().bfloat16().double() for t in (hidden, weight)]
    exact = (narrow[0] @ (narrow[1] + 0.5 * up.double() @ down.double()).T).log_softmax(-1)
    exact = exact[torch.arange(64), targets]
    with torch.autocast("cpu", torch.bfloat16):
        ours = token_statistics(hidden, head, targets).logprobs
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4)
    for gradient, wanted in zip(gradients(ours), gradients(exact), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 equal contributions, one a tile: bfloat16 sums stop growing at 256 times the increment.
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 1)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    down = torch.ones(1, 1, dtype=torch.bfloat16)
    up = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.zeros(2, 1, dtype=torch.bfloat16), low_rank=LowRank(down, up, 1.0))
    token_statistics(hidden, head, torch.zeros(512, dtype=torch.long)).logprobs.sum().backward()
    assert up.grad is not None
    assert up.grad.flatten().tolist() == [256.0, -256.0]


@pytest.mark.parametrize("kind", ["logprobs", "support"])
def test_a_trained_weight_below_is_accumulated_in_place(kind: str) -> None:
    model, targets, support = Adapted.make(trained="all"), draw(N), draw(N, K)

    def loss(head: Head) -> Tensor:
        if kind == "logprobs":
            return token_statistics(model.hidden, head, targets).logprobs.sum()
        return support_statistics(model.hidden, head, targets, support)[0].sum()

    expected = torch.autograd.grad(loss(model.head()), model.variables())
    model.weight.grad = torch.ones_like(model.weight)
    buffer = model.weight.grad
    loss(model.head(accumulate_grad=True)).backward()
    assert model.weight.grad is buffer
    buffer -= 1
    torch.testing.assert_close([tensor.grad for tensor in model.variables()], list(expected))


def test_detached_head_leaves_its_tensors_alone() -> None:
    model, targets = Adapted.make(bias=True, trained="all"), draw(N)
    head = model.head(temperature=0.7, softcap=4.0)
    assert head.trained
    assert not head.detached().trained
    expected = torch.autograd.grad(token_statistics(model.hidden, head, targets).logprobs.sum(), model.hidden)
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal products
            large = func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and H in args[0].shape + args[1].shape
            products += large and V in args[0].shape + args[1].shape
            return func(*args, **(kwargs or {}))

    with Count():
        ours = token_statistics(model.hidden, head.detached(), targets).logprobs
        gradients = torch.autograd.grad(ours.sum(), model.hidden)
    torch.testing.assert_close(gradients, expected)
    assert products == 2  # only the logits, and their probabilities times the weight, without recomputation


@pytest.mark.usefixtures("_process_group")
def test_sharded_head() -> None:
    model, targets, support = Adapted.make(bias=True, trained="all"), draw(N), draw(N, K)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = replace(model)
    for name in ("weight", "bias", "down", "up"):
        shards = distribute_tensor(getattr(model, name).detach(), mesh, [Shard(0)])
        setattr(sharded, name, shards.requires_grad_())

    def loss(head: Head) -> Tensor:
        logits, _ = support_statistics(model.hidden, head, targets, support)
        return logits.sum() + token_statistics(model.hidden, head, targets).logprobs.sum()

    ours, plain = loss(sharded.head(accumulate_grad=True)), loss(model.head())
    torch.testing.assert_close(ours, plain)
    gradients = torch.autograd.grad(ours, sharded.variables())
    for gradient, wanted in zip(gradients, torch.autograd.grad(plain, model.variables()), strict=True):
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(whole, wanted)
    assert all(isinstance(gradient, DTensor) for gradient in gradients[1:])


def test_no_positions() -> None:
    model = Adapted.make()
    none = model.hidden[:0]
    logits, _ = support_statistics(none, model.head(), draw(0), draw(0, K))
    loss = token_statistics(none, model.head(), draw(0)).logprobs.sum() + logits.sum()
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, model.variables()))
