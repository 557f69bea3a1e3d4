"""A teacher that is the student itself: as it was at the start, or its moving average."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import LocalTeacher


class SelfTeacher(LocalTeacher):
    r"""A teacher with the student's weights: those of the start of training, or their moving average.

    With a prompt of its own (``teacher_text`` of the training problems), for example one that holds a reference
    solution, this is on-policy self-distillation: the student learns to answer without what the teacher has seen. With
    the student's prompt it starts as the student's equal, and there is nothing to learn.

    After each optimizer step a moving average takes the new weights ``w`` of the student in:
    ``average = decay * average + (1 - decay) * w``, in float32 or wider. Checkpoints hold the teacher's weights, only
    the adapter's if the student has one; the weights below the adapter are shared.

    Args:
        decay: of the moving average, at least 0 and below 1; null freezes the weights of the start.
        batch_size: rollouts scored at a time.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(self, decay: float | None = None, batch_size: int = 32) -> None:
        require(
            decay is None or 0 <= decay < 1,
            f"decay is {decay}, but must be at least 0 and below 1, or null for the weights of the start",
        )
        require(batch_size >= 1, f"batch_size is {batch_size}, but must be at least 1")
        self.decay, self._batch_size = decay, batch_size
        self.follows_student = decay is not None
        self._weights: dict[str, Tensor] = {}

    def bind(self, student: LanguageModel) -> None:
        """Copy the student's weights."""
        self._hold(student.snapshot(), self._batch_size)
        self._weights = {
            name: weight.detach().float() if self.follows_student and weight.dtype.itemsize < 4 else weight.detach()
            for name, weight in self._own().items()
        }

    def _own(self) -> dict[str, Tensor]:
        """Return the weights that are not shared with the student, tied ones once."""
        return {name: w for name, w in self.model.named_parameters() if name not in self.model.frozen_keys}

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        super().to(device)
        own = self._own()
        for name, weight in self._weights.items():
            self._weights[name] = own[name].detach() if weight.dtype == own[name].dtype else weight.to(device)

    def head(self, temperature: float = 1.0) -> Any:
        """Return the frozen head; see :meth:`Teacher.head`.

        Raises:
            UsageError: the weights are a moving average, whose head changes after the hidden states were computed.
        """
        require(
            not self.follows_student,
            f"model.teacher is a SelfTeacher with decay {self.decay}, whose head changes with each step, but the "
            "objective needs the head that made the hidden states: set decay to null, or take an objective on a "
            "support, such as support_divergence",
        )
        local: Any = super()
        return local.head(temperature)

    @torch.no_grad()
    def after_step(self, student: LanguageModel) -> None:
        """Take the student's weights into the moving average."""
        if self.decay is None:
            return
        own, theirs = self._own(), dict(student.named_parameters())
        for name, average in self._weights.items():
            average.lerp_(theirs[name].detach().to(average), 1 - self.decay)
            if average.dtype != own[name].dtype:
                own[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's weights by name, the moving average at its full precision."""
        return dict(self._weights)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights of :meth:`state_dict`.

        Raises:
            UsageError: the checkpoint has none, or those of another model.
        """
        require(
            bool(state),
            "model.teacher is a SelfTeacher, but ckpt_path holds no weights of one: resume with the teacher that the "
            "run was started with, or start a new run from its student",
        )
        own = self._own()
        for name in self._weights.keys() | state.keys():
            weight, saved = self._weights.get(name), state.get(name)
            if weight is None or saved is None or weight.shape != saved.shape:
                shapes = [str(tuple(each.shape)) if each is not None else "absent" for each in (saved, weight)]
                raise UsageError(
                    f"ckpt_path is a checkpoint of another model: {name} of the SelfTeacher is {shapes[0]} in it and "
                    f"{shapes[1]} in model.student; resume with the configuration that the run was started with"
                )
            weight.copy_(saved)
            own[name].copy_(saved)

    def weights_digest(self) -> str | None:
        """Return None: the weights come from the checkpoint."""
        return None

    def fingerprint(self) -> str:
        """Return a digest of the frozen weights; see :meth:`Teacher.fingerprint`.

        Raises:
            UsageError: the weights are a moving average.
        """
        require(
            not self.follows_student,
            f"model.teacher is a SelfTeacher with decay {self.decay}, a moving average, whose targets hold for one "
            "step only and cannot be kept: leave the TargetCache out, or set decay to null",
        )
        return super().fingerprint()
