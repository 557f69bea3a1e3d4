"""Records of optimizer steps on disk: the step's rollouts, and the student's weights before it.

A record is a folder, ``RUN/pools/step-000016``: ``rollouts.safetensors``, ``weights.safetensors`` and ``record.json``.
Nothing in it is read by pickle. It is written under another name and then renamed, so that every existing record is
complete.

Shapes: B rollouts, T response tokens.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.policies import LanguageModel
from opdlab.rollouts import Rollouts, Targets

FOLDER = "pools"
_FORMAT = 1
FACTS, ROLLOUTS, WEIGHTS = "record.json", "rollouts.safetensors", "weights.safetensors"
"""Files of a record."""


@dataclass(frozen=True)
class StepFacts:
    """Plain values of an optimizer step.

    Args:
        step: optimizer steps taken before this one.
        reuse_epoch: passes over the buffer before this one.
        losses: of each micro-batch of each process, nats: its part of the step's loss.
        gradient_norm: of the step's gradient before clipping; None if it was not finite.
        gate: the run's gate and its options as text.
        tau: chosen by a schedule, per nat; None without a schedule.
        num_processes: of the run; the record has the micro-batches of all, and in earlier versions of the first.
        num_threads: of torch.
        device: type of the device, such as ``cpu``.
        precision: the trainer's.
        torch_version: of the package.
    """

    step: int
    reuse_epoch: int
    losses: list[float]
    gradient_norm: float | None
    gate: str
    tau: float | None
    num_processes: int
    num_threads: int
    device: str
    precision: str
    torch_version: str

    @property
    def loss(self) -> float:
        """Return the step's loss, nats, summed as in the log."""
        return float(torch.tensor(self.losses).sum())


@dataclass(frozen=True)
class RecordedBatch:
    """A micro-batch of a recorded step, on the host.

    Args:
        rollouts: B rollouts, with the behavior log-probabilities that the step has used.
        targets: the teacher's.
        shares: [B, T], see :func:`opdlab.objectives.loss_shares`: the step's denominators.
    """

    rollouts: Rollouts
    targets: Targets
    shares: Tensor


@dataclass(frozen=True)
class RecordedStep:
    """A record that was read.

    Args:
        folder: of the record; a packed one has only the name.
        facts: plain values of the step.
        batches: the step's micro-batches, in order.
        weights: reads the student's weights from before the step, see :func:`trained_weights`.
    """

    folder: Path
    facts: StepFacts
    batches: tuple[RecordedBatch, ...]
    weights: Callable[[], Mapping[str, Tensor]] = field(repr=False, compare=False)

    @property
    def number(self) -> int:
        """Return the number of the step, counted from 1."""
        return self.facts.step + 1

    @property
    def age(self) -> float:
        """Return the mean number of optimizer steps since the last refresh of the sampling snapshot."""
        snapshot = torch.cat([batch.rollouts.snapshot_step for batch in self.batches])
        return float((self.facts.step - snapshot).double().mean())

    def load_weights(self, student: LanguageModel) -> None:
        """Load the weights from before the step into a student.

        Raises:
            UsageError: the file is damaged, or belongs to another model.
        """
        own, saved = trained_weights(student), self.weights()
        for name in sorted(saved.keys() | own.keys()):
            ours, theirs = own.get(name), saved.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                kinds = [f"{t.dtype} {tuple(t.shape)}" if t is not None else "absent" for t in (theirs, ours)]
                raise UsageError(
                    f"{self.folder} is of another model: {name} is {kinds[0]} in it and {kinds[1]} in model.student; "
                    "replay with the configuration that the run was started with"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])


def trained_weights(student: LanguageModel) -> dict[str, Tensor]:
    """Return the trainable weights by name, tied ones once; only the adapter's if there is one."""
    return {name: p.detach() for name, p in student.named_parameters() if name not in student.frozen_keys}


def write_record(
    folder: Path, facts: StepFacts, batches: Sequence[RecordedBatch], weights: Mapping[str, Tensor]
) -> dict[str, int]:
    """Write a record, replacing an existing one.

    Args:
        folder: of the record.
        facts: plain values of the step.
        batches: the step's micro-batches.
        weights: see :func:`trained_weights`, as they were before the step.

    Returns:
        Sizes in bytes of ``weights`` and ``rollouts``.
    """
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_tensors(weights, unfinished / WEIGHTS)
        save_tensors(batch_tensors(batches), unfinished / ROLLOUTS)
        (unfinished / FACTS).write_text(facts_text(facts, batches), encoding="utf-8")
    except BaseException:  # such as a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return {"weights": (folder / WEIGHTS).stat().st_size, "rollouts": (folder / ROLLOUTS).stat().st_size}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of any device and layout as safetensors."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def facts_text(facts: StepFacts, batches: Sequence[RecordedBatch]) -> str:
    """Return the content of a record's JSON file."""
    about = {"format": _FORMAT, **asdict(facts), "micro_batches": plain_values(batches)}
    return json.dumps(about, indent=1) + "\n"


