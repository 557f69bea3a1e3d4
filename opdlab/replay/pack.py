"""One file with recorded steps, fresh rollouts and the student, for replays without teacher, run folder and data.

A pack is an uncompressed zip archive: ``pack.json``, the student as a Hugging Face folder (``student/``, and ``base/``
if it has an adapter), the teacher's head (``head.safetensors``) if targets are hidden states, and for each step a
record (:mod:`opdlab.replay.record`) with its fresh rollouts, ``draws.safetensors``. Nothing in it is read by pickle.
``pack.json`` has a digest of each member, and the archive's comment a digest of ``pack.json``.

Trained weights are zero in ``student/``, and compressed: each step has its own.
"""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import require
from opdlab.files import PARTIAL, replacing
from opdlab.module import OPDModule
from opdlab.policies import LanguageModel
from opdlab.replay.fresh import Draws, Sampling
from opdlab.replay.record import (
    FACTS,
    ROLLOUTS,
    WEIGHTS,
    RecordedStep,
    batch_tensors,
    facts_text,
    plain_values,
    save_tensors,
    trained_weights,
)
from opdlab.replay.targets import gives_entropy, with_entropy
from opdlab.version import __version__

FORMAT = 1
MARK = "opdlab replay pack"
ABOUT, HEAD, DRAWS = "pack.json", "head.safetensors", "draws.safetensors"
STUDENT, BASE = "student", "base"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackSettings:
    """Settings of a run that a replay of its pack needs.

    Args:
        model: sections ``student``, ``objective`` and ``gate`` of the run's configuration, and ``max_tokens_per_pass``.
        seed: of all generators, as the run set it.
        accelerator: the trainer's.
        precision: the trainer's.
        sampling: of the fresh rollouts.
    """

    model: Mapping[str, Any]
    seed: int
    accelerator: str
    precision: str | int | None
    sampling: Sampling


def check_packable(student: LanguageModel) -> None:
    """Raise a UsageError if a student cannot be put into a pack."""
    kind = type(student.model)
    require(
        not kind.__module__.startswith("transformers_modules"),
        f"model.student is a {kind.__name__}, whose code comes with its folder (trust_remote_code), and a pack holds "
        "no code: replay the run's folder instead",
    )


def write_pack(
    path: Path,
    module: OPDModule,
    settings: PackSettings,
    records: Iterable[RecordedStep],
    draws: Callable[[RecordedStep], Draws],
) -> dict[str, int]:
    """Write a pack, replacing an existing file; a kill or an error leaves that as it was.

    Args:
        path: of the file; its folder is made if it is missing.
        module: of the run, with its teacher, on its device; afterwards its trained weights are zero.
        settings: of the run.
        records: the steps to write.
        draws: returns the fresh rollouts of a step, whose weights the student has.

    Returns:
        Sizes in bytes of ``weights``, ``steps``, ``draws``, ``student`` and ``head``.

    Raises:
        UsageError: the student's code is not part of transformers.
        FullDiskError: the disk is full.
    """
    check_packable(module.student)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file: the student may be larger than what the system's folder for temporary files takes.
    with (
        tempfile.TemporaryDirectory(PARTIAL, f".{path.name}-", path.parent) as folder,
        replacing(path) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        members = _Members(archive)
        steps = [_write_step(members, module, record, draws, Path(folder)) for record in records]
        head = _write_head(members, module, Path(folder) / HEAD) if any(s["hidden"] for s in steps) else None
        _write_student(members, module.student, Path(folder))
        teacher = {"vocab_size": module.teacher.vocab_size, "names": list(module.teacher.names), "head": head}
        about = {"kind": MARK, "format": FORMAT, "opdlab": __version__, **asdict(settings)}
        about |= {"teacher": teacher, "steps": steps, "members": members.digests}
        text = json.dumps(about, indent=1).encode() + b"\n"
        members.add(ABOUT, text)
        archive.comment = f"{MARK} {FORMAT} {hashlib.sha256(text).hexdigest()}".encode()
    return members.sizes


class _Members:
    """Writes members of an archive, and collects their digests and sizes."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.digests: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, content: bytes | Path, part: str = "", *, compress: bool = False) -> None:
        """Write a member from memory or from a file, which is deleted.

        Args:
            name: of the member.
            content: its bytes, or the file that has them.
            part: of the sizes, to which its size on the disk is added.
            compress: deflate it.
        """
        info = zipfile.ZipInfo(name)  # with a fixed date, so that equal packs are equal files
        info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        found = hashlib.sha256()
        with self._archive.open(info, "w", force_zip64=True) as into:
            for chunk in [content] if isinstance(content, bytes) else _chunks(content):
                found.update(chunk)
                into.write(chunk)
        self.digests[name] = found.hexdigest()
        self.sizes[part] = self.sizes.get(part, 0) + info.compress_size
        if isinstance(content, Path):
            content.unlink()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _write_step(
    members: _Members, module: OPDModule, record: RecordedStep, draws: Callable[[RecordedStep], Draws], folder: Path
) -> dict[str, Any]:
    record.load_weights(module.student)
    drawn = draws(record)
    batches = record.batches
    if gives_entropy(module.teacher, batches[0].rollouts.temperature):  # it costs little space, and many gates need it
        vocab_size = module.student.vocab_size
        batches = tuple(with_entropy(module.teacher, batch, vocab_size) for batch in batches)
    name = f"steps/{record.number:06d}"
    save_tensors(trained_weights(module.student), folder / WEIGHTS)
    members.add(f"{name}/{WEIGHTS}", folder / WEIGHTS, "weights")
    save_tensors(batch_tensors(batches), folder / ROLLOUTS)
    members.add(f"{name}/{ROLLOUTS}", folder / ROLLOUTS, "steps")
    members.add(f"{name}/{FACTS}", facts_text(record.facts, batches).encode(), "steps")
    tensors: dict[str, Tensor] = {}
    for reference, found in drawn.items():
        for draw, parts in enumerate(found):
            tensors |= batch_tensors(parts, f"{reference}.{draw}.")
    save_tensors(tensors, folder / DRAWS)
    members.add(f"{name}/{DRAWS}", folder / DRAWS, "draws")
    plain = {reference: [plain_values(parts) for parts in found] for reference, found in drawn.items()}
    return {"number": record.number, "draws": plain, "hidden": any(b.targets.hidden is not None for b in batches)}


def _write_head(members: _Members, module: OPDModule, path: Path) -> dict[str, Any]:
    head = module.teacher.head()
    names = ("weight", "bias", "down", "up")
    save_tensors({name: each for name, each in zip(names, head.tensors, strict=True) if each is not None}, path)
    members.add(HEAD, path, "head")
    scaling = None if head.low_rank is None else head.low_rank.scaling
    return {"scale": head.scale, "softcap": head.softcap, "vocab_size": head.vocab_size, "scaling": scaling}


@torch.no_grad()
def _write_student(members: _Members, student: LanguageModel, folder: Path) -> None:
    for weight in trained_weights(student).values():
        weight.zero_()  # shares the parameter's memory
    if student.has_adapter:
        student.without_adapter().save(folder / BASE)
    student.save(folder / STUDENT)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        members.add(name, file, "student", compress=name.startswith(f"{STUDENT}/"))
