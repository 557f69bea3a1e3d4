"""One run of a study, in a process of its own."""

import contextlib
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.helpers import Checkpointable

from opdlab.errors import Stopped, UsageError
from opdlab.studies.folder import (
    EVALUATIONS,
    FAILED,
    FINISHED,
    LOG,
    PROGRESS,
    RUN,
    SAMPLES,
    RunFolder,
    evaluation_is_complete,
    write_json,
)

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_VERSION = "version_0"


@dataclass(frozen=True)
class RunSpec:
    """What a run's process has to know.

    Args:
        variant: name.
        seed: of the run.
        folder: of the run.
        arguments: of ``opdlab fit``, without a checkpoint.
        evaluated_at: optimizer steps at which it is evaluated.
        threads: CPU threads; None leaves them to PyTorch.
        keep_checkpoints: whether they are kept when the run has finished.
        digest: of all that decides the run's results, see :class:`opdlab.studies.plan.Plan`.
        siblings: folders of the runs with the same seed, whose evaluation before training is the same.
    """

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    evaluated_at: tuple[int, ...]
    threads: int | None
    keep_checkpoints: bool
    digest: str
    siblings: tuple[Path, ...] = ()

    @property
    def run_folder(self) -> RunFolder:
        """The folder, and what is in it."""
        return RunFolder(self.folder, self.evaluated_at)


class Job(Checkpointable):
    """Runs ``opdlab fit`` from where an earlier attempt was stopped. Schedulers that preempt it may start it again.

    Whatever comes out is in the run's folder, so that it survives whoever started it; nothing is raised.
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, spec: RunSpec) -> None:
        """Run, unless another process has the folder or the run has finished."""
        with _sigterm_stops(), spec.run_folder.locked() as mine:
            if not mine or spec.run_folder.finished:
                return
            (spec.folder / RUN).unlink(missing_ok=True)
            try:
                code = _run(spec)
            except Stopped:
                return
            if code not in _STOPPED:
                _settle(spec, code)


def _run(spec: RunSpec) -> int:
    argv = list(sys.argv)
    log = (spec.folder / LOG).open("a", buffering=1)
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return _train(spec)
        except Exception:
            traceback.print_exc(file=log)
            return 1
        finally:
            sys.argv = argv


def _train(spec: RunSpec) -> int:
    started = time.monotonic()
    import torch  # here, so that the number of threads is known to all its libraries

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    sys.argv = [sys.argv[0]]
    resume: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    if (checkpoint := _newest_checkpoint(spec.folder)) is None:
        spec.run_folder.clean()
        _share_first_evaluation(spec)
    else:
        path, step = checkpoint
        resume = ("--ckpt_path", str(path))
        evaluation = _samples_folder(spec) / f"val-step-{step}"
        if step in spec.evaluated_at[:-1] and not evaluation_is_complete(evaluation):
            # Lightning goes on behind the evaluation that was due when the checkpoint was written.
            missing = ("--model.evaluation.samples", str(evaluation), *resume)
    earlier = spec.run_folder.seconds
    try:
        return _fit(spec, missing, resume)
    finally:
        seconds = earlier + time.monotonic() - started
        write_json(spec.folder / PROGRESS, {"step": spec.run_folder.step, "seconds": seconds})


def _fit(spec: RunSpec, missing: tuple[str, ...], resume: tuple[str, ...]) -> int:
    from opdlab.cli import main

    if missing and (code := main(["validate", *spec.arguments, *missing])) != 0:
        return code
    return main(["fit", *spec.arguments, *resume])


def _newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be read, and its step; those that a kill cut off are deleted."""
    from opdlab.cli.runs import check_checkpoint

    found = folder.glob(f"{_VERSION}/checkpoints/*.ckpt")
    for path in sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            return path, check_checkpoint(path)
        except UsageError:
            path.unlink()
    return None


def _samples_folder(spec: RunSpec) -> Path:
    from opdlab.cli.runs import fit_samples_folder

    return fit_samples_folder(str(spec.folder / SAMPLES), spec.folder / _VERSION)


def _share_first_evaluation(spec: RunSpec) -> None:
    """Take over the evaluation before training from another run with this seed.

    The evaluation itself sees whether weights and settings are the same, and samples anew where they are not.
    """
    for sibling in spec.siblings:
        for first in [sibling / EVALUATIONS / "val-step-0", *sibling.glob(f"{SAMPLES}/*/val-step-0")]:
            if evaluation_is_complete(first):
                with contextlib.suppress(OSError, shutil.Error):  # it may be moved just now
                    shutil.copytree(first, _samples_folder(spec) / first.name, dirs_exist_ok=True)
                    return


def _settle(spec: RunSpec, code: int) -> None:
    """Say how the run ended, having put its samples in their place if all are there."""
    folder, samples = spec.run_folder, _samples_folder(spec)
    final = spec.folder / EVALUATIONS
    if code == 0 and folder.is_complete(samples):
        if final.exists():
            shutil.rmtree(final)
        samples.replace(final)
    if code == 0 and folder.is_complete(final):
        shutil.rmtree(spec.folder / SAMPLES, ignore_errors=True)
        if not spec.keep_checkpoints:
            shutil.rmtree(spec.folder / _VERSION / "checkpoints", ignore_errors=True)
        write_record(spec, FINISHED)
    elif code == 0:
        write_record(spec, FAILED, ["it ended, but its evaluations are not complete: see its log"])
    else:
        write_record(spec, FAILED, folder.last_lines())


def write_record(spec: RunSpec, state: str, lines: list[str] | None = None) -> None:
    """Write ``run.json``.

    Args:
        spec: of the run.
        state: ``finished`` or ``failed``.
        lines: the last that it printed.
    """
    content: dict[str, Any] = {
        "variant": spec.variant,
        "seed": spec.seed,
        "state": state,
        "command": ["opdlab", "fit", *spec.arguments],
        "seconds": round(spec.run_folder.seconds, 3),
        "threads": spec.threads,
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), **package_versions()},
        "digest": spec.digest,
    }
    write_json(spec.folder / RUN, content | ({"last_lines": lines} if lines else {}))


def package_versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    from opdlab.evaluation.settings import versions

    return versions()


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Stop on SIGTERM from the beginning; ``opdlab fit`` has handlers of its own while it runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
