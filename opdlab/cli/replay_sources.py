"""What ``opdlab replay`` reads recorded steps from: a run's folder, or a pack."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from opdlab.cli.building import build
from opdlab.cli.estimate import refuse_oversized
from opdlab.cli.parsing import build_sections, fit_parser, parse_fit
from opdlab.errors import UsageError, require
from opdlab.module import OPDModule
from opdlab.objectives import Objective
from opdlab.policies import Teacher
from opdlab.registry import suggestion
from opdlab.replay.fresh import Draws, Sampling
from opdlab.replay.pack import PackSettings
from opdlab.replay.record import FOLDER, RecordedStep, read_record, record_folders
from opdlab.replay.step_gradients import Autocast
from opdlab.replay.targets import RecordedTeacher
from opdlab.replay.unpack import Pack
from opdlab.run_folder import CONFIG, EXAMPLE, RunFolder, read_config
from opdlab.types import Prompt
from opdlab.verifiers.verifier import Verifier


@dataclass(frozen=True)
class Built:
    """A run's module, on its device.

    Args:
        module: the module.
        autocast: context of forward passes, the run's precision.
        prompts: the run's training prompts, if they are needed.
        verifier: of the training problems, if objectives read verdicts.
        draws: returns the fresh rollouts of a step; None to sample them.
    """

    module: OPDModule
    autocast: Autocast
    prompts: Sequence[Prompt] = ()
    draws: Callable[[RecordedStep], Draws] | None = None
    verifier: Verifier | None = None


class Source(ABC):
    """Base of what recorded steps are read from.

    Attributes:
        steps: numbers of the steps, counted from 1.
        teacher: that which the steps come with; None for one that is built with the run.
        out: where results go by default.
    """

    steps: Sequence[int]
    teacher: Teacher | None = None
    out: Path

    def chosen(self, steps: Sequence[str] | None) -> list[int]:
        """Return the numbers of the steps to replay, ascending.

        Raises:
            UsageError: a step was not recorded.
        """
        for step in steps or ():
            require(
                step.isdigit() and int(step) in self.steps,
                f"--steps has '{step}', which was not recorded; there are {', '.join(map(str, self.steps))}",
            )
        return list(self.steps) if steps is None else sorted(map(int, steps))

    @abstractmethod
    def sampling(self, draws: int | None, seed: int | None, other_prompts: bool) -> Sampling:
        """Return which fresh rollouts to compare with; None for the default."""

    @abstractmethod
    def records(self, steps: Sequence[int]) -> list[RecordedStep]:
        """Return chosen steps."""

    @abstractmethod
    def objective(self) -> Objective:
        """Return the run's objective, before models are loaded."""

    @abstractmethod
    def build(self, sampling: Sampling, judged: bool) -> Built:
        """Load the models; ``judged`` is true if objectives read verdicts on fresh rollouts."""


class RunSource(Source):
    """The folder of a run.

    Args:
        run: the folder.
        overrides: arguments that override the run's configuration.

    Raises:
        UsageError: it is not a run's folder, or has no recorded steps.
    """

    def __init__(self, run: Path, overrides: Sequence[str]) -> None:
        require(
            run.is_dir(),
            f"'{run}' is not a folder: give a run's folder, {EXAMPLE}, or a file that --pack has written",
        )
        read_config(RunFolder.open(run).config)  # refuses one that is cut off
        self._run, self._overrides, self.out = run, overrides, run / "replay"
        self._folders = record_folders(run)
        self.steps = list(self._folders)
        require(
            bool(self.steps),
            f"'{run}' has no recorded steps in {FOLDER}/: train with --save_pools true (and "
            "--pool_recorder.every_n_steps)",
        )

    @cached_property
    def _settings(self) -> Namespace:
        return parse_fit(["-c", str(self._run / CONFIG), "--ckpt_path", "null", *self._overrides])

    def sampling(self, draws: int | None, seed: int | None, other_prompts: bool) -> Sampling:
        """Return which fresh rollouts to sample."""
        defaults = Sampling()
        return Sampling(
            defaults.draws if draws is None else draws, defaults.seed if seed is None else seed, other_prompts
        )

    def records(self, steps: Sequence[int]) -> list[RecordedStep]:
        """Return chosen steps."""
        return [read_record(self._folders[step]) for step in steps]

    def objective(self) -> Objective:
        """Return the run's objective, before models are loaded."""
        objective: Objective = build_sections({"objective": self._settings.model.objective}).objective
        return objective

    def build(self, sampling: Sampling, judged: bool) -> Built:
        """Load the models of the run's configuration, and its prompts if they are needed."""
        settings = self._settings
        if settings.check_memory:
            refuse_oversized(settings)
        seed_everything(settings.seed_everything, workers=True)  # adapters are initialised at random
        built = build(fit_parser(), settings)
        module, data = built.model, built.data
        prompts: Sequence[Prompt] = ()
        if sampling.other_prompts or judged:
            data.prepare(module.student.tokenizer, training=True)
            require(
                data.train_source.window is None,
                "data.train is read as a stream, so its problems cannot be found again: replay without --other_prompts "
                "and an objective that needs verdicts, or give data.train a limit",
            )
            prompts = data.train_prompts.prompts
        autocast = on_device(module, settings.trainer.accelerator, settings.trainer.precision)
        return Built(module, autocast, prompts, verifier=data.train_verifier if judged else None)

    def pack_settings(self, sampling: Sampling) -> PackSettings:
        """Return what a pack keeps of the configuration."""
        settings = self._settings
        plain = settings.model.as_dict()
        student = plain["student"]
        require(
            "path" in (student.get("init_args") or {}),
            f"model.student is {student['class_path']}, which is not built from a path, and a pack holds a folder: "
            "replay the run's folder instead",
        )
        model = {key: plain[key] for key in ("student", "objective", "gate", "max_tokens_per_pass")}
        trainer = settings.trainer
        return PackSettings(model, settings.seed_everything, trainer.accelerator, trainer.precision, sampling)


