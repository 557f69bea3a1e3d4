"""The files of a study: paths, content, reading and writing, for runs and reports.

::

    STUDY/
      study.yaml                     the study, see `read_study`
      variants/VARIANT.json          configuration of a variant by dotted key, without what differs from run to run
      lock                           held while `opdlab study run` lives
      report/                        see `opdlab.report`
      runs/VARIANT/seed-SEED/
        run.json                     how the run ended: `Record`
        progress.json                step and seconds so far
        log.txt                      what the run printed
        lock                         held by the job's process; names it
        submitit/                    logs and pickles of the job, and files of its tasks, see `opdlab.studies.tasks`
        version_0/                   run folder of `opdlab fit`: checkpoints, config.yaml, results.json, events
        samples/version_0-DIGEST/    evaluations while the run lasts
        evaluations/val-step-STEP/   settings.json, results.json, sample lines: only of a run that has ended

A run is finished once `evaluations/` is complete and `run.json` says so. `run.json` is written last, so a killed run
has neither.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from opdlab.locks import lock_holder
from opdlab.records import RESULTS, package_versions, read_json, read_settings, write_json
from opdlab.run_folder import fit_samples_folder

STUDY, VARIANTS, RUNS, REPORT = "study.yaml", "variants", "runs", "report"
RUN, PROGRESS, LOG, LAUNCH = "run.json", "progress.json", "log.txt", "submitit"
EVALUATIONS, SAMPLES, VERSION = "evaluations", "samples", "version_0"
_TAIL_BYTES = 20_000

# States of a run. `run.json` has the first two; the launcher reports the next two, the report the others. A run that
# has finished may have collapsed, which `results.json` of its run folder says.
FINISHED, FAILED = "finished", "failed"
RUNNING, WAITING = "running", "waiting"
UNFINISHED, MISSING, COLLAPSED = "unfinished", "missing", "collapsed"


def run_path(study: Path, variant: str, seed: int) -> Path:
    """Return the folder of a run."""
    return study / RUNS / variant / f"seed-{seed}"


def evaluation_path(evaluations: Path, step: int) -> Path:
    """Return the folder of the evaluation after ``step`` optimizer steps, under ``evaluations`` or ``samples``."""
    return evaluations / f"val-step-{step}"


@dataclass(frozen=True)
class Record:
    """The content of ``run.json``.

    Args:
        variant: name.
        seed: of the run.
        state: ``finished`` or ``failed``; ``unfinished`` if the file is missing or incomplete.
        command: of the run.
        seconds: duration of all attempts.
        threads: CPU threads of each process; None if they were left to PyTorch.
        machine: host, system, number of CPUs.
        versions: of packages that results may depend on.
        digest: of all settings that determine the results, see :class:`opdlab.studies.plan.Plan`.
        last_lines: of a failed run's output.
        taken_from: folder of the run that this one is a copy of.
    """

    variant: str = ""
    seed: int = 0
    state: str = UNFINISHED
    command: Sequence[str] = ()
    seconds: float = 0.0
    threads: int | None = None
    machine: Mapping[str, Any] = field(
        default_factory=lambda: {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()}
    )
    versions: Mapping[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), **package_versions()}
    )
    digest: str = ""
    last_lines: Sequence[str] = ()
    taken_from: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the record of the run in ``folder``."""
        known = {"machine": {}, "versions": {}, **read_json(folder / RUN)}
        return cls(**{each.name: known[each.name] for each in fields(cls) if each.name in known})

    def write(self, folder: Path) -> None:
        """Write the record of the run in ``folder``."""
        optional = ("last_lines", "taken_from")
        write_json(folder / RUN, {key: value for key, value in asdict(self).items() if value or key not in optional})


def last_lines(log: Path, number: int = 8) -> list[str]:
    """Return the last lines of a file that are not blank; none if it cannot be read."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-number:]
    return []


def evaluation_is_complete(folder: Path) -> bool:
    """Return True if an evaluation has its results and every sample line that its settings require."""
    settings = read_settings(folder) or {}
    benchmarks = settings.get("data", {}).get("benchmarks", {})
    num_samples = settings.get("model", {}).get("eval_sampling", {}).get("num_samples", 0)
    num_lines = dict.fromkeys(benchmarks, 0)
    for file in folder.glob("*.jsonl"):
        benchmark, _, rank = file.stem.rpartition("-")
        if benchmark in num_lines and rank.isdigit():
            num_lines[benchmark] += file.read_bytes().count(b"\n")
    return bool(benchmarks and read_json(folder / RESULTS)) and all(
        num_lines[name] == benchmark["num_problems"] * num_samples for name, benchmark in benchmarks.items()
    )


@dataclass(frozen=True)
class StudyRun:
    """The folder of one run.

    Args:
        path: of the folder.
        evaluated_at: optimizer steps after which the run is evaluated.
    """

    path: Path
    evaluated_at: Sequence[int]

    @property
    def record(self) -> Record:
        """Return the record of how the run ended."""
        return Record.read(self.path)

    @property
    def step(self) -> int:
        """Return the number of optimizer steps taken, up to a second old."""
        return int(read_json(self.path / PROGRESS).get("step", 0))

    @property
    def seconds(self) -> float:
        """Return the seconds that all attempts took."""
        return float(read_json(self.path / PROGRESS).get("seconds", 0.0))

    def write_progress(self, step: int, seconds: float) -> None:
        """Write the progress of the run."""
        write_json(self.path / PROGRESS, {"step": step, "seconds": seconds})

    @property
    def samples(self) -> Path:
        """Return the folder in which `opdlab fit` writes evaluations during the run."""
        return fit_samples_folder(str(self.path / SAMPLES), self.path / VERSION)

    @property
    def evaluations(self) -> Path:
        """Return the folder of the evaluations after the run has ended."""
        return self.path / EVALUATIONS

    @property
    def finished(self) -> bool:
        """True if the run has ended and all its evaluations are complete."""
        return self.record.state == FINISHED and self.is_complete(self.evaluations)

    @property
    def collapsed(self) -> bool | None:
        """True if the run says that training has collapsed, None if it says nothing; it counts all the same."""
        state = read_json(self.path / VERSION / RESULTS).get("state")
        return None if state is None else state == COLLAPSED

    @property
    def holder(self) -> dict[str, Any] | None:
        """Return process and host that run it; None if no process does."""
        return lock_holder(self.path)

    def is_complete(self, evaluations: Path) -> bool:
        """Return True if every evaluation of the run is complete; the one before training does not count."""
        return all(evaluation_is_complete(evaluation_path(evaluations, step)) for step in self.evaluated_at)

    def last_lines(self, number: int = 8) -> list[str]:
        """Return the end of the run's output; of its job's output if the run printed nothing."""
        logs = sorted((self.path / LAUNCH).glob("*_log.err"), key=lambda file: file.stat().st_mtime)
        return next(filter(None, (last_lines(log, number) for log in (self.path / LOG, *logs[-1:]))), [])
