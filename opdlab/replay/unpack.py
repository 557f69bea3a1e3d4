"""Packs, opened for reading; :mod:`opdlab.replay.pack` has their form."""

import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from opdlab.errors import UsageError, first_line, require
from opdlab.policies.loading import ADAPTER_CONFIG
from opdlab.replay.fresh import Draws, Sampling
from opdlab.replay.pack import ABOUT, BASE, DRAWS, FORMAT, HEAD, MARK, STUDENT, PackSettings
from opdlab.replay.record import FACTS, ROLLOUTS, WEIGHTS, RecordedStep, read_batches, read_facts
from opdlab.replay.targets import RecordedTeacher
from opdlab.scoring import Head, LowRank

_EXPECTED = "a file that opdlab replay --pack has written"
_CHUNK = 1 << 20


class Pack:
    """A pack, opened for reading.

    Args:
        path: of the file.

    Raises:
        UsageError: it is not a pack, is damaged, or was written by another version of opdlab.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            self._archive = zipfile.ZipFile(path)
            comment = self._archive.comment.decode("ascii", "replace")
            require(comment.startswith(f"{MARK} "), f"'{path}' is a zip archive, but not {_EXPECTED}")
            number, _, digest = comment.removeprefix(f"{MARK} ").partition(" ")
            require(
                number == str(FORMAT),
                f"'{path}' has format {number}, but this version of opdlab reads {FORMAT}: pack the run anew",
            )
            text = self._archive.read(ABOUT)
            self._check(ABOUT, hashlib.sha256(text).hexdigest(), digest)
            about = json.loads(text)
            self._digests: dict[str, str] = about["members"]
            self._steps = {int(step["number"]): step for step in about["steps"]}
            self._teacher = about["teacher"]
            self.settings = PackSettings(
                about["model"],
                about["seed"],
                about["accelerator"],
                about["precision"],
                Sampling(**about["sampling"]),
            )
            self.digest = digest

    @property
    def steps(self) -> list[int]:
        """Return the numbers of the steps, counted from 1."""
        return sorted(self._steps)

    def check(self, numbers: Iterable[int]) -> None:
        """Compare the digests of all members that a replay of these steps reads.

        Raises:
            UsageError: a member is missing or damaged.
        """
        wanted = tuple(f"steps/{number:06d}/" for number in numbers)
        for name, digest in self._digests.items():
            if name.startswith("steps/") and not name.startswith(wanted):
                continue
            found = hashlib.sha256()
            with self._reading(), self._archive.open(name) as file:
                while chunk := file.read(_CHUNK):
                    found.update(chunk)
            self._check(name, found.hexdigest(), digest)

    def record(self, number: int) -> RecordedStep:
        """Return a step; its weights are read when they are needed."""
        name, folder = f"steps/{number:06d}", self.path / f"step-{number:06d}"
        with self._reading():
            facts, plain = read_facts(self._archive.read(f"{name}/{FACTS}").decode(), str(folder))
            batches = read_batches(self._tensors(f"{name}/{ROLLOUTS}"), plain)
        return RecordedStep(folder, facts, batches, partial(self._tensors, f"{name}/{WEIGHTS}"))

    def draws(self, sampling: Sampling, record: RecordedStep) -> Draws:
        """Return the fresh rollouts of a step, see :meth:`check_sampling`."""
        with self._reading():
            tensors = self._tensors(f"steps/{record.number:06d}/{DRAWS}")
            return {
                name: [read_batches(tensors, parts, f"{name}.{draw}.") for draw, parts in enumerate(found)]
                for name, found in self._steps[record.number]["draws"].items()
                if name == "fresh" or sampling.other_prompts
            }

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise a UsageError if the pack has not the fresh rollouts that are asked for."""
        own = self.settings.sampling
        for name in ("draws", "seed"):
            ours, asked = getattr(own, name), getattr(sampling, name)
            require(
                ours == asked,
                f"--{name} is {asked}, but '{self.path}' was packed with {ours}: leave it out, or pack the run anew",
            )
        require(
            own.other_prompts or not sampling.other_prompts,
            f"--other_prompts is given, but '{self.path}' was packed without: leave it out, or pack the run anew with "
            "--other_prompts",
        )

    def teacher(self) -> RecordedTeacher:
        """Return what is left of the teacher."""
        with self._reading():
            about, head = self._teacher, None
            if about["head"] is not None:
                options, tensors = dict(about["head"]), self._tensors(HEAD)
                scaling = options.pop("scaling")
                low_rank = None if scaling is None else LowRank(tensors["down"], tensors["up"], scaling)
                head = Head(tensors["weight"], tensors.get("bias"), low_rank=low_rank, **options)
            return RecordedTeacher(about["vocab_size"], tuple(about["names"]), head)

    @contextmanager
    def student_section(self) -> Iterator[dict[str, Any]]:
        """Yield the section of the student, whose folder exists inside the block.

        Trained weights are zero until those of a step are loaded.
        """
        with tempfile.TemporaryDirectory(prefix="opdlab-replay-") as name:
            folder = Path(name)
            for member in self._digests:
                place = PurePosixPath(member)
                if place.parts[0] in (STUDENT, BASE) and ".." not in place.parts:
                    file = folder / place
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with self._reading(), self._archive.open(member) as source, file.open("wb") as into:
                        shutil.copyfileobj(source, into, _CHUNK)
            if (folder / BASE).is_dir():
                adapter = folder / STUDENT / ADAPTER_CONFIG
                with self._reading():
                    content = json.loads(adapter.read_text(encoding="utf-8"))
                content["base_model_name_or_path"] = str(folder / BASE)
                adapter.write_text(json.dumps(content), encoding="utf-8")
            section = dict(self.settings.model["student"])
            options = {**section["init_args"], "path": str(folder / STUDENT)}
            own = {"adapter": None, "revision": None, "gguf_file": None, "trust_remote_code": False}
            yield {**section, "init_args": options | {name: own[name] for name in own.keys() & options.keys()}}

    def _tensors(self, member: str) -> dict[str, Tensor]:
        with self._reading():
            return safetensors.torch.load(self._archive.read(member))

    def _check(self, member: str, found: str, expected: str | None) -> None:
        require(
            found == expected,
            f"'{self.path}' is damaged, {member} has another digest: copy the file again, or pack the run anew",
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise an error inside the block as one that names the file."""
        try:
            yield
        except UsageError:
            raise
        except FileNotFoundError as error:
            raise UsageError(f"'{self.path}' does not exist: give a run's folder, or {_EXPECTED}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            cut = _is_zip(self.path)
            said = "is cut off or damaged: copy it again, or pack the run anew" if cut else f"is not {_EXPECTED}"
            raise UsageError(f"'{self.path}' {said} ({first_line(error)})") from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"'{self.path}' cannot be read: copy it again, or pack the run anew ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
