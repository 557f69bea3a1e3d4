"""Problems, the prompts made from them, and the batches in which they are evaluated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opdlab.types.rollouts import Rollouts
from opdlab.verifiers.verifier import Verdict, Verifier

Verdicts = Callable[[], list[Verdict]]
"""A function that waits for the verdicts of submitted responses."""


class Message(NamedTuple):
    """A turn of a chat.

    Attributes:
        role: ``system``, ``user``, ``assistant``, or another role that the chat template knows.
        content: text of the turn.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Part:
    """A part of a given response.

    Args:
        text: of the part.
        loss: True if it counts in the loss; False if it is only conditioned on, such as the output of a tool.
    """

    text: str
    loss: bool = True


@dataclass(frozen=True)
class Problem:
    """A problem as given by its source.

    Args:
        id: unique within the source.
        text: the problem; for a chat, its last turn.
        answer: the gold answer, or None if the source has none.
        messages: all turns of a chat, which ends with the user's; empty for plain text.
        teacher_text: the problem as the teacher sees it, such as the problem with its solution; for a chat, its last
            turn. None if the teacher sees ``text``.
        teacher: name of the teacher that scores the responses; None if there is one teacher for all.
        demonstration: a given response, in parts; empty if there is none.

    Example:
        >>> Problem(id="gsm-17", text="What is 3 + 4?", answer="7").answer
        '7'
        >>> Problem("1", "And 4 + 4?", "8", (Message("system", "Be brief."), Message("user", "And 4 + 4?"))).messages[0]
        Message(role='system', content='Be brief.')
    """

    id: str
    text: str
    answer: str | None
    messages: tuple[Message, ...] = ()
    teacher_text: str | None = None
    teacher: str | None = None
    demonstration: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The tokens that the student, and the teacher before it scores a response, receive for a problem.

    Args:
        index: row in the prompt set.
        problem: the problem of the prompt.
        tokens: token ids, special tokens of the template included.
        teacher_tokens: token ids of the prompt that the teacher sees, or None if it sees ``tokens``.
        demonstration: token ids of the given response, without a stop token; None if there is none.
        demonstration_loss: for each of them, True if it counts in the loss.

    Example:
        >>> prompt = Prompt(index=0, problem=Problem("gsm-17", "What is 3 + 4?", "7"), tokens=(1, 51, 43, 52, 2))
        >>> len(prompt.tokens)
        5
    """

    index: int
    problem: Problem
    tokens: tuple[int, ...]
    teacher_tokens: tuple[int, ...] | None = None
    demonstration: tuple[int, ...] | None = None
    demonstration_loss: tuple[bool, ...] = ()


def prompts_at(prompts: Sequence[Prompt], indices: Sequence[int]) -> list[Prompt]:
    """Return the prompts at several positions, made together where they are made on demand (``__getitems__``)."""
    together: Callable[[Sequence[int]], list[Prompt]] | None = getattr(prompts, "__getitems__", None)
    return [prompts[index] for index in indices] if together is None else together(indices)


@dataclass(frozen=True)
class EvaluationBatch:
    """Problems of one benchmark.

    Args:
        benchmark: name of the benchmark.
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
        """Submit responses to the verifier, without waiting for the verdicts.

        Args:
            texts: [B], the responses.
            rollouts: B rollouts of prompts of this batch.

        Returns:
            A function that waits for the B verdicts; None if there is no verifier.
        """
        if self.verifier is None:
            return None
        golds = {prompt.index: prompt.problem.answer or "" for prompt in self.prompts}
        return self.verifier.submit(texts, [golds[index] for index in rollouts.prompt_ids.tolist()])

    def to(self, device: object, non_blocking: bool = False) -> "EvaluationBatch":
        """Return the batch itself, because it has no tensors; Lightning calls this for every batch."""
        del device, non_blocking
        return self
