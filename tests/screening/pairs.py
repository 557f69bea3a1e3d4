"""Pairs for the tests of screenings: the toy models, and teachers with one fault each."""

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdlab.data import JsonlProblems, PromptSet, prompt_set
from opdlab.errors import require
from opdlab.policies import LanguageModel, LocalTeacher, Teacher, TeacherRequest, share_vocabulary
from opdlab.progress import Progress
from opdlab.screening import Check, Pair, ScreenConfig, Screening, screen
from opdlab.toy import ChainProblems
from opdlab.types import Rollouts, Targets
from tests.toy_run import STUDENT, TEACHER

SHORT = ScreenConfig(num_prompts=4, num_samples=1, max_new_tokens=24)
WHOLE = replace(SHORT, num_prompts=24, max_new_tokens=176, num_samples=2)


def make_pair(
    student: str | LanguageModel = STUDENT,
    teacher: str | Teacher = TEACHER,
    problems: PromptSet | None = None,
    **fields: Any,
) -> Pair:
    own = LanguageModel(student) if isinstance(student, str) else student
    other = LocalTeacher(teacher) if isinstance(teacher, str) else teacher
    own.requires_grad_(False).eval()
    other.bind(own)
    share_vocabulary(own, other)
    source = ChainProblems(num_problems=24)
    found = prompt_set(source, own.tokenizer, 64) if problems is None else problems
    return Pair(own, other, {"chains": found}, fields.pop("template", source.template), **fields)


def rows(path: Path, *texts: Any, answer: str | None = None) -> JsonlProblems:
    """A source with these problems, without a verifier."""
    lines = [{"id": str(number), "problem": text, "answer": answer} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return JsonlProblems(str(path), answer_field=None)


def check(screening: Screening, name: str) -> Check:
    return next(each for each in screening.checks if each.name == name)


def verdict(pair: Pair, name: str, config: ScreenConfig = SHORT) -> str:
    return check(screen(pair, config), name).verdict


def copied(role: str, folder: Path, **changed: dict[str, Any]) -> str:
    """A copy of a toy model with changed values in its JSON files, by name without the ending."""
    shutil.copytree(str(files("opdlab.toy") / "models" / role), folder)
    for name, values in changed.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


class Changed(LocalTeacher):
    """The toy teacher with changed targets."""

    def __init__(self, path: str = TEACHER) -> None:
        super().__init__(path)

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        rollouts = self.seen(rollouts.as_teacher_sees())
        return self.changed(super().score(rollouts, request, progress))

    def seen(self, rollouts: Rollouts) -> Rollouts:
        return rollouts

    def changed(self, targets: Targets) -> Targets:
        return targets


class Shifted(Changed):
    """Gives the distribution of the position before."""

    def changed(self, targets: Targets) -> Targets:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.int().roll(1, 1) if tensor.dtype == torch.uint8 else tensor.roll(1, 1)

        return targets.map(moved)


class ShiftedLogprobs(Changed):
    """Gives the log-probability of the token before, beside a support of the right position."""

    def changed(self, targets: Targets) -> Targets:
        return replace(targets, logprobs=targets.logprobs - 1.0)


class WithoutTemperature(Changed):
    def seen(self, rollouts: Rollouts) -> Rollouts:
        return replace(rollouts, temperature=1.0)


class SeesPadding(Changed):
    def seen(self, rollouts: Rollouts) -> Rollouts:
        return replace(rollouts, prompt_mask=torch.ones_like(rollouts.prompt_mask))


class KnowsNoMarker(Changed):
    """Sees nothing but markers in a prompt that has one, the letter p."""

    def seen(self, rollouts: Rollouts) -> Rollouts:
        marker = self.tokenizer.get_vocab()["p"]
        marked = (rollouts.prompt_tokens == marker).any(1, keepdim=True)
        tokens = torch.where(marked & rollouts.prompt_mask.bool(), marker, rollouts.prompt_tokens)
        return replace(rollouts, prompt_tokens=tokens)


class LosesTheThread(Changed):
    """Gives the probability of each of its most likely tokens to another one, late in the answers."""

    def changed(self, targets: Targets) -> Targets:
        if targets.support_logits is None:
            return targets
        logits, late = targets.support_logits.clone(), targets.support_logits.shape[1] // 2
        logits[:, late:] = logits[:, late:].flip(-1)
        return replace(targets, support_logits=logits)


class Served(Teacher):
    """A teacher that samples nothing here, tells no entropy, and knows ratios only unless the temperature is 1."""

    def __init__(self) -> None:
        self._inner = LocalTeacher(TEACHER)
        self.vocab_size = self._inner.vocab_size

    def bind(self, student: LanguageModel) -> None:
        self.tokenizer = student.tokenizer

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        require(not request.entropy, "the server knows no entropy")
        require(temperature == 1 or not (request.tail or request.logprobs), "the server knows ratios only")

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        targets = self._inner.score(rollouts, request, progress)
        if request.logprobs:
            return targets
        return replace(targets, logprobs=targets.logprobs * torch.nan, support_mass=None)
