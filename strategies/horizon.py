"""A gate that keeps the first tokens of each response."""

from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


@register_gate("horizon")
class HorizonGate(RuleGate):
    """Gate with weight 1 at the first ``tokens + growth * floor(step / every)`` tokens of a response, 0 elsewhere.

    Teachers score early tokens more reliably: later ones follow a text that the teacher would not have written. The
    papers stop sampling at the horizon. This gate keeps the rollout whole and leaves out the loss of its other tokens;
    ``model.sampling.max_new_tokens`` stops sampling.

    Args:
        tokens: horizon at the first optimizer step, at least 1; 100 in the first paper.
        growth: tokens by which the horizon grows, at least 0; 0 for a fixed one.
        every: optimizer steps from one growth to the next, at least 1.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``mean`` unless given.

    Raises:
        UsageError: an option is out of range.

    Example:
        >>> zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
        >>> gate = HorizonGate(tokens=1, growth=1, every=10, normalization="none")
        >>> [gate(GateInputs(zeros.long(), ones, zeros, zeros, step=step)).weights.tolist() for step in (9, 10)]
        [[[1.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 0.0, 0.0]]]

    Reference:
        A fixed horizon: Ziheng et al., "Less is More: Early Stopping Rollout for On-Policy Distillation", arXiv
        2605.27028, and the truncated rollouts of Zhang et al., "Are Full Rollouts Necessary for On-Policy
        Distillation?", arXiv 2605.31490, at 0.1 of the full length. The schedule is the latter's progressive one. The
        full texts could not be had: default and schedule are those of public summaries of them.
    """

    own_normalization = "mean"

    def __init__(self, tokens: int = 100, growth: int = 0, every: int = 1, **options: Any) -> None:
        super().__init__(**options)
        require(tokens >= 1, f"tokens is {tokens}, but must be at least 1")
        require(growth >= 0, f"growth is {growth}, but must be at least 0")
        require(every >= 1, f"every is {every}, but must be at least 1 step")
        self.tokens, self.growth, self.every = tokens, growth, every

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return 1 at the columns before the horizon."""
        horizon = self.tokens + self.growth * (inputs.step // self.every)
        columns = torch.arange(inputs.mask.shape[1], device=inputs.mask.device)
        return (columns < horizon).to(inputs.drift.dtype).expand_as(inputs.drift)
