"""No tensor is larger than a tile of logits, or than the head."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import opdlab.scoring.head
import opdlab.scoring.head_gradients
from opdlab.scoring import (
    Head,
    LowRank,
    divergence_statistics,
    support_logits,
    support_statistics,
    support_tail,
    token_logprobs,
    token_statistics,
    topk_with_statistics,
    topk_with_tail,
)


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes; detaching makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (leaf.numel() for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        if func is not torch.ops.aten.detach.default:
            self.numel = max(self.numel, *made, 0)
        return result


@pytest.fixture
def _wide_vocabulary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The constants are for real vocabularies: with them one tile would hold all logits of the test.
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 8 * 4096)
    monkeypatch.setattr(opdlab.scoring.head_gradients, "MAX_PIECE", 8 * 4096)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _forward_and_backward(kind: str) -> int:
    """The largest tensor made while 512 positions are scored over 4096 tokens."""
    hidden, weight = torch.randn(512, 6, requires_grad=True), torch.randn(4096, 6, requires_grad=True)
    targets, support = torch.randint(0, 4096, (512,)), torch.randint(0, 4096, (512, 32))
    adapted = Head(weight, low_rank=LowRank(torch.randn(2, 6), torch.randn(4096, 2), 0.5)).detached()
    if kind.startswith("adapter"):
        assert adapted.low_rank is not None
        adapted.low_rank.down.requires_grad_()
        adapted.low_rank.up.requires_grad_()
    frozen = Head(weight.detach())

    def of_tail(head: Head) -> Tensor:
        tail = support_tail(hidden, head, targets, support)
        return tail.logits.sum() + tail.log_tail.sum() + tail.statistics.log_normalizer.sum()

    def of_divergence(kind: str) -> Tensor:
        teacher, of_teacher = torch.randn(512, 5), Head(torch.randn(4096, 5))
        return divergence_statistics(hidden, Head(weight), teacher, of_teacher, targets, divergence=kind)[0]

    losses: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]),
        "logprobs": lambda: token_logprobs(hidden, weight, targets),
        "support": lambda: support_logits(hidden, weight, support),
        "support and statistics": lambda: support_statistics(hidden, Head(weight), targets, support)[0],
        "tail": lambda: of_tail(Head(weight)),
        "adapter": lambda: token_statistics(hidden, adapted, targets).logprobs,
        "frozen adapter": lambda: token_statistics(hidden, adapted, targets).logprobs,
        "adapter and support": lambda: support_statistics(hidden, adapted, targets, support)[0],
        "adapter and tail": lambda: of_tail(adapted),
        "frozen head": lambda: token_statistics(hidden, frozen, targets).logprobs,
        "frozen head and tail": lambda: of_tail(frozen),
        "reverse_kl": lambda: of_divergence("reverse_kl"),
        "jsd": lambda: of_divergence("jsd"),
    }
    with _LargestTensor() as largest:
        if kind == "topk":
            topk_with_statistics(hidden, Head(weight), targets, 32)
        elif kind == "topk and tail":
            topk_with_tail(hidden, Head(weight), targets, 32, support)
        else:
            losses[kind]().sum().backward()
    return int(largest.numel)


KINDS = [
    *("logprobs", "frozen head", "support", "support and statistics", "topk"),
    *("tail", "adapter and tail", "frozen head and tail", "topk and tail", "reverse_kl", "jsd"),
]


@pytest.mark.usefixtures("_wide_vocabulary")
@pytest.mark.parametrize("kind", KINDS)
def test_never_holds_all_logits(kind: str) -> None:
    # The largest allowed tensor is a tile. The weight and its gradient have 6 * 4096 elements.
    assert _forward_and_backward(kind) <= 8 * 4096


@pytest.mark.usefixtures("_wide_vocabulary")
@pytest.mark.parametrize("kind", ["adapter", "adapter and support", "adapter and tail", "frozen adapter"])
def test_an_adapter_is_never_multiplied_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As above: tiles smaller than the update, which is what must not appear.
    monkeypatch.setattr(opdlab.scoring.head, "MAX_TILE_LOGITS", 8 * 512)
    monkeypatch.setattr(opdlab.scoring.head_gradients, "MAX_PIECE", 8 * 512)
    # The update would be as large as the weight, 6 * 4096. Ids of the support, with the target's, are 512 * 33.
    assert _forward_and_backward(kind) <= 512 * 33


@pytest.mark.usefixtures("_wide_vocabulary")
def test_memory_probe_sees_all_logits() -> None:
    assert _forward_and_backward("plain") == 512 * 4096
