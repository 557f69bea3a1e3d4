"""A teacher whose targets are kept on disk."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from opdlab.errors import UsageError, require
from opdlab.files import expanded, naming_full_disk, replacing
from opdlab.policies.context import ContextLength
from opdlab.policies.language_model import LanguageModel
from opdlab.policies.teacher import Teacher
from opdlab.progress import Progress
from opdlab.records import digest
from opdlab.types import MergedTargets, Rollouts, Targets, TeacherRequest

_FORMAT = 2
_DIGEST_BYTES = 20
_CONTENT = "content"  # key of the digest of a file's tensors in its header
_MIB = 1 << 20
_COUNTED = 1000  # files after which the number of the others is estimated


class TargetCache(Teacher):
    """A teacher that keeps the targets of each rollout on disk and does not score the same rollout twice.

    It helps where the same responses return: demonstrations, several runs with the same seed, a repeated buffer. The
    key of a rollout is a digest of the teacher's weights, of the prompt and response tokens as the teacher sees them,
    of the mask, of the temperature and of the request, so another teacher or request never gets these targets. Each
    rollout is a file, ``FOLDER/ab/cd….safetensors``, written beside its name and renamed: processes and runs may share
    a folder. A file holds a digest of its content, and a damaged one is scored again. Nothing is deleted: a line at the
    start of a run says how large the folder is, and removing it frees the space.

    Args:
        teacher: scores what is not on disk.
        folder: made if it is missing.

    Raises:
        UsageError: the teacher is a moving average, or its weights are unknown, or the folder cannot be made.
    """

    def __init__(self, teacher: Teacher, folder: str) -> None:
        require(
            not teacher.follows_student,
            f"teacher is a {type(teacher).__name__} that follows the student's weights, so its targets cannot be kept: "
            "leave the TargetCache out, or set the teacher's decay to null",
        )
        require(bool(folder), "folder is empty, but must be the folder of the targets, such as ./targets")
        self.teacher, self.folder = teacher, expanded(folder, "folder")
        self.names, self.offload = teacher.names, teacher.offload
        self._fingerprint = ""
        self._metrics: dict[str, float] = {}
        self._told_of_overlap = False

    def bind(self, student: LanguageModel) -> None:
        """Bind the teacher and read its weights for the digest."""
        self.teacher.bind(student)
        self.tokenizer, self.vocab_size = self.teacher.tokenizer, self.teacher.vocab_size
        self.stop_tokens = self.teacher.stop_tokens
        self._fingerprint = self.teacher.fingerprint()
        try:
            with naming_full_disk(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        count, size, exact = _held(self.folder)
        if count:
            rank_zero_info(
                f"targets on disk: {'' if exact else 'about '}{count:,} rollouts, {size / _MIB:,.1f} MiB in "
                f"{self.folder}; nothing there is deleted: remove the folder to free it"
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.teacher.to(device)

    def after_step(self, student: LanguageModel) -> None:
        """Pass the student on to the teacher."""
        self.teacher.after_step(student)

    def head(self, temperature: float = 1.0) -> Any:
        """Return the teacher's head."""
        teacher: Any = self.teacher
        return teacher.head(temperature)

    def models(self) -> Iterator[tuple[str, LanguageModel]]:
        """Yield the teacher's models."""
        return self.teacher.models()

    def local_models(self) -> Sequence[LanguageModel]:
        """Return the teacher's models."""
        return self.teacher.local_models()

    def contexts(self) -> dict[str, ContextLength]:
        """Return the context lengths of the teacher's models."""
        return self.teacher.contexts()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the teacher's state."""
        return self.teacher.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the teacher's state, which may change its weights."""
        self.teacher.load_state_dict(state)
        self._fingerprint = self.fingerprint()

    def weights_digest(self) -> str | None:
        """Return the teacher's digest."""
        return self.teacher.weights_digest()

    def check_request(self, request: TeacherRequest, temperature: float) -> None:
        """Let the teacher refuse what it cannot compute."""
        self.teacher.check_request(request, temperature)

    def fingerprint(self) -> str:
        """Return the teacher's fingerprint."""
        return self.teacher.fingerprint()

    def metrics(self) -> dict[str, float]:
        """Return the number of rollouts found and not found on disk, and the teacher's metrics of the others."""
        return dict(self._metrics)

    def score(self, rollouts: Rollouts, request: TeacherRequest, progress: Progress | None = None) -> Targets:
        """Return the targets of ``rollouts``, from disk where they are; see :meth:`Teacher.score`.

        Raises:
            FullDiskError: the disk is full.
        """
        rollouts = rollouts.as_teacher_sees()
        self._fingerprint = self._fingerprint or self.teacher.fingerprint()
        lengths = _lengths(rollouts)
        keys = self._keys(rollouts, request, lengths)
        merged = MergedTargets(*rollouts.tokens.shape)
        missing, without_overlap = [], 0
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            found = self._read(key, length)
            if found is None:
                missing.append(row)
            else:
                merged.put(torch.tensor([row]), found)
                without_overlap += found.support_overlap is None
        if without_overlap and request.behavior_top_k and not request.top_k and not self._told_of_overlap:
            self._told_of_overlap = True
            rank_zero_info(
                f"{without_overlap} of {len(keys)} rollouts have targets in {self.folder} that lack the overlap of "
                "supports, as those of older versions do: train/support_overlap leaves them out"
            )
        self._metrics = {
            "targets/cache_hits": float(len(keys) - len(missing)),
            "targets/cache_misses": float(len(missing)),
        }
        # A teacher with sharded weights scores in all processes together, even if one of them has no rollout for it.
        in_step = any(model.sharding is not None for model in self.local_models())
        if missing or not keys or in_step:
            rows = torch.tensor(missing, dtype=torch.long)
            # Each part is on disk before the next one is waited for, so a failure loses nothing that is scored.
            for of_part, part in self.teacher.score_in_parts(rollouts.rows(rows), request, progress):
                merged.put(rows[of_part], part)
                for place, row in enumerate(rows[of_part].tolist()):
                    self._write(keys[row], part.rows(torch.tensor([place])), lengths[row])
            self._metrics |= self.teacher.metrics()
        return merged.targets()

    def _keys(self, rollouts: Rollouts, request: TeacherRequest, lengths: list[int]) -> list[str]:
        """Return the key of each rollout: what its targets depend on."""
        asked = asdict(request)
        del asked["logprobs"]  # says what may be missing, which depends on the teacher
        common = [_FORMAT, self._fingerprint, rollouts.temperature, asked]
        start = hashlib.blake2b(digest(common).encode(), digest_size=_DIGEST_BYTES)
        keys = []
        for row, length in enumerate(lengths):
            parts = [rollouts.prompt_tokens[row][rollouts.prompt_mask[row].bool()], rollouts.tokens[row, :length]]
            parts.append(rollouts.mask[row, :length])
            if request.behavior_top_k and rollouts.behavior_support_ids is not None:
                parts.append(rollouts.behavior_support_ids[row, :length].reshape(-1))
            if rollouts.teacher_ids is not None:
                parts.append(rollouts.teacher_ids[row].view(1))
            key = start.copy()
            for part in parts:
                numbers = part.long().cpu().contiguous()
                key.update(len(numbers).to_bytes(8, "little"))
                key.update(numbers.numpy().tobytes())
            keys.append(key.hexdigest())
        return keys

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def _read(self, key: str, length: int) -> Targets | None:
        """Return the targets of a rollout, [1, length, …]; None if they are not on disk or damaged."""
        opened: Any = safe_open  # its stubs lack keys and metadata
        try:
            with opened(self._path(key), framework="pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
                known = (file.metadata() or {}).get(_CONTENT)
            targets = Targets(**tensors)
        except (OSError, SafetensorError, TypeError, ValueError):
            return None
        whole = known == _content(tensors) and all(each.shape[:2] == (1, length) for each in tensors.values())
        return targets if whole else None

    def _write(self, key: str, targets: Targets, length: int) -> None:
        tensors = {
            field.name: value[:, :length].contiguous()
            for field in fields(targets)
            if (value := getattr(targets, field.name)) is not None
        }
        try:
            with replacing(self._path(key), shared=True) as file:
                file.write(save(tensors, {_CONTENT: _content(tensors)}))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(
            f"model.teacher.folder is '{self.folder}', which cannot be written ({error.strerror}): give another folder"
        )


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors by name."""
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _held(folder: Path) -> tuple[int, float, bool]:
    """Return the number of files of targets in a folder, their bytes, and whether these are exact.

    The keys are digests, so the files are spread evenly over the folders in it: if there are many, some of these
    folders say how many there are in all.
    """
    parts = [each.path for each in os.scandir(folder) if each.is_dir()]
    count, sizes, read = 0, list[int](), 0
    for part in parts:
        if count >= _COUNTED:
            break
        read += 1
        for file in os.scandir(part):
            if file.name.endswith(".safetensors"):
                count += 1
                if len(sizes) < _COUNTED:
                    with suppress(FileNotFoundError):  # another process has removed it
                        sizes.append(file.stat().st_size)
    mean = sum(sizes) / max(len(sizes), 1)
    all_ = round(count * len(parts) / max(read, 1))
    return all_, all_ * mean, read == len(parts)


def _lengths(rollouts: Rollouts) -> list[int]:
    """Return the number of columns of each rollout up to its last valid position, at least 1."""
    columns = torch.arange(1, rollouts.mask.shape[1] + 1, device=rollouts.mask.device)
    lengths: list[int] = (rollouts.mask.bool() * columns).amax(1).clamp(min=1).tolist()
    return lengths