class PackSource(Source):
    """A pack.

    Args:
        path: of the file.
        overrides: arguments that override the run's configuration: of these only the device and its precision.

    Raises:
        UsageError: it is not a pack, is damaged, or another key is overridden.
    """

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self._pack = Pack(path)
        self.steps, self.out = self._pack.steps, path.with_name(f"{path.name}-replay")
        self.teacher = self._pack.teacher()
        self._trainer = {"accelerator": self._pack.settings.accelerator, "precision": self._pack.settings.precision}
        words = [part for word in overrides for part in word.split("=", 1)]
        for flag, value in zip(words[::2], words[1::2], strict=False):
            key = flag.removeprefix("--trainer.")
            known = [f"--trainer.{name}" for name in self._trainer]
            require(
                key in self._trainer,
                f"{flag} is given, but '{path}' holds its own models and needs no data{suggestion(flag, known) or ':'} "
                f"leave it out; {' and '.join(known)} may be given",
            )
            self._trainer[key] = value
        require(len(words) % 2 == 0, f"{words[-1] if words else ''} has no value: give one after it")

    def sampling(self, draws: int | None, seed: int | None, other_prompts: bool) -> Sampling:
        """Return which fresh rollouts to take: those of the file."""
        own = self._pack.settings.sampling
        sampling = Sampling(own.draws if draws is None else draws, own.seed if seed is None else seed, other_prompts)
        self._pack.check_sampling(sampling)
        return sampling

    def records(self, steps: Sequence[int]) -> list[RecordedStep]:
        """Return chosen steps, after all that they consist of was compared with its digest."""
        self._pack.check(steps)
        return [self._pack.record(step) for step in steps]

    def objective(self) -> Objective:
        """Return the run's objective, before models are loaded."""
        objective: Objective = build_sections({"objective": self._pack.settings.model["objective"]}).objective
        return objective

    def build(self, sampling: Sampling, judged: bool) -> Built:
        """Load the student from the file."""
        settings, teacher = self._pack.settings, self.teacher
        assert teacher is not None
        seed_everything(settings.seed, workers=True)
        with self._pack.student_section() as student:
            built = build_sections({key: settings.model[key] for key in ("objective", "gate")} | {"student": student})
        if isinstance(teacher, RecordedTeacher):
            teacher.has_entropy = built.objective.request.entropy or "teacher_entropy" in built.gate.needs
        bound = settings.model["max_tokens_per_pass"]
        module = OPDModule(built.student, teacher, built.objective, built.gate, max_tokens_per_pass=bound)
        autocast = on_device(module, self._trainer["accelerator"], self._trainer["precision"])
        return Built(module, autocast, draws=partial(self._pack.draws, sampling))


def on_device(module: nn.Module, accelerator: Any, precision: Any) -> Autocast:
    """Move a module to one device, even if the run used more, and return the context of forward passes there."""
    if str(precision) in ("16-mixed", "16"):
        # Training scales the loss, so that small gradients stay above zero in float16; the scale is not recorded.
        rank_zero_warn(f"trainer.precision is {precision}, for which a replay has no loss scale: it takes 32-true")
        precision = "32-true"
    try:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    except Exception as error:  # Lightning raises several types
        raise UsageError(f"trainer.accelerator is {accelerator} and trainer.precision {precision}: {error}") from error
    module.to(fabric.device)
    return fabric.autocast
