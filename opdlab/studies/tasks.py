"""Tasks of a scheduler's job that are the processes of one run, and what they tell each other.

On SLURM each process of a run is a task of the job, on one machine or several. The first task looks for a checkpoint
and tidies the folder; then the others run the same command. They exchange small files, because they have no connection
yet, and submitit needs a shared folder anyway::

    submitit/tasks-JOB-RESTARTS/start.json   options of `opdlab fit`, written by the first task
    submitit/tasks-JOB-RESTARTS/RANK.json    exit code and last lines of a task that has ended
    submitit/log-RANK.txt                    what the run's process of another task prints
"""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import JobEnvironment

from opdlab.processes import END_SECONDS
from opdlab.records import read_json, write_json
from opdlab.studies.schema import LAUNCH, LOG, last_lines

_POLL_SECONDS = 1.0  # seconds between looks at a folder that may lie on another machine
_HUNG_SECONDS = 20.0
"""Seconds that a process has to notice that another one has failed."""


@dataclass
class Tasks:
    """The tasks of this job; a single one has nothing to exchange.

    Args:
        folder: of the run.
        rank: number of this task.
        count: number of tasks.
        attempt: name that all tasks of the job have in common, and no earlier attempt.
    """

    folder: Path
    rank: int = 0
    count: int = 1
    attempt: str = ""
    _looked: float = field(default=0.0, repr=False)
    _failed_since: float | None = field(default=None, repr=False)

    @classmethod
    def of_this_job(cls, folder: Path) -> "Tasks":
        """Return the tasks of the scheduler's job in which this process is one."""
        job = JobEnvironment()
        # SLURM keeps the number of a job that it queues again.
        attempt = f"{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        return cls(folder, job.global_rank, job.num_tasks, attempt)

    @property
    def log(self) -> Path:
        """Return the file for the output of this task's process of the run."""
        return self.folder / LOG if self.rank == 0 else self.folder / LAUNCH / f"log-{self.rank}.txt"

    @property
    def _files(self) -> Path:
        return self.folder / LAUNCH / f"tasks-{self.attempt}"

    def start(self, options: Sequence[str]) -> None:
        """Tell the other tasks, as the first one, with which options of ``opdlab fit`` the run starts."""
        if self.count > 1:
            for other in set((self.folder / LAUNCH).glob("tasks-*")) - {self._files}:
                shutil.rmtree(other, ignore_errors=True)
            write_json(self._files / "start.json", {"options": list(options)})

    def wait(self, signals: Sequence[int]) -> list[str] | None:
        """Return the options that the first task has told; None if it starts nothing, or a signal has come.

        Args:
            signals: received so far; the list grows.
        """
        while not signals:
            if (started := read_json(self._files / "start.json")) or read_json(self._files / "0.json"):
                return started.get("options")
            time.sleep(_POLL_SECONDS)
        return None

    def end(self, code: int) -> None:
        """Tell the other tasks that this one's process has ended.

        Args:
            code: exit code; -n after signal n.
        """
        if self.count > 1:
            write_json(self._files / f"{self.rank}.json", {"code": code, "last_lines": last_lines(self.log)})

    def wait_for_others(self) -> None:
        """Wait until the processes of the other tasks have ended, so that what they have written can be read here."""
        deadline = time.monotonic() + END_SECONDS
        while len(self._ended()) < self.count - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def others_failed(self) -> bool:
        """True if another task's process has failed so long ago that this one waits for it in vain."""
        if self.count > 1 and self._failed_since is None and time.monotonic() - self._looked >= _POLL_SECONDS:
            self._looked = time.monotonic()
            self._failed_since = self._looked if self._failures() else None
        return self._failed_since is not None and time.monotonic() - self._failed_since > _HUNG_SECONDS

    def reasons(self) -> list[str]:
        """Return what the other tasks' processes have said last, if they have failed; of three at most."""
        return [
            line
            for rank, ended in self._failures()[:3]
            for line in (f"process {rank} has ended with code {ended['code']}, and said:", *ended["last_lines"][-2:])
        ]

    def _failures(self) -> list[tuple[int, dict[str, Any]]]:
        # Processes that were signalled stop together; they have codes above 128.
        return [(rank, ended) for rank, ended in self._ended() if ended["code"] and ended["code"] <= 128]

    def _ended(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the other tasks whose processes have ended, and how."""
        others = (rank for rank in range(self.count) if rank != self.rank)
        return [(rank, ended) for rank in others if (ended := read_json(self._files / f"{rank}.json"))]