def plain_values(batches: Sequence[RecordedBatch]) -> list[dict[str, float]]:
    """Return what :func:`read_batches` needs of each micro-batch besides its tensors."""
    return [{"temperature": batch.rollouts.temperature} for batch in batches]


def batch_tensors(batches: Sequence[RecordedBatch], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of micro-batches by name, the reverse of :func:`read_batches`.

    Args:
        batches: the micro-batches.
        prefix: of all names.
    """
    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(batches):
        parts = {"rollouts": batch.rollouts.state_dict(), "targets": batch.targets.state_dict()}
        for part, values in parts.items():
            tensors |= {f"{prefix}{place}.{part}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
        tensors[f"{prefix}{place}.shares"] = batch.shares
    return tensors


def record_folders(run: Path) -> dict[int, Path]:
    """Return the records of a run by step number, ascending."""
    found = ((path.name.removeprefix("step-"), path) for path in (run / FOLDER).glob("step-*"))
    return dict(sorted((int(number), path) for number, path in found if number.isdigit()))


def record_folder(run: Path, number: int) -> Path:
    """Return the folder of a step's record."""
    return run / FOLDER / f"step-{number:06d}"


def read_record(folder: Path) -> RecordedStep:
    """Read a record, except its weights.

    Raises:
        UsageError: it is damaged, or written by another version of opdlab.
    """
    with _reading(folder / FACTS):
        facts, plain = read_facts((folder / FACTS).read_text(encoding="utf-8"), str(folder))
    with _reading(folder / ROLLOUTS):
        batches = read_batches(load_file(folder / ROLLOUTS), plain)
    return RecordedStep(folder, facts, batches, partial(_read_weights, folder))


def read_facts(text: str, source: str) -> tuple[StepFacts, list[dict[str, float]]]:
    """Return what a record's JSON file holds: values of the step, and those of :func:`plain_values`.

    Args:
        text: of the file.
        source: of the text, for messages.

    Raises:
        UsageError: it was written by another version of opdlab.
        ValueError: it is damaged; also KeyError and TypeError.
    """
    about = json.loads(text)
    require(
        about["format"] == _FORMAT,
        f"{source} has format {about['format']}, but this version of opdlab reads {_FORMAT}: record the run anew",
    )
    facts = StepFacts(**{field.name: about[field.name] for field in fields(StepFacts)})
    counts = (facts.step, facts.reuse_epoch, facts.num_processes)
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(f"{counts} are not integers")
    if not 0 < len(about["micro_batches"]) == len(facts.losses) or not all(map(math.isfinite, facts.losses)):
        raise ValueError("losses and micro-batches do not fit together")
    return facts, about["micro_batches"]


def read_batches(
    tensors: Mapping[str, Tensor], plain: Sequence[Mapping[str, float]], prefix: str = ""
) -> tuple[RecordedBatch, ...]:
    """Return micro-batches from their :func:`batch_tensors` and :func:`plain_values`."""
    return tuple(_batch(tensors, f"{prefix}{place}.", **values) for place, values in enumerate(plain))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    with _reading(folder / WEIGHTS):
        return load_file(folder / WEIGHTS)


def _batch(tensors: Mapping[str, Tensor], prefix: str, temperature: float) -> RecordedBatch:
    def part(name: str) -> dict[str, Any]:
        # Copies: a tensor in the file's memory may be unaligned, for which products sum in another order.
        return {key.removeprefix(name): tensor.clone() for key, tensor in tensors.items() if key.startswith(name)}

    rollouts = Rollouts.from_state_dict({**part(f"{prefix}rollouts."), "temperature": temperature})
    targets = Targets.from_state_dict(part(f"{prefix}targets."))
    batch = RecordedBatch(rollouts, targets, tensors[f"{prefix}shares"].clone())
    for tensor in (rollouts.mask, rollouts.behavior_logprobs, targets.logprobs, batch.shares):
        if tensor.shape != rollouts.tokens.shape:
            raise ValueError(f"shapes {tuple(tensor.shape)} and {tuple(rollouts.tokens.shape)} differ")
    return batch


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise an error inside the block as one that says that the record of the file ``path`` is damaged."""
    try:
        yield
    except UsageError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UsageError(
            f"{path.parent} cannot be read, it may have been changed or cut off: remove it, or leave its step out with "
            f"--steps ({path.name}: {reason})"
        ) from error
