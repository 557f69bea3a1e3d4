"""Several teachers, of which the data names one for each problem."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.context import ContextLength
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import LocalTeacher, Teacher
from opdlab.policies.tokenizers import StopTokens, check_same_vocabulary
from opdlab.progress import Progress
from opdlab.records import digest
from opdlab.registry import suggestion
from opdlab.types import MergedTargets, Problem, Rollouts, Targets, TeacherRequest


def check_teacher(problem: Problem, names: Sequence[str]) -> None:
    """Raise a UsageError if a problem names none of the teachers, or names one where there is one for all."""
    name = problem.teacher
    if not names:
        require(
            name is None,
            f"the problem '{problem.id}' names the teacher '{name}', but model.teacher is one teacher for all: give a "
            "RoutedTeacher, or leave teacher_field out",
        )
        return
    known = ", ".join(names)
    require(
        name is not None,
        f"the problem '{problem.id}' names no teacher, but model.teacher is a RoutedTeacher: give data.train a "
        f"teacher_field, whose values are among {known}",
    )
    require(
        name in names,
        f"the problem '{problem.id}' names the teacher '{name}', but model.teacher.teachers has {known}"
        f"{suggestion(name or '', list(names)) or ':'} add it, or leave the problem out",
    )


class RoutedTeacher(Teacher):
    """Several teachers, of which a field of the data (``teacher_field``) names one for each problem.

    They share the student's vocabulary. Each rollout is scored by its own teacher only, one teacher after another.

    Args:
        teachers: by name: a path or hub id, for a :class:`LocalTeacher` with the options below, or a teacher.
        keep_loaded: false loads each path whenever it has rollouts to score, and frees it afterwards, so that one
            teacher is in memory at a time.
        **options: of the :class:`LocalTeacher` of each path.

    Raises:
        UsageError: there is no teacher, or one cannot be loaded, or the vocabularies differ.
    """

    def __init__(self, teachers: dict[str, str | Teacher], keep_loaded: bool = True, **options: Any) -> None:
        require(bool(teachers), "teachers is empty, but must have a path or a teacher for each name in the data")
        for name in teachers:
            require(bool(name) and "/" not in name, f"teachers has the name '{name}': give one without a slash")
        self.names = tuple(teachers)
        self._paths = {name: given for name, given in teachers.items() if isinstance(given, str)}
        self._teachers = {name: given for name, given in teachers.items() if isinstance(given, Teacher)}
        self._options = options
        self._keep_loaded, self._device = keep_loaded, torch.device("cpu")
        self._digests: dict[str, str | None] = {}  # of the weights of each teacher, when it was bound
        self._contexts: dict[str, ContextLength] = {}
        self._metrics: dict[str, float] = {}
        self.follows_student = any(teacher.follows_student for teacher in self._teachers.values())

    def _local(self, path: str) -> LocalTeacher:
        return LocalTeacher(path, **self._options)

    @contextmanager
    def _loaded(self, name: str, student: LanguageModel | None = None) -> Iterator[Teacher]:
        """Yield a teacher, on the device and bound to a given student; one that is not kept is freed afterwards."""
        teacher = self._teachers.get(name)
        if teacher is None:
            teacher = self._local(self._paths[name])
            if self._keep_loaded:
                self._teachers[name] = teacher
        if student is not None:
            teacher.bind(student)  # before any other call: a SelfTeacher has no weights until then
        teacher.to(self._device)
        yield teacher
        del teacher
        if self._device.type == "cuda" and name not in self._teachers:
            torch.cuda.empty_cache()

    def bind(self, student: LanguageModel) -> None:
        """Load each teacher once, and check that it has the student's vocabulary."""
        found = [self._bind(name, student) for name in self.names]
        self.vocab_size = min(size for size, _ in found)
        stops = [tokens for _, tokens in found]
        self.stop_tokens = next((each for each in stops if each is not None and each != student.stop_tokens), stops[0])

    def _bind(self, name: str, student: LanguageModel) -> tuple[int, StopTokens | None]:
        """Bind one teacher, and return its number of tokens and its stop tokens."""
        with self._loaded(name, student) as teacher:
            try:
                check_same_vocabulary(student.tokenizer, teacher.tokenizer)
            except UsageError as error:
                raise UsageError(f"model.teacher.teachers has '{name}', which does not fit: {error}") from error
            self._digests[name] = teacher.weights_digest()
            if contexts := teacher.contexts():
                self._contexts[name] = min(contexts.values(), key=lambda context: context.tokens)
            self.tokenizer = teacher.tokenizer
            return teacher.vocab_size, teacher.stop_tokens

    def to(self, device: torch.device) -> None:
        """Move the teachers that are kept, and set the device for the others."""
        self._device = device
        for teacher in self._teachers.values():
            teacher.to(device)

    def after_step(self, student: LanguageModel) -> None:
        """Pass the student on to each teacher."""
        for teacher in self._teachers.values():
            teacher.after_step(student)

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        """Let each teacher that is kept refuse what it cannot compute."""
        for teacher in self._teachers.values():
            teacher.check_request(request, temperature)

    def metrics(self) -> dict[str, float]:
        """Return the share, mean log-probability and time of each teacher; see :meth:`Teacher.metrics`."""
        return dict(self._metrics)

    def models(self) -> Iterator[tuple[str, LanguageModel]]:
        """Yield the model of each teacher by the teacher's name; one that is not kept is in memory until the next."""
        for name in self.names:
            with self._loaded(name) as teacher:
                yield from ((name, model) for _, model in teacher.models())

    def contexts(self) -> dict[str, ContextLength]:
        """Return the context length of each teacher by its name, as it was when the teacher was bound."""
        return dict(self._contexts)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of each teacher, by ``name/key``."""
        parts = ((name, each.state_dict()) for name, each in self._teachers.items())
        return {f"{name}/{key}": value for name, state in parts for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of each teacher."""
        for name, teacher in self._teachers.items():
            start = f"{name}/"
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            teacher.load_state_dict(own)

    def weights_digest(self) -> str | None:
        """Return a digest over all teachers; see :meth:`Teacher.weights_digest`."""
        return digest(self._digests)[:8]

    def fingerprint(self) -> str:
        """Return a digest over all teachers and their order; see :meth:`Teacher.fingerprint`."""
        found = []
        for name in self.names:
            with self._loaded(name) as teacher:
                found.append([name, teacher.fingerprint()])
        return digest(found)

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Return the targets of ``rollouts``, each of its own teacher; see :meth:`Teacher.score`.

        Raises:
            UsageError: the rollouts do not know their teachers, or hidden states are requested.
        """
        require(
            not request.hidden,
            "model.teacher is a RoutedTeacher, whose teachers have heads of their own, but model.objective asks for "
            "hidden states: take an objective on a support, such as teacher_topk",
        )
        require(
            rollouts.teacher_ids is not None,
            "model.teacher is a RoutedTeacher, but the rollouts do not know their teachers, as in an evaluation: set "
            "model.evaluation.reverse_kl to false, or take one teacher",
        )
        assert rollouts.teacher_ids is not None
        ids = rollouts.teacher_ids.cpu()
        rollouts = rollouts.as_teacher_sees()
        merged = MergedTargets(*rollouts.tokens.shape)
        self._metrics = {}
        for number, name in enumerate(self.names):
            rows = (ids == number).nonzero().view(-1)
            if len(rows) or not len(rollouts):
                merged.put(rows, self._score(name, rollouts.rows(rows), request, progress))
                self._metrics[f"targets/{name}/share"] = len(rows) / max(len(rollouts), 1)
        return merged.targets()

    def _score(self, name: str, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None) -> Targets:
        """Return the targets of one teacher, and add its metrics, under its name."""
        started = time.perf_counter()
        with self._loaded(name) as teacher:
            targets = teacher.score(rollouts, request, progress)
            of_teacher = {key.removeprefix("targets/"): value for key, value in teacher.metrics().items()}
        of_teacher["seconds"] = time.perf_counter() - started
        if targets.known_logprobs is not None:
            of_teacher["logprob"] = float(targets.logprobs.sum()) / max(float(rollouts.mask.sum()), 1.0)
        self._metrics |= {f"targets/{name}/{key}": value for key, value in of_teacher.items()}
        return targets
