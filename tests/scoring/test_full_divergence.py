"""Divergences over two whole vocabularies against plain autograd in float64."""

# mypy: disable-error-code="no-untyped-call"

import math
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import opdlab.scoring.head
from opdlab.errors import UsageError
from opdlab.scoring import Head, LowRank, divergence_statistics, token_statistics
from tests.scoring.plain import HEADS, H, N, V, draw, inputs, leaves, plain_logits

G = 5  # the teacher's hidden size
SHARES = {"beta": 0.3, "alpha": 0.2}
NAMES = ["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"]


def teacher(size: int = V, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Head]:
    """The teacher's hidden states, and its head: other options than the student's."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, G), (size, G)))
    return hidden, Head(weight, scale=scale, softcap=6.0, temperature=1.2)


def plain_divergence(student: Tensor, other: Tensor, divergence: str, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """The formulas, [N, V] logits each; ids that one side lacks are joined to one outcome."""
    shared = min(student.shape[1], other.shape[1])

    def log_mass(logits: Tensor) -> Tensor:
        found = logits.log_softmax(-1)
        if student.shape == other.shape:
            return found
        alone = found[:, shared:].logsumexp(-1, keepdim=True) if found.shape[1] > shared else found[:, :1] * 0 - 1e4
        return torch.cat([found[:, :shared], alone], dim=1)

    log_a, log_b = log_mass(student), log_mass(other)

    def mixture(share: float) -> Tensor:
        return torch.logaddexp(log_a + math.log(1 - share), log_b + math.log(share))

    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        return (log_x.exp() * (log_x - log_y)).sum(-1)

    if divergence == "reverse_kl":
        return kl(log_a, log_b)
    if divergence == "forward_kl":
        return kl(log_b, log_a)
    if divergence == "jsd":
        return beta * kl(log_b, mixture(beta)) + (1 - beta) * kl(log_a, mixture(beta))
    return kl(log_a, mixture(1 - alpha)) if divergence == "skew_reverse_kl" else kl(log_b, mixture(alpha))


def check(ours: Tensor, plain: Tensor, variables: list[Tensor]) -> None:
    """Values, and gradients from a cotangent that is different everywhere."""
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    cotangent = torch.linspace(-2, 3, len(plain), dtype=torch.float64)
    gradients = torch.autograd.grad(ours, variables, cotangent)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, variables, cotangent), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize(("options", "bias"), list(zip(HEADS[::3], cycle([False, True]))), ids=str)
def test_value_gradient_and_statistics(options: dict[str, Any], bias: bool, divergence: str) -> None:
    hidden, weight, offset = inputs(bias)
    targets, (states, of_teacher) = draw(N), teacher(scale=1.4)
    head = Head(weight, offset, **options)
    ours, statistics = divergence_statistics(hidden, head, states, of_teacher, targets, divergence=divergence, **SHARES)
    logits = plain_logits(hidden, weight, offset, **options)
    other = plain_logits(states, of_teacher.weight, None, scale=1.4, softcap=6.0, temperature=1.2)
    check(ours, plain_divergence(logits, other, divergence, **SHARES), leaves(hidden, weight, offset))
    for mine, own in zip(statistics, token_statistics(hidden, head, targets), strict=True):
        torch.testing.assert_close(mine, own.detach(), rtol=1e-10, atol=1e-10)
        assert not mine.requires_grad


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("sizes", [(V, 50), (50, V)], ids=str)
@pytest.mark.parametrize("divergence", NAMES)
def test_ids_that_one_side_lacks_are_one_more_outcome(divergence: str, sizes: tuple[int, int]) -> None:
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()
    # Rows beyond the vocabulary only pad the weight.
    head, other = Head(weight, temperature=0.9, vocab_size=sizes[0]), replace(of_teacher, vocab_size=sizes[1])
    lacking = "teacher" if sizes[0] > sizes[1] else "student"
    if divergence == {"teacher": "reverse_kl", "student": "forward_kl"}[lacking]:
        with pytest.raises(UsageError, match=f"infinite if the {lacking} lacks ids.* student has {sizes[0]}"):
            divergence_statistics(hidden, head, states, other, draw(N), divergence=divergence)
        return
    targets = draw(N, high=sizes[0])
    ours, statistics = divergence_statistics(hidden, head, states, other, targets, divergence=divergence, **SHARES)
    logits = plain_logits(hidden, weight, None, temperature=0.9)[:, : sizes[0]]
    theirs = plain_logits(states, of_teacher.weight, None, softcap=6.0, temperature=1.2)[:, : sizes[1]]
    check(ours, plain_divergence(logits, theirs, divergence, **SHARES), [hidden, weight])
    own = token_statistics(hidden, head, targets)
    torch.testing.assert_close(statistics.logprobs, own.logprobs.detach())
    torch.testing.assert_close(statistics.entropy, own.entropy)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "update", "all"])
def test_frozen_and_adapted_heads(trained: str, divergence: str) -> None:
    hidden, weight, offset = inputs(bias=True)
    assert offset is not None
    generator = torch.Generator().manual_seed(7)
    down, up = (torch.randn(*shape, generator=generator).double() for shape in ((3, H), (V, 3)))
    own = {"hidden": [hidden], "weight": [weight, offset], "update": [down, up]}
    variables = [tensor for name, part in own.items() if trained in (name, "all") for tensor in part]
    for tensor in (hidden, weight, offset, down, up):
        tensor.requires_grad_(any(tensor is each for each in variables))
    states, of_teacher = teacher()
    head = Head(weight, offset, softcap=4.0, low_rank=LowRank(down, up, 1.7))
    ours, _ = divergence_statistics(hidden, head, states, of_teacher, draw(N), divergence=divergence)
    logits = plain_logits(hidden, weight + 1.7 * up @ down, offset, softcap=4.0)
    other = plain_logits(states, of_teacher.weight, None, softcap=6.0, temperature=1.2)
    check(ours, plain_divergence(logits, other, divergence), variables)


@pytest.mark.parametrize("divergence", NAMES)
def test_a_teacher_takes_no_gradient(divergence: str) -> None:
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()
    states.requires_grad_()
    of_teacher.weight.requires_grad_()
    divergence_statistics(hidden, Head(weight), states, of_teacher, draw(N), divergence=divergence)[0].sum().backward()
    assert hidden.grad is not None
    assert states.grad is None
    assert of_teacher.weight.grad is None


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_have_no_divergence(divergence: str, dtype: torch.dtype) -> None:
    hidden, weight, offset = inputs(bias=True, dtype=dtype)
    other = Head(weight.detach(), None if offset is None else offset.detach() + 2.5)  # logits of any offset
    ours, _ = divergence_statistics(hidden, Head(weight, offset), hidden, other, draw(N), divergence=divergence)
    gradients = torch.autograd.grad(ours.sum(), leaves(hidden, weight, offset))
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    assert float(ours.detach().abs().max()) < bound
    assert all(float(gradient.abs().max()) < 10 * bound for gradient in gradients)


def test_without_skew_it_is_the_plain_divergence() -> None:
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()
    for name in ("reverse_kl", "forward_kl"):
        plain, skewed = (
            divergence_statistics(
                hidden, Head(weight), states, of_teacher, draw(N), divergence=each, beta=0.5, alpha=0.0
            )[0]
            for each in (name, f"skew_{name}")
        )
        assert torch.equal(plain, skewed)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits(divergence: str, size: float) -> None:
    hidden, weight, _ = inputs(bias=False, dtype=torch.float32)
    hidden = (hidden.detach() * size).requires_grad_()
    states, of_teacher = teacher(dtype=torch.float32)
    states, head = states * size, Head(of_teacher.weight)
    ours, _ = divergence_statistics(hidden, Head(weight), states, head, draw(N), divergence=divergence)
    gradient, _ = torch.autograd.grad(ours.sum(), [hidden, weight])
    wide = hidden.detach().double().requires_grad_()
    logits, other = wide @ weight.detach().double().T, states.double() @ head.weight.double().T
    plain = plain_divergence(logits, other, divergence)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-4 * math.sqrt(size))
    (expected,) = torch.autograd.grad(plain.sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-3 * size)  # large terms cancel


@pytest.mark.parametrize("divergence", NAMES)
def test_an_id_impossible_on_both_sides_has_no_part(divergence: str) -> None:
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()
    offset = torch.zeros(V, dtype=torch.float64)
    offset[[3, V - 1]] = -torch.inf
    head, other = Head(weight, offset), Head(of_teacher.weight, offset)
    targets = torch.full((N,), 4)
    ours, statistics = divergence_statistics(hidden, head, states, other, targets, divergence=divergence)
    left = [index for index in range(V) if index not in (3, V - 1)]
    logits = (hidden @ weight.T)[:, left]
    check(ours, plain_divergence(logits, (states @ of_teacher.weight.T)[:, left], divergence), [hidden, weight])
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(logits=logits.detach()).entropy())


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(divergence: str, dtype: torch.dtype) -> None:
    hidden, weight, offset = inputs(bias=True, dtype=dtype)
    states, of_teacher = teacher(dtype=dtype)
    head = Head(weight, offset, temperature=0.8)
    ours, statistics = divergence_statistics(hidden, head, states, of_teacher, draw(N), divergence=divergence)
    variables = leaves(hidden, weight, offset)
    wide = [tensor.detach().double().requires_grad_() for tensor in variables]
    other = plain_logits(states.double(), of_teacher.weight.double(), None, softcap=6.0, temperature=1.2)
    plain = plain_divergence(plain_logits(wide[0], wide[1], wide[2], temperature=0.8), other, divergence)
    assert ours.dtype == statistics.logprobs.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=1e-4)  # inputs are exact, and products wide
    gradients, expected = torch.autograd.grad(ours.sum(), variables), torch.autograd.grad(plain.sum(), wide)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_leaves_the_teacher_as_it_is() -> None:
    hidden, weight, _ = inputs(bias=False, dtype=torch.float32)
    states, of_teacher = teacher(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = divergence_statistics(hidden, Head(weight), states, of_teacher, draw(N), divergence="reverse_kl")
    narrow = [tensor.detach().bfloat16().double() for tensor in (hidden, weight)]
    other = plain_logits(states.double(), of_teacher.weight.double(), None, softcap=6.0, temperature=1.2)
    plain = plain_divergence(narrow[0] @ narrow[1].T, other, "reverse_kl")
    torch.testing.assert_close(ours.double(), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_gradient_accumulated_in_place(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 3 * V)
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()

    def loss(head: Head) -> Tensor:
        return divergence_statistics(hidden, head, states, of_teacher, draw(N), divergence=divergence)[0].sum()

    (expected,) = torch.autograd.grad(loss(Head(weight)), weight)
    weight.grad = torch.ones_like(weight)
    buffer = weight.grad
    loss(Head(weight, accumulate_grad=True)).backward()
    assert weight.grad is buffer
    torch.testing.assert_close(buffer - 1, expected)


@pytest.mark.usefixtures("_process_group")
def test_sharded_head() -> None:
    hidden, weight, _ = inputs(bias=False)
    states, of_teacher = teacher()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    ours, plain = (
        divergence_statistics(hidden, Head(each), states, of_teacher, draw(N), divergence="jsd")[0]
        for each in (sharded, weight)
    )
    torch.testing.assert_close(ours, plain)
    ours.sum().backward()
    (expected,) = torch.autograd.grad(plain.sum(), weight)
    assert isinstance(sharded.grad, DTensor)
    torch.testing.assert_close(sharded.grad.full_tensor(), expected)


def test_no_positions() -> None:
    _, weight, _ = inputs(bias=False)
    hidden, (_, of_teacher) = torch.zeros(0, H, dtype=torch.float64, requires_grad=True), teacher()
    none = torch.zeros(0, dtype=torch.long)
    for divergence in NAMES:
        states = torch.zeros(0, G, dtype=torch.float64)
        ours, _ = divergence_statistics(hidden, Head(weight), states, of_teacher, none, divergence=divergence)
        assert ours.shape == (0,)
        ours.sum().backward()
