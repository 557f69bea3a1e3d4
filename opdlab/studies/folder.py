"""A run's folder: what is in it, and when the run counts as finished.

``samples/`` is where the run writes while it lasts. Only when all evaluations are complete does it become
``evaluations/``, and after that ``run.json`` says so: whatever was killed half way has neither.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN, PROGRESS, LOG, LOCK = "run.json", "progress.json", "log.txt", "lock"
EVALUATIONS, SAMPLES, LAUNCH = "evaluations", "samples", "submitit"
STUDY, RUNS, VARIANTS = "study.yaml", "runs", "variants"  # of a study's folder
FINISHED, FAILED = "finished", "failed"
_KEPT_WHEN_CLEANED = (LOCK, LOG, LAUNCH)
_TAIL_BYTES = 20_000


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or half of one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file at once, so that no half of it is ever read."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def evaluation_is_complete(folder: Path) -> bool:
    """Whether an evaluation's folder has its results and every line that its settings ask for."""
    settings, results = read_json(folder / "settings.json"), read_json(folder / "results.json")
    compared = settings.get("compared", {})
    if not results or not compared:
        return False
    samples = compared.get("model.eval_sampling.num_samples", 0)
    asked = {
        key.removeprefix("data.benchmarks.").removesuffix(" (num_problems)"): number * samples
        for key, number in compared.items()
        if key.startswith("data.benchmarks.") and key.endswith(" (num_problems)")
    }
    return bool(asked) and all(_num_lines(folder, name) == number for name, number in asked.items())


def _num_lines(folder: Path, benchmark: str) -> int:
    files = [file for file in folder.glob(f"{benchmark}-*.jsonl") if file.stem[len(benchmark) + 1 :].isdigit()]
    return sum(file.read_bytes().count(b"\n") for file in files)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        path: where.
        evaluated_at: optimizer steps at which it is evaluated.
    """

    path: Path
    evaluated_at: Sequence[int]

    @property
    def record(self) -> dict[str, Any]:
        """``run.json``: how the run ended."""
        return read_json(self.path / RUN)

    @property
    def step(self) -> int:
        """Optimizer steps taken, about."""
        return int(read_json(self.path / PROGRESS).get("step", 0))

    @property
    def seconds(self) -> float:
        """Seconds that all attempts took."""
        return float(read_json(self.path / PROGRESS).get("seconds", 0.0))

    @property
    def finished(self) -> bool:
        """Whether the run is over and all its evaluations are whole."""
        return self.record.get("state") == FINISHED and self.is_complete(self.path / EVALUATIONS)

    @property
    def failed(self) -> bool:
        """Whether the last attempt ended in an error."""
        return self.record.get("state") == FAILED

    def is_complete(self, samples: Path) -> bool:
        """Whether ``samples`` has every evaluation of the run, the one before training aside."""
        return all(evaluation_is_complete(samples / f"val-step-{step}") for step in self.evaluated_at)

    def clean(self) -> None:
        """Take away what a former attempt left, its log aside."""
        for path in self.path.iterdir() if self.path.exists() else ():
            if path.name not in _KEPT_WHEN_CLEANED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def last_lines(self, number: int = 8) -> list[str]:
        """The end of what the run printed; of what its process did, where the run said nothing."""
        logs = [self.path / LOG, *sorted((self.path / LAUNCH).glob("*_log.err"), key=lambda f: f.stat().st_mtime)[-1:]]
        for log in logs:
            if lines := _tail(log, number):
                return lines
        return []

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the folder for this process; whether it could be had."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
            yield True
            file.truncate(0)

    @property
    def holder(self) -> dict[str, Any] | None:
        """Process and host that hold the folder; None where nobody does."""
        path = self.path / LOCK
        if not path.exists():
            return None
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return read_json(path)
        return None


def _tail(path: Path, number: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-number:]
