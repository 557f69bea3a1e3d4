"""The limits of all verdicts, with their sources: the one place for them; the documentation shows the same table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["bad", "look", "good", "not measured"]
ORDER: tuple[Verdict, ...] = ("bad", "look", "good", "not measured")
"""Verdicts in the order in which checks are listed."""


@dataclass(frozen=True)
class Limits:
    """Limits of one number.

    Args:
        title: what is checked.
        look: beyond it the verdict is ``look``; None for no such limit.
        bad: beyond it the verdict is ``bad``; None for no such limit.
        below: True if low numbers are worse.
        unit: of the number.
        source: of the limits.
    """

    title: str
    look: float | None
    bad: float | None
    below: bool
    unit: str
    source: str

    def verdict(self, number: float) -> Verdict:
        """Return the verdict on a number.

        Example:
            >>> Limits("overlap", 0.97, 0.5, True, "", "").verdict(0.9)
            'look'
        """
        if number != number:
            return "look"
        limits: dict[Verdict, float | None] = {"bad": self.bad, "look": self.look}  # the worse one first
        for verdict, limit in limits.items():
            if limit is not None and (number < limit if self.below else number > limit):
                return verdict
        return "good"


_OURS = "ours"
LIMITS: Mapping[str, Limits] = {
    "tokenizer": Limits("same tokenizer", 0.0, 0.1, False, "share of prompts", _OURS),
    "stop_tokens": Limits("stop tokens", None, 0.0, False, "stop tokens", "ours; one is enough"),
    "context": Limits("context length", None, 1.0, False, "share of the positions", "max_position_embeddings"),
    "padding": Limits("padding", 0.02, 0.1, False, "nats", _OURS),
    "chat_template": Limits("chat template", 0.5, 2.0, False, "nats", _OURS),
    "first_token": Limits("first token", 2.0, 5.0, False, "nats", _OURS),
    "thinking": Limits(
        "thinking markers", None, 0.0, False, "markers", "2604.13016: thinking patterns must be compatible"
    ),
    "alignment": Limits(
        "scores aligned", 0.5, 0.0, True, "nats", "ours; at 0 shifted tokens fit as well as the right ones"
    ),
    "temperature": Limits("temperature", 0.02, 0.1, False, "nats", _OURS),
    "same_model": Limits("teacher differs", 0.01, 0.001, True, "nats", "the collapse guard counts 0.001 as equal"),
    "headroom": Limits(
        "headroom", 2.0, -2.0, True, "standard errors", "2411.00640; 2604.13016: the teacher must add something"
    ),
    "overlap": Limits(
        "support overlap",
        0.97,
        0.5,
        True,
        "probability",
        "2604.13016: shared tokens hold 97% to 99% in runs that succeed",
    ),
    "gap": Limits("gap", 2.5, 5.0, False, "nats", "ours; SmolLM2 learns from 2.2"),
    "entropy": Limits("entropy", 0.2, 0.05, True, "ratio", "the collapse guard's limit"),
    "positions": Limits(
        "later positions", 2.0, 4.0, False, "ratio", "ours; 2605.13643 and 2605.28396 describe the effect"
    ),
    "truncated": Limits("truncated", 0.1, 0.5, False, "share of answers", "ours; the collapse guard stops at 0.9"),
    "repeated": Limits("repetition", 0.2, 0.6, False, "share of 4-grams", "the collapse guard's limit is 0.6"),
    "prefixes": Limits("student's prefixes", 2.0, -2.0, True, "standard errors", "2411.00640; ours"),
    "objective": Limits("objective", 0.97, 0.5, True, "probability", "as for overlap"),
    "memory": Limits("memory", 0.8, 1.0, False, "share of free memory", _OURS),
    "time": Limits("time", 24.0, 168.0, False, "hours", _OURS),
}
