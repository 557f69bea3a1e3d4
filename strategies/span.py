"""One weight per newline-delimited span."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.gating import DriftGate, GateInputs, register_gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@register_gate("span")
class SpanGate(DriftGate):
    r"""Gate on spans of text between newlines, the paper's NewlineSpan (arXiv 2606.24084).

    A token whose text has a newline closes its span and belongs to it. A span shorter than ``min_tokens`` merges
    with the next one, the last with the previous one. After merging, a span longer than ``max_tokens`` is cut
    into chunks of ``max_tokens``. A response without a newline is cut into chunks of ``fallback_tokens``.

    Args:
        newline_token_ids: ids of the tokens whose text has a newline; None takes them from the student's tokenizer.
        min_tokens: shortest span, at least 1.
        max_tokens: longest span, at least ``min_tokens``.
        fallback_tokens: chunk length of a response without a newline, at least 1.
        options: see :class:`opdlab.gating.DriftGate`.

    Example:
        >>> tokens = torch.tensor([[5, 5, 1, 5, 1, 5, 5, 5, 1, 5]])  # 1 is the newline
        >>> zeros = torch.zeros(1, 10)
        >>> gate = SpanGate(newline_token_ids=[1], min_tokens=3, max_tokens=4)
        >>> gate(GateInputs(tokens, torch.ones(1, 10), zeros, zeros)).segment_ids
        tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    """

    def __init__(
        self,
        newline_token_ids: Sequence[int] | None = None,
        min_tokens: int = 8,
        max_tokens: int = 128,
        fallback_tokens: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require(min_tokens >= 1, f"min_tokens is {min_tokens}, but must be at least 1")
        require(
            max_tokens >= min_tokens,
            f"max_tokens is {max_tokens}, but must be at least min_tokens, which is {min_tokens}",
        )
        require(fallback_tokens >= 1, f"fallback_tokens is {fallback_tokens}, but must be at least 1")
        self.newline_token_ids = None if newline_token_ids is None else list(newline_token_ids)
        self.min_tokens = min_tokens
        self.max_tokens = max_tokens
        self.fallback_tokens = fallback_tokens

    def setup(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Find the tokens whose text has a newline, unless they are given."""
        if self.newline_token_ids is None:
            texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
            self.newline_token_ids = [index for index, text in enumerate(texts) if "\n" in text]

    def segment_ids(self, inputs: GateInputs) -> Tensor:
        """Return, for each position, the column in which its span (or chunk of a span) starts."""
        if self.newline_token_ids is None:
            raise UsageError("gate.newline_token_ids is not known yet: give it, or call gate.setup(tokenizer) first")
        mask = inputs.mask.bool()
        columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        if not mask.numel():
            return columns  # max() fails for zero columns
        newlines = torch.tensor(self.newline_token_ids, dtype=torch.long, device=mask.device)
        closes = torch.isin(inputs.tokens, newlines) & mask
        start = self._span_starts(closes, (columns + 1).masked_fill(~mask, 0).amax(1, keepdim=True))
        chunk = torch.where(closes.any(1, keepdim=True), self.max_tokens, self.fallback_tokens)
        return columns - (columns - start) % chunk

    def _span_starts(self, closes: Tensor, lengths: Tensor) -> Tensor:
        """Return the first column of each column's merged span, [B, T]."""
        num_columns = closes.shape[1]
        columns = torch.arange(num_columns + 1, device=closes.device).expand(closes.shape[0], -1)
        # close[c]: the first closing column at or after c; following[c]: where the span that starts at c ends + 1,
        # the first close that leaves it min_tokens long. Both for every column at once, by a minimum from the right.
        close = torch.where(closes, columns[:, :-1], num_columns).flip(1).cummin(1).values.flip(1)
        close = torch.cat([close, torch.full_like(close[:, :1], num_columns)], dim=1)
        following = (close.gather(1, (columns + self.min_tokens - 1).clamp(max=num_columns)) + 1).clamp(max=num_columns)
        is_start = _orbit_of_zero(following)[:, :-1] & (columns[:, :-1] < lengths)
        start = torch.where(is_start, columns[:, :-1], 0).cummax(1).values
        # A last span that is too short joins the previous one: drop its start.
        last = start.amax(1, keepdim=True)
        is_start &= ~((columns[:, :-1] == last) & (lengths - last < self.min_tokens))
        return torch.where(is_start, columns[:, :-1], 0).cummax(1).values


def _orbit_of_zero(following: Tensor) -> Tensor:
    """Return a mask of 0, following[0], following[following[0]], …: [B, N] bool, by doubling, in log2(N) steps."""
    num_columns = following.shape[1]
    reached = torch.zeros_like(following)
    reached[:, 0] = 1
    jump = following
    for _ in range(max(num_columns - 1, 1).bit_length()):
        reached = reached.scatter_reduce(1, jump, reached, "amax")
        jump = jump.gather(1, jump)
    return reached.bool()
