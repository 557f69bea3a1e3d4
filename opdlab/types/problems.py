"""Problems, the prompts made from them, and the batches in which they are evaluated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opdlab.types.rollouts import Rollouts
from opdlab.verifiers.verifier import Verdict, Verifier

Verdicts = Callable[[], list[Verdict]]
"""Waits for the verdicts of responses that are being checked."""


@dataclass(frozen=True)
class Problem:
    """A problem as its source has it.

    Args:
        id: unique within the source.
        text: the problem.
        answer: the gold answer, or None if there is none.

    Example:
        >>> Problem(id="gsm-17", text="What is 3 + 4?", answer="7").answer
        '7'
    """

    id: str
    text: str
    answer: str | None


@dataclass(frozen=True)
class Prompt:
    """A problem as the student reads it.

    Args:
        index: row in the prompt set.
        problem: the problem that it was made from.
        tokens: token ids, special tokens of the template included.

    Example:
        >>> prompt = Prompt(index=0, problem=Problem("gsm-17", "What is 3 + 4?", "7"), tokens=(1, 51, 43, 52, 2))
        >>> len(prompt.tokens)
        5
    """

    index: int
    problem: Problem
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationBatch:
    """Problems of one benchmark.

    Args:
        benchmark: its name.
        prompts: the problems' prompts.
        verifier: checks the answers; None if there are no gold answers.

    Example:
        >>> batch = EvaluationBatch("toy", [Prompt(0, Problem("a", "1 + 1", "2"), (5, 9, 5))], verifier=None)
        >>> len(batch), batch.to("cpu") is batch
        (1, True)
    """

    benchmark: str
    prompts: Sequence[Prompt]
    verifier: Verifier | None

    def __len__(self) -> int:
        return len(self.prompts)

    def submit(self, texts: Sequence[str], rollouts: Rollouts) -> Verdicts | None:
        """Have responses checked, without waiting for the verdicts.

        Args:
            texts: [B], the responses.
            rollouts: B of them, on prompts of this batch.

        Returns:
            A function that waits for the B verdicts; None if there is no verifier.
        """
        if self.verifier is None:
            return None
        golds = {prompt.index: prompt.problem.answer or "" for prompt in self.prompts}
        return self.verifier.submit(texts, [golds[index] for index in rollouts.prompt_ids.tolist()])

    def to(self, device: object, non_blocking: bool = False) -> "EvaluationBatch":
        """Return the batch itself: Lightning calls this for every batch, and there is nothing to move."""
        del device, non_blocking
        return self
