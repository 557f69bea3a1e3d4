"""SG-OPD's sign-consistency gate: more weight where the teacher's preference agrees with the verifier's verdict."""

from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.gating import GateInputs, RuleGate, register_gate


@register_gate("sign_consistency")
class SignConsistencyGate(RuleGate):
    """Gate with weight ``1 + strength`` where teacher and verdict have the same sign, ``1 - strength`` elsewhere.

    They agree on a token of a correct response that the teacher finds likelier than the student does, and on a token of
    a wrong response that it finds less likely. Tokens of responses without a verdict, and tokens on which student and
    teacher agree exactly, have weight 1.

    Args:
        strength: 0 to 1; 1 keeps only tokens that agree.
        options: see :class:`opdlab.gating.RuleGate`; ``normalization`` is ``none`` unless given.

    Raises:
        UsageError: ``strength`` is out of range.

    Example:
        >>> zeros, teacher = torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        >>> verdicts = torch.tensor([[1, 1], [0, 0]], dtype=torch.int8)
        >>> inputs = GateInputs(zeros.long(), torch.ones(2, 2), zeros, zeros, teacher, correct=verdicts)
        >>> SignConsistencyGate()(inputs).weights
        tensor([[1.5000, 0.5000],
                [0.5000, 1.5000]])

    Reference:
        Xu et al., "Sign-Gated On-Policy Distillation", arXiv 2606.09304: the gate alone, without its phased teacher
        sampling. ``strength`` and its default are opdlab's choice.
    """

    needs = ("teacher_logprobs", "correct")

    def __init__(self, strength: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        require(0 <= strength <= 1, f"strength is {strength}, but must lie between 0 and 1")
        self.strength = strength

    @property
    def max_gate(self) -> float:
        """Return the largest weight, ``1 + strength``, where teacher and verdict agree."""
        return 1 + self.strength

    def weight(self, inputs: GateInputs) -> Tensor:
        """Return ``1 + strength * sign of the teacher gap * verdict``, with verdict 1, -1 or 0."""
        gap = inputs.teacher_gap
        assert gap is not None
        assert inputs.correct is not None
        verdict = torch.where(inputs.correct < 0, 0, 2 * inputs.correct - 1).to(gap.dtype)
        return 1 + self.strength * gap.sign() * verdict
