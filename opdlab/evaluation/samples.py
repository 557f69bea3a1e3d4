"""Samples on disk: one JSON line each, written batch by batch and reused when an evaluation resumes."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from opdlab.errors import UsageError, require
from opdlab.files import naming_full_disk
from opdlab.records import RESULTS, SETTINGS, SETTINGS_PLACEHOLDER, difference, digest, read_settings, write_json


@dataclass(frozen=True)
class Sample:
    """An answer and its verdict: one line of the file.

    Args:
        benchmark: name.
        id: the problem's.
        sample: index of the sample among those of the problem, from 0.
        problem: the problem's text, before the template.
        gold: the gold answer.
        response: decoded text without special tokens.
        extracted: the answer found in the response, if any.
        correct: the verdict; None without a verifier.
        reason: reason for the verdict, see :class:`opdlab.verifiers.Verdict`.
        stop_reason: ``eos`` or ``length``.
        tokens: length of the response in tokens, its stop token included.
        seed: random stream of the sample.
        reverse_kl: nats per token of this response, if it was measured.
    """

    benchmark: str
    id: str
    sample: int
    problem: str
    gold: str | None
    response: str
    extracted: str | None
    correct: bool | None
    reason: str | None
    stop_reason: str
    tokens: int
    seed: int
    reverse_kl: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Return the problem's id and the index of the sample."""
        return self.id, self.sample

    def line(self) -> bytes:
        """Return the sample as a line of JSON."""
        # UTF-8 cannot encode a lone surrogate, so it is written as a JSON escape.
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "Sample | None":
        """Return the sample of a line written by :meth:`line`; None for an incomplete line."""
        if not line.endswith(b"\n"):
            return None
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None


class _SampleFile:
    """A file of samples in the order of the batches: existing lines are read first, then new ones are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        self._reading = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UsageError(
                f"model.evaluation.samples: another evaluation is writing {path}: wait for it, or give another folder"
            ) from error
        self.num_taken_up = 0

    def take(self, keys: Sequence[tuple[str, int]]) -> list[Sample] | None:
        if not self._reading:
            return None
        start = self._file.tell()
        samples = [sample for _ in keys if (sample := Sample.parse(self._file.readline()))]
        if [sample.key for sample in samples] == list(keys):
            self.num_taken_up += 1
            return samples
        # The earlier evaluation stopped here. A batch is sampled as a whole, so its incomplete lines are removed.
        self._reading = False
        self._file.seek(start)
        self._file.truncate()
        self.report()
        return None

    def write(self, samples: Sequence[Sample]) -> None:
        self._file.write(b"".join(sample.line() for sample in samples))
        self._file.flush()

    def report(self) -> None:
        if self.num_taken_up:
            batches = "1 batch" if self.num_taken_up == 1 else f"{self.num_taken_up} batches"
            rank_zero_info(f"{batches} taken up from {self.path}")

    def close(self) -> None:
        if self._reading:  # otherwise already reported when reading ended
            self.report()
        self._file.close()


def _difference(folder: Path, compared: dict[str, Any]) -> str | None:
    """Return in which settings the samples in a folder differ from ``compared``; None if they do not."""
    if (folder / SETTINGS).exists():
        theirs = read_settings(folder)
        return f"its {SETTINGS} cannot be read" if theirs is None else difference(theirs, compared)
    stray = min(folder.glob("*.jsonl"), default=None)
    return f"it has {stray.name} but no {SETTINGS}" if stray else None


class SampleFolder:
    """A folder with the samples of one evaluation and the settings that they depend on.

    Files: ``settings.json``, ``<benchmark>-<process>.jsonl``, and at the end ``results.json``.

    Args:
        folder: path; ``{settings}`` in it is replaced by a digest of ``settings["compared"]``.
        settings: content of ``settings.json``. ``compared`` holds the settings that the samples depend on, as a tree
            of configuration keys; other entries are not compared.
        rank: rank of this process.
        replace: delete samples of other settings instead of raising an error.
        take_over: folders of other runs. If this one is new, samples of the same settings are copied from the one that
            has most.
        barrier: waits for all processes.

    Raises:
        UsageError: the folder cannot be written, is in use, or holds samples of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        *,
        rank: int = 0,
        replace: bool = False,
        take_over: Sequence[Path] = (),
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        compared = settings["compared"]
        self.path = Path(str(folder).replace(SETTINGS_PLACEHOLDER, digest(compared)[:8]))
        self.settings = settings
        self._rank = rank
        self._files: dict[str, _SampleFile] = {}
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            differs = _difference(self.path, compared)
        require(
            replace or differs is None,
            f"model.evaluation.samples is '{self.path}', which holds samples of other settings: {differs}; "
            "give another folder",
        )
        barrier()  # all processes have compared before anything changes
        if rank == 0:
            with self._explained():
                if differs is not None:
                    for file in [*self.path.glob("*.jsonl"), self.path / RESULTS]:
                        file.unlink(missing_ok=True)
                if differs is not None or not (self.path / SETTINGS).exists():
                    self._copy_from(take_over, compared)
                    write_json(self.path / SETTINGS, settings)
        barrier()

    def take(self, benchmark: str, keys: Sequence[tuple[str, int]]) -> list[Sample] | None:
        """Return the next batch of the benchmark if an earlier evaluation wrote it completely, else None.

        Args:
            benchmark: name.
            keys: (problem id, index of the sample) of every sample in the batch, in order.
        """
        with self._explained():
            return self._file(benchmark).take(keys)

    def write(self, samples: Sequence[Sample]) -> None:
        """Append a batch of one benchmark and flush it, so that it survives if the process is killed."""
        with self._explained(), naming_full_disk(self.path / f"{samples[0].benchmark}-{self._rank}.jsonl"):
            self._file(samples[0].benchmark).write(samples)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json``, from the first process."""
        if self._rank == 0:
            with self._explained():
                write_json(self.path / RESULTS, results)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _file(self, benchmark: str) -> _SampleFile:
        if benchmark not in self._files:
            self._files[benchmark] = _SampleFile(self.path / f"{benchmark}-{self._rank}.jsonl")
        return self._files[benchmark]

    def _copy_from(self, folders: Sequence[Path], compared: dict[str, Any]) -> None:
        """Copy the samples of a folder with equal settings; a batch that is being written there is sampled again."""
        equal = [folder for folder in folders if read_settings(folder) == compared]
        sizes = {folder: sum(file.stat().st_size for file in folder.glob("*.jsonl")) for folder in equal}
        for file in max(sizes, key=sizes.__getitem__).glob("*.jsonl") if any(sizes.values()) else ():
            shutil.copyfile(file, self.path / file.name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"model.evaluation.samples is '{self.path}', which cannot be written ({error.strerror or error}): "
                "give another folder"
            ) from error
