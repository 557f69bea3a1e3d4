"""Records of optimizer steps on disk: the step's rollouts, and the student's weights before it.

A record is a folder, ``RUN/pools/step-000016``: ``rollouts.safetensors``, ``weights.safetensors`` and ``record.json``.
Nothing in it is read by pickle. It is written under another name and then renamed, so that every existing record is
complete.

Shapes: B rollouts, T response tokens.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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
_FACTS, _ROLLOUTS, _WEIGHTS = "record.json", "rollouts.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class StepFacts:
    """Plain values of an optimizer step.

    Args:
        step: optimizer steps taken before this one.
        reuse_epoch: passes over the buffer before this one.
        losses: of each micro-batch, nats: its part of the step's loss.
        gradient_norm: of the step's gradient before clipping; None if it was not finite.
        gate: the run's gate and its options as text.
        tau: chosen by a schedule, per nat; None without a schedule.
        num_processes: of the run; the record has the first one's share.
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
        """Return the step's loss, nats, summed as in the log; with several processes this process's share."""
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
        folder: of the record.
        facts: plain values of the step.
        batches: the step's micro-batches, in order.
    """

    folder: Path
    facts: StepFacts
    batches: tuple[RecordedBatch, ...]

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
        saved, own = _load(self.folder / _WEIGHTS), trained_weights(student)
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
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain: list[dict[str, float]] = []
    for place, batch in enumerate(batches):
        parts = {"rollouts": batch.rollouts.state_dict(), "targets": batch.targets.state_dict()}
        for part, values in parts.items():
            tensors |= {f"{place}.{part}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
        tensors[f"{place}.shares"] = batch.shares
        plain.append({"temperature": batch.rollouts.temperature})
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial / _ROLLOUTS)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, partial / _WEIGHTS)
    about = {"format": _FORMAT, **asdict(facts), "micro_batches": plain}
    (partial / _FACTS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return {"weights": (folder / _WEIGHTS).stat().st_size, "rollouts": (folder / _ROLLOUTS).stat().st_size}


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
    about = _read_facts(folder / _FACTS)
    require(
        about.get("format") == _FORMAT,
        f"{folder} has format {about.get('format')}, but this version of opdlab reads {_FORMAT}: record the run anew",
    )
    tensors = _load(folder / _ROLLOUTS)
    try:
        facts = StepFacts(**{field.name: about[field.name] for field in fields(StepFacts)})
        plain = about["micro_batches"]
        batches = tuple(_batch(tensors, place, **values) for place, values in enumerate(plain))
        counts = (facts.step, facts.reuse_epoch, facts.num_processes)
        if not all(isinstance(count, int) for count in counts):
            raise ValueError(f"{counts} are no counts")
        whole = bool(batches) and len(batches) == len(facts.losses) and all(map(math.isfinite, facts.losses))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error
    if not whole:
        raise _damaged(folder, "losses and micro-batches do not fit together")
    return RecordedStep(folder, facts, batches)


def _batch(tensors: Mapping[str, Tensor], place: int, temperature: float) -> RecordedBatch:
    def part(name: str) -> dict[str, Any]:
        prefix = f"{place}.{name}."
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}

    rollouts = Rollouts.from_state_dict({**part("rollouts"), "temperature": temperature})
    batch = RecordedBatch(rollouts, Targets.from_state_dict(part("targets")), tensors[f"{place}.shares"])
    shape = rollouts.tokens.shape
    for tensor in (rollouts.mask, rollouts.behavior_logprobs, batch.targets.logprobs, batch.shares):
        if tensor.shape != shape:
            raise ValueError(f"{tuple(tensor.shape)} beside {tuple(shape)}")
    return batch


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, str(error)) from error
    if not isinstance(about, dict):
        raise _damaged(path.parent, f"{path.name} holds no object")
    return about


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error


def _damaged(folder: Path, reason: str) -> UsageError:
    first_line = reason.strip().splitlines()[0][:200] if reason.strip() else "no reason given"
    return UsageError(
        f"{folder} cannot be read, it may have been changed or cut off: remove it, or leave its step out with --steps "
        f"({first_line})"
    )
