"""The pair that is screened, its problems, and the options of a screening."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from opdlab.data.prompts import PromptSet
from opdlab.data.templates import Template
from opdlab.errors import UsageError, require
from opdlab.policies import LanguageModel, SamplingConfig, Teacher, check_targets
from opdlab.progress import Progress
from opdlab.seeds import checked_seed, derive_seed
from opdlab.types import Prompt, Rollouts, Targets, TeacherRequest, prompts_at

T = TypeVar("T")


MIN_PROMPTS = 2
"""Fewest problems of a set: of one alone it is not known how much the answers to others differ."""


@dataclass(frozen=True)
class Missing:
    """A measurement that could not be made.

    Args:
        reason: says why, without a full stop.
    """

    reason: str


Maybe: TypeAlias = T | Missing


@dataclass(frozen=True)
class ScreenConfig:
    """Options of a screening.

    Args:
        num_prompts: prompts that are taken of each set of problems.
        num_samples: answers of each model to each prompt.
        max_new_tokens: longest answer in tokens.
        temperature: of sampling and scoring.
        top_p: see :class:`opdlab.policies.SamplingConfig`.
        k: largest support that is looked at, at least 4.
        batch_size: answers sampled or scored at a time.
        seed: chooses the prompts, and determines the answers.

    Raises:
        UsageError: a value is out of range.
    """

    num_prompts: int = 32
    num_samples: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    k: int = 64
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.num_prompts >= MIN_PROMPTS, f"num_prompts is {self.num_prompts}, but must be at least {MIN_PROMPTS}"
        )
        require(self.k >= 4, f"k is {self.k}, but must be at least 4")
        checked_seed(self.seed)
        _ = self.sampling

    @property
    def sampling(self) -> SamplingConfig:
        """Return the options of the answers."""
        given = asdict(self)
        return SamplingConfig(
            **{name: given[name] for name in ("num_samples", "temperature", "top_p", "max_new_tokens", "batch_size")}
        )


@dataclass(frozen=True)
class ConfiguredRun:
    """What a configuration of ``opdlab fit`` says of a run, as far as a screening compares with it.

    Args:
        objective: name of the objective.
        k: size of its support, or None.
        rollouts: of a buffer.
        epochs: passes over a buffer.
        batch_size: rollouts of an optimizer step.
        num_steps: optimizer steps, or None if they are not bounded.
        memory: estimated peak in bytes, free bytes of the device, and a sentence about them; None if not known.
    """

    objective: str
    k: int | None
    rollouts: int
    epochs: int
    batch_size: int
    num_steps: int | None
    memory: tuple[int, int, str] | None


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and their problems.

    Args:
        student: bound to the teacher: both share a vocabulary.
        teacher: scores the student's answers.
        problems: sets of problems by name; the first one has the training prompts.
        template: turns the training problems into prompts.
        run: the configured run, or None if there is no configuration.
    """

    student: LanguageModel
    teacher: Teacher
    problems: Mapping[str, PromptSet]
    template: Template
    run: ConfiguredRun | None = None

    @property
    def training(self) -> str:
        """Return the name of the set with the training prompts."""
        return next(iter(self.problems))

    def teacher_model(self) -> Maybe[LanguageModel]:
        """Return the teacher's model, which can sample answers."""
        if self.teacher.names:
            return Missing("there are several teachers: screen each one alone")
        found = next(self.teacher.models(), None)
        name = type(self.teacher).__name__
        return Missing(f"{name} has no model in this process that could sample answers") if found is None else found[1]


def choose_prompts(prompts: Sequence[Prompt], count: int, *seed: int | str) -> list[Prompt]:
    """Return ``count`` of the prompts, or all if there are fewer: a random choice in the order of the source.

    Args:
        prompts: to choose from.
        count: number of prompts.
        *seed: determines the choice.

    Example:
        >>> from opdlab.types import Problem
        >>> prompts = [Prompt(index, Problem(str(index), "1 + 1", "2"), (5,)) for index in range(9)]
        >>> len(choose_prompts(prompts, 4, 0)), choose_prompts(prompts, 99, 0) == prompts
        (4, True)
    """
    generator = torch.Generator().manual_seed(derive_seed("screen", *seed))
    order: Tensor = torch.randperm(len(prompts), generator=generator)[:count].sort().values
    return prompts_at(prompts, order.tolist())


def ask(
    teacher: Teacher, rollouts: Rollouts, requests: Sequence[TeacherRequest], progress: Progress | None = None
) -> Maybe[Targets]:
    """Return the teacher's targets for the first request that it can serve, else why it cannot serve the last one.

    Args:
        teacher: scores the rollouts.
        rollouts: with the prompts that the teacher sees.
        requests: the richest first.
        progress: shows a progress bar.
    """
    reason = ""
    for request in requests:
        try:
            teacher.check_request(request, rollouts.temperature)
            targets = teacher.score(rollouts, request, progress)
            check_targets(teacher, request, targets)
            return targets
        except UsageError as error:
            reason = str(error)
    return Missing(reason)


class Titled:
    """A progress display that names its tasks after what they are for.

    Args:
        shown: the display.
        title: follows the name of each task.
    """

    def __init__(self, shown: Progress, title: str) -> None:
        self._shown, self._title = shown, title

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """See :class:`opdlab.progress.Progress`."""
        return self._shown.task(f"{name}: {self._title}", total)
